"""What a user's own tests import: virtual time, a simulated cluster with faults on demand, hypothesis strategies.

`agentfleet.testing.strategies` is imported by its own name, because it needs hypothesis.
"""

from agentfleet.testing.virtual_time import Deadlock, VirtualTimeLoop, run_virtual, virtual

__all__ = ["Deadlock", "VirtualTimeLoop", "run_virtual", "virtual"]
