"""What a user's own tests import: virtual time, plans of faults for the simulated cluster, hypothesis strategies.

The cluster itself is `agentfleet.backends.memory`. `agentfleet.testing.strategies` is imported by its own name, because
it needs hypothesis.
"""

from agentfleet.testing.fault_plan import Fault, FaultPlan
from agentfleet.testing.virtual_time import Deadlock, Livelock, VirtualTimeLoop, run_virtual, virtual

__all__ = ["Deadlock", "Fault", "FaultPlan", "Livelock", "VirtualTimeLoop", "run_virtual", "virtual"]
