"""A simulated cluster: seeded, in virtual or real time, with faults on demand.

`backend` keeps the contract, `world` is the simulated engine, `agent` the truth about one instance, `watch` what a
watcher is told of it, `faults` what can go wrong, `prober` how instances answer, `arguments` what may be asked for.
"""

from agentfleet.backends.memory.agent import Behavior, Load
from agentfleet.backends.memory.backend import MemoryBackend
from agentfleet.backends.memory.deployments import MemoryDeployments
from agentfleet.backends.memory.faults import Faults
from agentfleet.backends.memory.prober import MemoryProber

__all__ = ["Behavior", "Faults", "Load", "MemoryBackend", "MemoryDeployments", "MemoryProber"]
