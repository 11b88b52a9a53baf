"""What a guarded write says beside its own word: the version and uid that it is based on, and the epoch of its term.

Pure functions from bodies to bodies; `guard` sends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from agentfleet.backends.kubernetes import apply, naming
from agentfleet.backends.kubernetes.objects import Annotations, Time
from agentfleet.backends.kubernetes.resources import decode

EPOCH = "agentfleet.io/epoch"
"""The annotation on a fleet's objects: the epoch of who wrote them last."""
_OURS = (naming.MANAGER, naming.CONFIG_MANAGER)
"""The field managers whose applies say the epoch."""


class _Meta(msgspec.Struct, rename="camel"):
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: Time | None = None
    annotations: Annotations | None = None
    managed_fields: list[dict[str, Any]] = []


class _Object(msgspec.Struct):
    metadata: _Meta = msgspec.field(default_factory=_Meta)


_read = msgspec.json.Decoder(_Object).decode


@dataclass(frozen=True, slots=True)
class Stand:
    """As much of an object as it takes to base the next write on it."""

    version: str
    uid: str
    epoch: int
    leaving: bool
    fields: tuple[Mapping[str, Any], ...]
    """Who has written which fields."""

    @classmethod
    def of(cls, answer: bytes) -> Self:
        """What an answer shows; raises `BackendUnavailable` if it cannot be read."""
        metadata = decode(_read, answer, "one of the fleet's objects").metadata
        epoch = None if metadata.annotations is None else metadata.annotations.epoch
        return cls(
            metadata.resource_version,
            metadata.uid,
            int(epoch) if epoch is not None and epoch.isdecimal() else 0,
            metadata.deletion_timestamp is not None,
            tuple(metadata.managed_fields),
        )

    def stamped(self, epoch: int) -> dict[str, Any] | None:
        """The merge patch that gives it an epoch, and makes what we created as good as applied; None where it is so.

        Fields that a create has set count as somebody else's for the applies that follow: they could never take one
        back. So the record of it is made one of an apply, as client-go's `csaupgrade` does for kubectl.
        """
        applied = {each.get("manager") for each in self.fields if each.get("operation") == "Apply"}
        adopted = [
            {**each, "operation": "Apply"} if each.get("manager") in _OURS and each["manager"] not in applied else each
            for each in self.fields
        ]
        metadata: dict[str, Any] = {"resourceVersion": self.version}
        if adopted != list(self.fields):
            metadata["managedFields"] = adopted
        elif self.epoch >= epoch:
            return None
        return {"metadata": {**metadata, "annotations": {EPOCH: str(epoch)}}}


def based(
    method: str, content: Mapping[str, Any], known: Stand | None, given: Mapping[str, Any], epoch: int
) -> dict[str, Any]:
    """The body of a write to an object that was seen so, or not at all."""
    if method == "DELETE":
        seen = {} if known is None else {"resourceVersion": known.version, "uid": known.uid}
        wanted = {**seen, **content.get("preconditions", {})}  # another uid was meant: it is refused
        return {**content, "preconditions": wanted} if wanted else dict(content)
    metadata = dict(content.get("metadata", {}))
    applies = given["content_type"] == apply.CONTENT_TYPE
    if known is not None:
        metadata["resourceVersion"] = known.version
        if applies:
            metadata["uid"] = known.uid  # what is gone by then does not come back
    if applies and (given["query"] or {}).get("fieldManager") in _OURS:
        metadata["annotations"] = {**(metadata.get("annotations") or {}), EPOCH: str(epoch)}
    return {**content, "metadata": metadata}


def first_of(content: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """What is created of an object before it is applied: all, but a Deployment of which nothing is begun yet."""
    metadata = content.get("metadata", {})
    metadata = {**metadata, "annotations": {**(metadata.get("annotations") or {}), EPOCH: str(epoch)}}
    made = {**content, "metadata": metadata}
    if content.get("kind") == "Deployment":
        made["spec"] = {**content["spec"], "replicas": 0, "paused": True}
    return made


def uid_meant(method: str, content: Mapping[str, Any]) -> str | None:
    """The uid of the pod that a write is about."""
    return str(uid) if (uid := _pod_place(method, content).get("uid")) is not None else None


def decided_on_version(method: str, content: Mapping[str, Any]) -> bool:
    """Whether the deletion of a pod is meant for the version that it names, and for no later one."""
    return method == "DELETE" and "resourceVersion" in _pod_place(method, content)


def pod_based(method: str, content: Mapping[str, Any], version: str | None) -> dict[str, Any]:
    """The body of a write to a pod that was seen at a version."""
    if version is None:
        return dict(content)
    place = {**_pod_place(method, content), "resourceVersion": version}
    if method == "PATCH":
        return {**content, "metadata": place}
    if method == "POST":
        return {**content, "deleteOptions": {**content.get("deleteOptions", {}), "preconditions": place}}
    return {**content, "preconditions": place}


def _pod_place(method: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a write to a pod says which one it means."""
    if method == "PATCH":
        found = content.get("metadata", {})
    elif method == "POST":
        found = content.get("deleteOptions", {}).get("preconditions", {})
    else:
        found = content.get("preconditions", {})
    return found  # type: ignore[no-any-return]
