"""What a fleet journals about its actions, as Kubernetes Events: `kubectl describe` says what was done and why.

Pure: an event of the journal goes in, the body of an Event comes out. The body is core/v1's with what
`events.k8s.io/v1` asks for (`eventTime`, `action`, `reportingComponent`, `reportingInstance`), as client-go's recorder
writes it today: repeats are counted in `count` and `lastTimestamp`, which every version of kubectl shows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.objects import Meta
from agentfleet.events import Event

_MOST_BYTES = 1024
"""The API refuses a longer message (`noteLengthLimit` of its validation)."""
_MOST_NAME = 200
"""An Event's name is that of its object and a suffix, 253 in all."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What is to be told about one object."""

    at: float
    """Seconds since the epoch."""
    seq: int
    fleet: str
    instance: str | None
    reason: str
    action: str
    warning: bool
    message: str


@dataclass(frozen=True, slots=True)
class Regarding:
    """The object that an Event is about."""

    kind: str
    """"Pod" or "Deployment"."""
    namespace: str
    name: str
    uid: str

    def to_dict(self) -> dict[str, str]:
        """As an ObjectReference."""
        version = "apps/v1" if self.kind == "Deployment" else "v1"
        return {
            "apiVersion": version,
            "kind": self.kind,
            "namespace": self.namespace,
            "name": self.name,
            "uid": self.uid,
        }


def regarding(kind: str, metadata: Meta) -> Regarding:
    """An object that has been seen."""
    return Regarding(kind, metadata.namespace, metadata.name, metadata.uid)


@dataclass(frozen=True, slots=True)
class _Kind:
    reason: str
    action: str
    text: str
    """With the fields of the event's data by name."""
    warning: bool = False


KINDS: Mapping[str, _Kind] = {
    "fleet.deployed": _Kind("Deployed", "Deploy", "{replicas} instances of revision {revision} are wanted"),
    "fleet.scaled": _Kind("Scaled", "Scale", "size {from} becomes {to}, by {by}"),
    "fleet.foreign_change": _Kind("ForeignChange", "Adopt", "adopted what {by} has changed: {what}"),
    "scaling.contested": _Kind("ScalingContested", "Hold", "{by} scales this fleet, too", warning=True),
    "scaling.uncontested": _Kind("ScalingUncontested", "Scale", "the size is the autoscaler's again"),
    "fleet.stopped": _Kind("Stopped", "Stop", "the fleet is stopped; its size is remembered"),
    "fleet.started": _Kind("Started", "Start", "the fleet is started with {replicas} instances"),
    "fleet.paused": _Kind("Paused", "Pause", "rollouts are held until they are resumed"),
    "fleet.resumed": _Kind("Resumed", "Resume", "rollouts go on"),
    "fleet.deleted": _Kind("Deleted", "Delete", "the fleet is deleted"),
    "instance.unhealthy": _Kind("VerdictUnhealthy", "Judge", "unhealthy", warning=True),
    "instance.recovered": _Kind("Recovered", "Judge", "healthy again after {seconds} s"),
    "instance.exited": _Kind("Exited", "Observe", "its process has ended with exit code {exit_code}", warning=True),
    "instance.lost": _Kind("NodeLost", "Observe", "its node {node} cannot be reached", warning=True),
    "instance.removing": _Kind("Removing", "Remove", "told to finish its work and go; cause: {cause}"),
    "instance.isolated": _Kind("Isolated", "Isolate", "set apart for examination: {reason}"),
    "instance.released": _Kind("Released", "Release", "set apart no longer: {reason}"),
    "action.failed": _Kind("ActionFailed", "Act", "{action} failed: {message}", warning=True),
    "rollout.started": _Kind("RolloutStarted", "RollOut", "{cause} to revision {revision}"),
    "rollout.completed": _Kind("RolloutCompleted", "RollOut", "revision {revision} is everywhere after {seconds} s"),
    "rollout.failed": _Kind("RolloutFailed", "RollOut", "revision {revision} did not work out", warning=True),
    "rollout.rolled_back": _Kind("RolledBack", "RollBack", "revision {from} is given up for {to}", warning=True),
    "recovery.restart": _Kind("RecoveryRestart", "Restart", "restarted", warning=True),
    "recovery.replace": _Kind("RecoveryReplace", "Replace", "replaced", warning=True),
    "recovery.elsewhere": _Kind("RecoveryElsewhere", "Replace", "to be replaced on another node", warning=True),
    "elsewhere.ready": _Kind("ElsewhereReady", "Replace", "{by} on {to} takes its place"),
    "elsewhere.failed": _Kind("ElsewhereFailed", "Replace", "nothing on another node, so it is {then}", warning=True),
    "elsewhere.called_off": _Kind("ElsewhereCalledOff", "Replace", "not to be replaced on another node any more"),
    "recovery.roll_back": _Kind("RecoveryRollBack", "RollBack", "its revision is given up", warning=True),
    "recovery.ask": _Kind("RecoveryAsk", "Ask", "a human is needed", warning=True),
    "governor.held": _Kind("Held", "Hold", "{action} must wait"),
    "governor.frozen": _Kind("Frozen", "Freeze", "nothing more is disrupted", warning=True),
    "governor.thawed": _Kind("Thawed", "Thaw", "disruptions may go ahead again"),
    "config.delivered": _Kind("ConfigDelivered", "Configure", "all have answered for configuration {revision}"),
    "config.refused": _Kind("ConfigRefused", "Configure", "configuration {revision} was refused: {why}", warning=True),
}
"""Which kinds of the journal are told. What a kubelet or a Deployment says itself (a pod was made, is ready) is not."""


