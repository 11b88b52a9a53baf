"""One simulated agent: what is true of it, and how that looks from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentfleet.backends.memory.arguments import Range
from agentfleet.instances import Instance, Node, Phase

LOG_LINES = 200
"""Log lines kept per instance."""


@dataclass(frozen=True, slots=True)
class Behavior:
    """How the processes of a version behave; see `MemoryBackend.behave`. Times are seconds after the start."""

    crash_after: float | None = None
    exit_code: int = 1
    unhealthy_after: float | None = None
    never_ready: bool = False
    ready_after: float = 0.0
    slow: float = 0.0
    ignores_term: bool = False
    start_delay: Range | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What one simulated agent uses and holds: cores, bytes, and tasks in flight and waiting."""

    cpu: float = 0.05
    memory: int = 64 * 2**20
    in_flight: int = 0
    queue_length: int = 0


@dataclass(slots=True)
class Condition:
    """What ails a process. A restart cures it, unless it is `sticky`."""

    hung: bool = False
    slow: float = 0.0
    unhealthy: bool = False
    unready: bool = False
    stalled_since: float | None = None
    ignores_term: bool = False
    sticky: bool = False


@dataclass(slots=True)
class Machine:
    """A simulated node. `reachable` is whether the engine hears of it."""

    node: Node
    capacity: int | None = None
    reachable: bool = True
    agents: dict[str, Agent] = field(default_factory=dict)

    @property
    def free(self) -> bool:
        """Whether a new instance may be placed here."""
        return self.reachable and self.node.schedulable and (self.capacity is None or len(self.agents) < self.capacity)


@dataclass(slots=True, eq=False)
class Agent:
    """The truth about one instance. `view` is what the engine shows of it."""

    id: str
    fleet: str
    slot: int
    revision: int
    version: str
    created_at: float
    avoid: tuple[str, ...]
    phase: Phase = Phase.PENDING
    started_at: float | None = None
    ready: bool = False
    ready_at: float | None = None
    machine: Machine | None = None
    address: str | None = None
    restarts: int = 0
    exit_code: int | None = None
    life: int = 0
    """Counts the turns of its life, so that what was scheduled for an earlier turn is recognised and dropped."""
    stopping: bool = False
    restarting: bool = False
    order: tuple[str, float] | None = None
    """A stop or restart, with its grace, that waits for an unreachable node."""
    drain_began: float = 0.0
    drain_ends: float = 0.0
    condition: Condition | None = None
    log: list[str] | None = None
    view: Instance | None = None

    @property
    def runs(self) -> bool:
        """Whether its process exists."""
        return self.phase is Phase.RUNNING or self.phase is Phase.DRAINING

    @property
    def lost(self) -> bool:
        """Whether its node cannot be reached."""
        return self.machine is not None and not self.machine.reachable

    def look(self) -> Instance:
        """The instance as the engine shows it now."""
        lost = self.lost
        return Instance(
            id=self.id,
            fleet=self.fleet,
            slot=self.slot,
            revision=self.revision,
            version=self.version,
            phase=Phase.LOST if lost else self.phase,
            created_at=self.created_at,
            started_at=self.started_at,
            ready=self.ready and not lost and not (self.condition is not None and self.condition.unready),
            ready_at=self.ready_at,
            node=self.machine.node.name if self.machine else None,
            address=self.address,
            restarts=self.restarts,
            exit_code=self.exit_code,
        )

    def ail(self) -> Condition:
        """Its condition, to be changed."""
        if self.condition is None:
            self.condition = Condition()
        return self.condition

    def write(self, at: float, line: str) -> None:
        """Add a line to its log."""
        if self.log is None:
            self.log = []
        elif len(self.log) >= 2 * LOG_LINES:  # trimmed by halves, so that a line costs O(1)
            del self.log[:LOG_LINES]
        self.log.append(f"{at:.3f} {line}")
