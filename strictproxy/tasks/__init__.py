"""
Asynchronous jobs, whose slot is held until the job is done.

A tracked task is a service's own: its submit call answers at once with an id,
and the pod stays busy until the job ends.
"""
