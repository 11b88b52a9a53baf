"""Stand-ins: pods of our own making that wait, away from a node, to take the place of another in its ReplicaSet.

The scheduler goes by what a pod says, and no ReplicaSet makes one that says anything else than its template. So the
pod is made from that template here, with the node excluded, and with labels that neither ReplicaSet nor Service nor
disruption budget selects. When it is ready it is given the labels and the controller of the pod that it stands in for,
and that one ends.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterable, Mapping
from random import SystemRandom
from typing import Any, Protocol

import msgspec

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.affinity import away_from
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.marking import FIRST_WITH_COST, mark_one
from agentfleet.backends.kubernetes.objects import Meta, Owner, Pod
from agentfleet.backends.kubernetes.resources import PODS, REPLICA_SETS, decode
from agentfleet.backends.kubernetes.singles import relabel
from agentfleet.errors import BackendRefused, InstanceGone

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
"""What Kubernetes' own generated names are made of."""
_MOST_BASE = 57
"""Characters of a generated name before its five letters and the hyphen."""


_ENDED = ("Succeeded", "Failed")
_PHASES = ("Pending", "Unknown", "Running")
"""The phases of pods that have not ended, in the order in which they go."""


class End(Protocol):
    """Ends a pod."""

    def __call__(self, *, replaced: bool) -> Awaitable[None]:
        """End it, with its successor in its place or before that."""
        ...


class _ReplicaSetSpec(msgspec.Struct):
    template: dict[str, Any]


class _ReplicaSet(msgspec.Struct):
    metadata: Meta
    spec: _ReplicaSetSpec


async def make(connection: Requests, pod: Pod, selector: Mapping[str, str], deployment: Meta, *, node: str) -> None:
    """Make a stand-in for a pod.

    Args:
        connection: How the API server is asked.
        pod: Which.
        selector: The labels by which the Deployment and its Service know their pods.
        deployment: The fleet's Deployment, with which the stand-in is deleted.
        node: The node to keep away from.

    Raises:
        InstanceGone: The pod is in no ReplicaSet (any more).
        BackendRefused: Its template names the node itself, or the server does not take the stand-in.
        BackendError: As `Connection.request`.
    """
    owner = _replica_set(pod)
    path = REPLICA_SETS.path(pod.metadata.namespace, owner.name)
    found = decode(msgspec.json.Decoder(_ReplicaSet).decode, await connection.request("GET", path), path)
    if found.metadata.uid != owner.uid:
        raise InstanceGone(f"the ReplicaSet of pod {pod.metadata.name} is gone, and another has its name")
    body = manifest(pod, found.spec.template, selector, deployment, node=node)
    await connection.request(
        "POST",
        PODS.path(pod.metadata.namespace),
        query={"fieldManager": naming.MANAGER},
        body=json.dumps(body).encode(),
    )


def manifest(
    pod: Pod, template: Mapping[str, Any], selector: Mapping[str, str], deployment: Meta, *, node: str
) -> dict[str, Any]:
    """A stand-in as it is made; see `make`.

    Args:
        pod: Whose place it is to take.
        template: Its ReplicaSet's pod template.
        selector: As in `make`.
        deployment: As in `make`.
        node: As in `make`.

    Raises:
        BackendRefused: The template names the node that its pods run on, past the scheduler.
    """
    metadata, spec = template.get("metadata") or {}, template.get("spec") or {}
    if spec.get("nodeName"):
        raise BackendRefused(
            f"pod {pod.metadata.name} cannot be placed elsewhere: its template binds it to node {spec['nodeName']}"
            " by nodeName; use a node selector there instead"
        )
    labels = dict(metadata.get("labels") or {})
    apart = {key: naming.label_of(f"stand-in-{labels.get(key, '')}") for key in naming.keys_apart(selector)}
    notes = {naming.STANDS_IN_FOR: pod.metadata.name, naming.STANDS_IN_UID: pod.metadata.uid}
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment.name, "uid": deployment.uid}
    random = SystemRandom()
    base = _replica_set(pod).name[:_MOST_BASE]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **metadata,
            "name": f"{base}-{''.join(random.choice(_LETTERS) for _ in range(5))}",
            "namespace": pod.metadata.namespace,
            "labels": {**labels, **apart, naming.STAND_IN: "true"},
            "annotations": {**(metadata.get("annotations") or {}), **notes},
            "ownerReferences": [owner],
        },
        "spec": {**spec, "affinity": away_from(spec.get("affinity"), node)},
    }


