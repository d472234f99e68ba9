"""A strict least-connection reverse proxy for heavy services on Kubernetes."""
