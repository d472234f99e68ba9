"""Makes `twistd strictproxy` and `twist strictproxy` known."""

from twisted.application.service import ServiceMaker

strictproxy = ServiceMaker(
    "strictproxy",
    "strictproxy.service",
    "Strict least-connection reverse proxy for heavy services on Kubernetes",
    "strictproxy",
)
