"""Probes that are answered by the simulation: no sockets, and no waiting unless the instance is slow."""

from __future__ import annotations

from collections.abc import Callable

from agentfleet.backends.memory.agent import Agent, Load
from agentfleet.backends.memory.world import World
from agentfleet.core.evidence import Probed
from agentfleet.instances import AgentStatus, Instance, Phase
from agentfleet.signals.probes import call_check
from agentfleet.specs import Check, CustomCheck, HeartbeatCheck, HttpCheck, TcpCheck

_QUICK = 0.002
"""Seconds that a healthy answer is said to have taken."""


class MemoryProber:
    """Probes simulated instances as a network client would: by what it was told of them.

    A process that has ended or moved refuses the connection; a lost node or a hung process answers nothing until the
    deadline; an unhealthy one answers 503. The kernel accepts TCP for a hung process too, so a TCP check does not see
    a hang. A custom check is called like anywhere else, and knows nothing of faults but what it asks for itself.
    """

    def __init__(self, world: World, load: Callable[[Agent, float], Load]) -> None:
        self._world = world
        self._load = load

    async def probe(
        self,
        instance: Instance,
        index: int,
        check: Check,
        credential: str | None = None,  # noqa: ARG002 - simulated agents ask for no token
    ) -> Probed:
        """Probe once.

        Args:
            instance: What to probe, as last seen.
            index: The check's position in the policy, copied to the answer.
            check: An HTTP, TCP or custom check.
            credential: Not looked at.

        Returns:
            The answer. A failure of whatever kind is a failed probe, never an exception.
        """
        began = self._world.advance()
        if isinstance(check, HeartbeatCheck):
            return Probed(index, False, began, error="heartbeats come by themselves and cannot be asked for")
        if isinstance(check, CustomCheck):
            error = await call_check(check, instance)
            now = self._world.advance()
            return Probed(index, error is None, now, now - began, error=error)
        latency = self._latency(instance, check)
        if latency > check.deadline:
            await self._world.clock.sleep(check.deadline)
            now = self._world.clock.now()
            return Probed(index, False, now, now - began, error=f"no answer within {check.deadline:g} s")
        if latency > _QUICK:
            await self._world.clock.sleep(latency)
        now = self._world.advance()
        error, status = self._answer(instance, check, now)
        return Probed(index, error is None, now, latency, error=error, status=status)

    def _agent(self, instance: Instance) -> Agent | None:
        """The agent at the instance's address, if a process listens there."""
        agent = self._world.agents.get(instance.id)
        return agent if agent is not None and agent.runs and agent.address == instance.address else None

    def _latency(self, instance: Instance, check: HttpCheck | TcpCheck) -> float:
        agent = self._world.agents.get(instance.id)
        if agent is not None and agent.lost:
            return float("inf")
        agent = self._agent(instance)
        if agent is None or agent.condition is None or isinstance(check, TcpCheck):
            return _QUICK
        return float("inf") if agent.condition.hung else max(_QUICK, agent.condition.slow)

    def _answer(
        self, instance: Instance, check: HttpCheck | TcpCheck, now: float
    ) -> tuple[str | None, AgentStatus | None]:
        agent = self._agent(instance)
        if agent is None:
            return "connection refused", None
        if isinstance(check, TcpCheck):
            return None, None
        path = check.path.partition("?")[0]
        status = self._status(agent, now) if path == "/status" else None
        sick = agent.condition is not None and agent.condition.unhealthy
        if sick or (path == "/ready" and not agent.ready):
            return "HTTP 503", status
        return None, status

    def _status(self, agent: Agent, now: float) -> AgentStatus:
        load = self._load(agent, now)
        stalled = agent.condition.stalled_since if agent.condition is not None else None
        in_flight = load.in_flight if stalled is None else max(1, load.in_flight)
        working = "busy" if in_flight else "idle"
        return AgentStatus(
            state="draining" if agent.phase is Phase.DRAINING else working,
            in_flight=in_flight,
            queue_length=load.queue_length,
            last_progress=0.0 if stalled is None else now - stalled,
            version=agent.version,
        )
