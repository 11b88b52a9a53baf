"""One pod as its node sees it: which stage it is in, and the status that a kubelet would report for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from agentfleet.testing.kube.behaviour import Behaviour
from agentfleet.testing.kube.podagent import PodAgent, Vitals
from agentfleet.testing.kube.podview import Pod


class Stage(Enum):
    """Where the pod's leading container is in its life."""

    CREATING = "ContainerCreating"
    PULL_FAILED = "ErrImagePull"
    PULL_BACKOFF = "ImagePullBackOff"
    START_FAILED = "RunContainerError"
    CONFIG_FAILED = "CreateContainerConfigError"
    """A Secret or a ConfigMap is missing that its variables come from."""
    RUNNING = "Running"
    CRASHED = "Terminated"
    BACKOFF = "CrashLoopBackOff"
    ENDED = "Ended"
    """It has ended and is not restarted."""
    STOPPED = "Stopped"
    """It has ended because the pod was deleted; the object may go."""


_WAITING = {
    Stage.CREATING,
    Stage.PULL_FAILED,
    Stage.PULL_BACKOFF,
    Stage.START_FAILED,
    Stage.CONFIG_FAILED,
    Stage.BACKOFF,
}


class PodRun:
    """What runs for one pod. The kubelet moves it from stage to stage; this computes what is reported."""

    def __init__(self, view: Pod, node: str, host: str, address: str, *, lead: int, behaviour: Behaviour) -> None:
        self.view = view
        self.node = node
        self.host = host
        self.address = address
        self.lead = lead
        """Which of its containers the behaviour is about; the others just run."""
        self.behaviour = behaviour
        self.stage = Stage.CREATING
        self.message = ""
        self.app_ready = False
        self.decreed: bool | None = None
        """Readiness that a test has decreed."""
        self.restarts = 0
        self.streak = 0
        """Crashes in a row, as the back-off counts them."""
        self.stopping = False
        self.grace = 0.0
        self.vitals = Vitals()
        self.agent: PodAgent | None = None
        self.timers: list[asyncio.TimerHandle] = []
        self.missing: Mapping[int, str] = {}
        """Why containers cannot be made, by their place; the others wait with them."""
        self.turn = 0
        """Grows when what was to come is called off: an answer that was asked for in an earlier turn comes too late."""
        self.sent: Mapping[str, Any] | None = None
        self._created = now()
        self._started = ""
        self._begun = False
        self._last: dict[str, Any] = {}
        self._since: dict[str, tuple[bool, str]] = {}

    @property
    def name(self) -> str:
        """Namespace and name."""
        return self.view.name

    @property
    def ready(self) -> bool:
        """Whether its containers are ready."""
        ready = self.app_ready if self.decreed is None else self.decreed
        return self.stage is Stage.RUNNING and ready

    @property
    def ports(self) -> set[int]:
        """The ports that its containers declare; 8080 where none does."""
        return {port.container_port for each in self.view.spec.containers for port in each.ports} or {8080}

    def started(self) -> None:
        """The container runs."""
        self.stage, self.message, self._begun, self._started = Stage.RUNNING, "", True, now()

    def crashed(self, exit_code: int, reason: str, stage: Stage) -> None:
        """The container has ended."""
        self._last = {
            "exitCode": exit_code,
            "reason": reason,
            "startedAt": self._started,
            "finishedAt": now(),
            "containerID": self._container_id(self.lead, self.restarts),
        }
        self.stage, self.app_ready = stage, False

    def status(self) -> dict[str, Any]:
        """What the kubelet reports."""
        containers = [self._container(index) for index in range(len(self.view.spec.containers))]
        contained = all(each["ready"] for each in containers)
        told: dict[str, Any] = {
            "phase": self._phase(),
            "hostIP": self.host,
            "startTime": self._created,
            "conditions": [
                self._condition("Initialized", holds=True),
                self._condition("ContainersReady", holds=contained, why="ContainersNotReady"),
                self._condition(
                    "Ready",
                    holds=contained and self.view.gates_open,
                    why="ReadinessGatesNotReady" if contained else "ContainersNotReady",
                ),
            ],
            "containerStatuses": containers,
        }
        if self._begun:
            told |= {"podIP": self.address, "podIPs": [{"ip": self.address}]}
        return told

    def _phase(self) -> str:
        if self.stage is Stage.ENDED:
            return "Succeeded" if self._last.get("exitCode") == 0 else "Failed"
        return "Running" if self._begun else "Pending"

    def _condition(self, kind: str, *, holds: bool, why: str = "") -> dict[str, Any]:
        held, since = self._since.get(kind, (None, ""))
        if held is not holds:
            since = now()
            self._since[kind] = (holds, since)
        made: dict[str, Any] = {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": since}
        told = {"ContainersNotReady": "containers are not ready", "ReadinessGatesNotReady": "a gate is not True"}
        # null takes the fields of an earlier, worse status away
        return made | {"reason": None if holds else why, "message": None if holds else told.get(why, why)}

    def _container(self, index: int) -> dict[str, Any]:
        spec = self.view.spec.containers[index]
        leads = index == self.lead
        state = self._state_of(index)
        restarts = self.restarts if leads else 0
        made = {
            "name": spec.name,
            "image": spec.image,
            "imageID": f"fake://{spec.image}" if "waiting" not in state else "",
            "ready": self.ready if leads else self.stage is not Stage.CREATING and "running" in state,
            "started": "running" in state,
            "restartCount": restarts,
            "state": state,
            "lastState": {"terminated": self._last} if leads and self._last and "terminated" not in state else {},
        }
        if "waiting" not in state or self._begun:
            made["containerID"] = self._container_id(index, restarts)
        return made

    def _state_of(self, index: int) -> dict[str, Any]:
        if self.stage is Stage.CONFIG_FAILED:
            if (why := self.missing.get(index)) is None:
                return {"waiting": {"reason": Stage.CREATING.value}}
            return {"waiting": {"reason": self.stage.value, "message": why}}
        return self._state() if index == self.lead else self._neighbour()

    def _state(self) -> dict[str, Any]:
        if self.stage in _WAITING:
            reason = self.stage.value
            return {"waiting": {"reason": reason, "message": self.message} if self.message else {"reason": reason}}
        if self.stage is Stage.RUNNING:
            return {"running": {"startedAt": self._started}}
        return {"terminated": self._last}

    def _neighbour(self) -> dict[str, Any]:
        if self.stage in {Stage.CREATING, Stage.START_FAILED}:
            return {"waiting": {"reason": "ContainerCreating"}}
        if self.stage in {Stage.ENDED, Stage.STOPPED}:
            return {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": self._last.get("finishedAt")}}
        return {"running": {"startedAt": self._created}}

    def _container_id(self, index: int, restarts: int) -> str:
        return f"fake://{self.view.metadata.uid}/{index}/{restarts}"


def now() -> str:
    """This moment, as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