async def exchange(
    connection: Requests,
    seen: Informer[Pod],
    pod: Pod,
    stand_in: Pod,
    selector: Mapping[str, str],
    *,
    minor: int,
    end: End,
) -> None:
    """Have a stand-in take a pod's place, and end that one.

    The ReplicaSet should see the newcomer first, so that it makes none of its own; but then it ends one by itself.
    Where that might be another than this pod, the pod ends first: what the ReplicaSet begins in its place goes at once
    then, as it runs nowhere yet.

    Args:
        connection: How the API server is asked.
        seen: The pods as they are seen.
        pod: The one that ends.
        stand_in: The one that takes its place.
        selector: As in `make`.
        minor: Y of the server's version 1.Y.
        end: Ends the pod; told whether its successor is in place.

    Raises:
        InstanceGone: One of the two is gone, or they do not belong together.
        BackendError: As `Connection.request`; the stand-in may have taken the place.
    """
    owner = _replica_set(pod)
    if stand_in.metadata.controller == owner:  # so it was told before, and the answer was lost
        await end(replaced=True)
        return
    if not stands_in(stand_in, pod):
        raise InstanceGone(f"pod {stand_in.metadata.name} does not stand in for pod {pod.metadata.name}")
    others = (each for each in seen.cache.values() if each.metadata.controller == owner)
    if not would_go(pod, [*others, stand_in], minor=minor):
        await end(replaced=False)
        await _take_place(connection, pod, stand_in, selector, owner)
        return
    if minor >= FIRST_WITH_COST:
        version = await mark_one(connection, pod)
        if version is None:
            raise InstanceGone(f"pod {pod.metadata.name} is gone, or another has its name")
        await seen.wait_for(version)
    await _take_place(connection, pod, stand_in, selector, owner)
    await end(replaced=True)


def would_go(pod: Pod, others: Iterable[Pod], *, minor: int) -> bool:
    """Whether a ReplicaSet that has one too many would end just this pod, if it is marked as one to go.

    Args:
        pod: Which.
        others: All of the ReplicaSet, this one among them or not.
        minor: Y of the server's version 1.Y; before 1.21 no mark is heeded.
    """
    marked = minor >= FIRST_WITH_COST
    rank = (*_worth(pod), not marked)
    uid = pod.metadata.uid
    staying = (each for each in others if each.metadata.uid != uid and _counts(each))
    return all(rank < (*_worth(each), True) for each in staying)


def _counts(pod: Pod) -> bool:
    """Whether a ReplicaSet counts a pod: those that have ended lie about until somebody deletes them."""
    return pod.metadata.deletion_timestamp is None and pod.status.phase not in _ENDED


def _worth(pod: Pod) -> tuple[bool, int, bool]:
    """What a ReplicaSet goes by first: placed or not, pending or running, ready or not."""
    phase = pod.status.phase
    return bool(pod.spec.node_name), _PHASES.index(phase) if phase in _PHASES else 0, pod.ready


def stands_in(stand_in: Pod, pod: Pod) -> bool:
    """Whether a pod waits for the place of just this other one."""
    notes = stand_in.metadata.annotations
    waits = stand_in.metadata.labels.get(naming.STAND_IN) == "true"
    return waits and _counts(stand_in) and notes is not None and notes.stands_in_uid == pod.metadata.uid


async def _take_place(connection: Requests, pod: Pod, stand_in: Pod, selector: Mapping[str, str], owner: Owner) -> None:
    """Give a stand-in labels and controller at once: there is no moment in which it is without."""
    labels = {key: pod.metadata.labels.get(key) for key in naming.keys_apart(selector)}
    controller = {
        "apiVersion": "apps/v1",
        "kind": owner.kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
    }
    meta = {
        "labels": {**labels, naming.STAND_IN: None},
        "annotations": {naming.STANDS_IN_FOR: None, naming.STANDS_IN_UID: None},
        "ownerReferences": [controller],
    }
    await relabel(connection, stand_in, meta)


async def discard(connection: Requests, stand_in: Pod) -> None:
    """End a stand-in, with its drain, if it has not changed since it was seen: it may be a member by now.

    Raises:
        Conflict: It has; look at it again.
        InstanceGone: It is gone.
        BackendError: As `Connection.request`.
    """
    meta = stand_in.metadata
    options = {"preconditions": {"uid": meta.uid, "resourceVersion": meta.resource_version}}
    path = PODS.path(meta.namespace, meta.name)
    await connection.request("DELETE", path, body=json.dumps(options).encode())


def _replica_set(pod: Pod) -> Owner:
    owner = pod.metadata.controller
    if owner is None or owner.kind != "ReplicaSet" or not _counts(pod):
        raise InstanceGone(f"pod {pod.metadata.name} is in no ReplicaSet (any more)")
    return owner
