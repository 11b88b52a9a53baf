"""What a test may do to fake nodes and their pods; the same whether they live here or in a process of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agentfleet.testing.kube.behaviour import Behaviour


@dataclass(frozen=True, slots=True)
class PodSeen:
    """A pod as its node sees it.

    Attributes:
        name: "namespace/name".
        stage: "ContainerCreating", "Running", "CrashLoopBackOff", …
        ports: Where it listens, when it runs.
    """

    name: str
    uid: str
    node: str
    address: str
    ports: tuple[int, ...]
    stage: str
    ready: bool
    restarts: int
    in_flight: int
    image: str


class NodeFaults(ABC):
    """Commands to fake nodes. Pods are named "namespace/name"; an unknown one raises `InstanceGone`."""

    @abstractmethod
    async def _do(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Carry out one command; arguments and answer are JSON values."""

    async def node_gone(self, node: str, *, answering: bool = True) -> None:
        """Cut a node off the control plane: no leases, no statuses, no orders. Its pods run on, unseen.

        Args:
            node: Its name.
            answering: Whether its pods still answer HTTP; otherwise they are silent, as behind a dead network.
        """
        await self._do("node_gone", {"node": node, "answering": answering})

    async def node_back(self, node: str) -> None:
        """A node is back, with the pods it had: those that were deleted meanwhile are ended, the others reported."""
        await self._do("node_back", {"node": node})

    async def crash(self, *pods: str, exit_code: int = 1, reason: str = "Error") -> None:
        """A container of each pod ends now, and is restarted as its pod's policy says, with back-off."""
        await self._do("crash", {"pods": pods, "exit_code": exit_code, "reason": reason})

    async def oom(self, *pods: str) -> None:
        """A container of each pod is killed for its memory."""
        await self.crash(*pods, exit_code=137, reason="OOMKilled")

    async def crash_loop(self, *pods: str, after: float = 0.1, exit_code: int = 1) -> None:
        """Each pod crashes now, and again `after` seconds whenever it is restarted, until it is healed."""
        await self._do("crash_loop", {"pods": pods, "after": after, "exit_code": exit_code})

    async def image(self, pattern: str, behaviour: Behaviour | None) -> None:
        """Give images whose names match a shell pattern a behaviour, for pods that start from now on.

        None takes the rule back; pods whose image could not be pulled then start.
        """
        await self._do("image", {"pattern": pattern, "behaviour": behaviour and asdict(behaviour)})

    async def unready(self, *pods: str) -> None:
        """Each pod stops being ready: its condition, and /ready. It runs on."""
        await self._do("unready", {"pods": pods})

    async def sick(self, *pods: str) -> None:
        """/health of each pod answers 503."""
        await self._do("sick", {"pods": pods})

    async def hang(self, *pods: str) -> None:
        """Each pod accepts connections and answers nothing."""
        await self._do("hang", {"pods": pods})

    async def heal(self, *pods: str) -> None:
        """Take back whatever was done to each pod."""
        await self._do("heal", {"pods": pods})

    async def busy(self, *pods: str, in_flight: int = 1) -> None:
        """Each pod says that so many tasks are in flight; it does not end before its grace is over. 0: it is idle."""
        await self._do("busy", {"pods": pods, "in_flight": in_flight})

    async def pods(self) -> list[PodSeen]:
        """Every pod on these nodes."""
        return [PodSeen(**each | {"ports": tuple(each["ports"])}) for each in await self._do("pods", {})]

    async def killed_busy(self) -> list[str]:
        """The pods that were ended while work was in flight, ever, in their order."""
        found: list[str] = await self._do("killed_busy", {})
        return found

    async def problems(self) -> list[str]:
        """Statuses that the API server refused, the last thousand: there should be none."""
        found: list[str] = await self._do("problems", {})
        return found

    async def cost(self) -> dict[str, float]:
        """What this kubelet has done: status patches, deletions, lists, and the CPU seconds of its process."""
        found: dict[str, float] = await self._do("cost", {})
        return found
