"""
What operators and the kubelet ask: health, readiness, state.

Reads snapshots; never reaches into anything.
"""
