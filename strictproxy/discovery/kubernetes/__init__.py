"""Pods that a Service's EndpointSlices name, as they change."""
