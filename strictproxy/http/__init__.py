"""
The wire: HTTP/1.1 (RFC 9112) towards clients and towards pods.

Owns parsing, framing, connections and their time-outs. Knows nothing of
routes, slots or upstreams.
"""
