"""
The main job shown on one machine: embedded pods, an embedded DNS server, a real proxy.

`python -m strictproxy.demo` runs it; nothing else imports it but tests.
"""
