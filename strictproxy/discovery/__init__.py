"""
Where pod addresses come from: each kind publishes complete address sets.

Knows nothing of limits, lines or connections.
"""
