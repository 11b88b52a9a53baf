"""What is done to single pods: evicted, deleted, isolated. Every request carries the uid that it was decided on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.errors import Invalid
from agentfleet.backends.kubernetes.objects import Pod
from agentfleet.backends.kubernetes.resources import PODS
from agentfleet.errors import InstanceGone
from agentfleet.instances import Isolation

_FIRST_WITH_V1 = 22
"""The 1.Y of Kubernetes from which evictions are of policy/v1."""


async def evict(connection: Requests, pod: Pod, *, grace: float, minor: int) -> None:
    """End a pod unless its disruption budget forbids it.

    Args:
        connection: How the API server is asked.
        pod: Which; another of the same name is left alone.
        grace: Seconds for its drain.
        minor: Y of the server's version 1.Y.

    Raises:
        DisruptionBlocked: The budget is used up; nothing was done.
        InstanceGone: It is gone, perhaps for another of its name.
        BackendError: As `Connection.request`.
    """
    meta = pod.metadata
    eviction = {
        "apiVersion": "policy/v1" if minor >= _FIRST_WITH_V1 else "policy/v1beta1",
        "kind": "Eviction",
        "metadata": {"name": meta.name, "namespace": meta.namespace},
        "deleteOptions": _options(pod, grace),
    }
    path = PODS.path(meta.namespace, meta.name, "eviction")
    await connection.request("POST", path, body=json.dumps(eviction).encode())


async def delete(connection: Requests, pod: Pod, *, grace: float | None = None) -> None:
    """End a pod whatever its budget says, by default within its own grace; raises like `evict`, but for the budget."""
    path = PODS.path(pod.metadata.namespace, pod.metadata.name)
    await connection.request("DELETE", path, body=json.dumps(_options(pod, grace)).encode())


async def isolate(connection: Requests, pod: Pod, selector: Mapping[str, str], isolation: Isolation) -> None:
    """Take a pod out of the selector: its Service sends it nothing more, and its ReplicaSet replaces it.

    No more labels are changed than that takes: network policies should go on to hold for it.

    Args:
        connection: How the API server is asked.
        pod: Which.
        selector: The labels by which the Deployment and its Service know their pods; some may be unknown.
        isolation: Written on it, so that whoever finds it knows.

    Raises:
        InstanceGone: There is no such pod, or another has its name now.
        BackendError: As `Connection.request`.
    """
    old = pod.metadata.labels
    labels = {key: naming.label_of(f"isolated-{old.get(key, '')}") for key in naming.keys_apart(selector)}
    notes = {naming.ISOLATED_SINCE: _text(isolation.since), naming.ISOLATED_REASON: isolation.reason}
    if isolation.until is not None:
        notes[naming.ISOLATED_UNTIL] = _text(isolation.until)
    meta = {"labels": {**labels, naming.ISOLATED: "true"}, "annotations": notes}
    await relabel(connection, pod, meta)


async def relabel(connection: Requests, pod: Pod, metadata: Mapping[str, Any]) -> bytes:
    """Change what a pod's metadata says, by a merge patch, if it still is that pod; returns the answer.

    Raises:
        InstanceGone: There is no such pod, or another has its name now.
        BackendError: As `Connection.request`.
    """
    try:
        return await connection.request(
            "PATCH",
            PODS.path(pod.metadata.namespace, pod.metadata.name),
            query={"fieldManager": naming.MANAGER},
            body=json.dumps({"metadata": {"uid": pod.metadata.uid, **metadata}}).encode(),
            content_type=MERGE_PATCH,
        )
    except Invalid as error:
        if "metadata.uid" not in error.fields:  # so the server says, too, that another has its name
            raise
        raise InstanceGone(f"another pod has the name {pod.metadata.name} now") from error


def _options(pod: Pod, grace: float | None) -> dict[str, Any]:
    within = {} if grace is None else {"gracePeriodSeconds": math.ceil(grace)}
    return {**within, "preconditions": {"uid": pod.metadata.uid}}


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