class _Known(dict[str, Any]):
    """Data of an event, whatever it lacks."""

    def __missing__(self, key: str) -> str:
        return "?"


def notice_of(event: Event) -> Notice | None:
    """What is to be told of an event; None for those that are no action, or that the cluster tells by itself."""
    kind = KINDS.get(event.kind)
    if kind is None:
        return None
    known = _Known({key: _written(value) for key, value in event.data.items()})
    reasons = (str(reason.get("text", "")).rstrip(".") for reason in event.reasons)
    message = ": ".join(part for part in (kind.text.format_map(known), "; ".join(filter(None, reasons))) if part)
    return Notice(
        event.at, event.seq, event.fleet, event.instance, kind.reason, kind.action, kind.warning, _cut(message)
    )


def body_of(notice: Notice, regarding: Regarding, reporter: str) -> dict[str, Any]:
    """A notice as the body of a new core/v1 Event.

    Args:
        notice: What to say.
        regarding: About which object. A notice about an instance that is told about its Deployment names the instance.
        reporter: Who says it: the manager's own name, such as its pod's.
    """
    at = dt.datetime.fromtimestamp(notice.at, dt.UTC)
    whole = f"{at:%Y-%m-%dT%H:%M:%SZ}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{regarding.name[:_MOST_NAME]}.{int(notice.at * 1e6):x}.{notice.seq:x}",
            "namespace": regarding.namespace,
            "labels": {naming.FLEET: notice.fleet},
        },
        "involvedObject": regarding.to_dict(),
        "reason": notice.reason,
        "action": notice.action,
        "message": message_about(notice, regarding),
        "type": "Warning" if notice.warning else "Normal",
        "source": {"component": naming.MANAGER, "host": reporter},
        "reportingComponent": naming.MANAGER,
        "reportingInstance": reporter[:128],
        "eventTime": f"{at:%Y-%m-%dT%H:%M:%S.%f}Z",
        "firstTimestamp": whole,
        "lastTimestamp": whole,
        "count": 1,
    }


def repeat_of(notice: Notice, count: int) -> dict[str, Any]:
    """What to merge into an Event that has been written when the same happens again.

    Args:
        notice: The latest.
        count: How often it has happened in all.
    """
    return {"count": count, "lastTimestamp": f"{dt.datetime.fromtimestamp(notice.at, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"}


def message_about(notice: Notice, regarding: Regarding) -> str:
    """The message, which says the instance's name where the Event is not about its pod."""
    if notice.instance is None or regarding.name == notice.instance:
        return notice.message
    return _cut(f"{notice.instance}: {notice.message}")


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    """At most as many bytes as the API takes."""
    coded = text.encode(errors="replace")
    return coded.decode() if len(coded) <= _MOST_BYTES else coded[: _MOST_BYTES - 3].decode(errors="ignore") + "…"
