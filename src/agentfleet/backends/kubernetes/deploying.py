"""A Deployment is written upon what stands, not upon what has come since: each newer version is looked at first.

An affinity is taken away before the rest is applied, in a write of its own. The rollout is held in between; if the rest
is refused, all is put back as it was: a fleet must not stay held by half an order.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from agentfleet.backends.base import Workload
from agentfleet.backends.kubernetes import apply
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.rendering import Manifest
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.backends.kubernetes.retry import Backoff
from agentfleet.backends.kubernetes.sending import merge, send, version_in
from agentfleet.backends.kubernetes.standing import Standing, check_size, standing, standing_in
from agentfleet.clock import SystemClock
from agentfleet.errors import AgentFleetError, BackendRefused, Conflict

_TRIES = 8
"""Times that a write is based on a newer version: the status moves the version, too, several times in a rollout."""
_PAUSE = 0.1
"""Longest wait in seconds before the second try; it doubles, up to eight times as much."""

_Place = Mapping[str, str]
"""Which object a write is about, and which version of it."""
_T = TypeVar("_T")


async def deploy(
    to: Requests, manifest: Manifest, workload: Workload, now: Standing | None, *, back: Callable[[str, int], None]
) -> bytes:
    """Apply a Deployment upon what stands.

    Args:
        to: The way for writes.
        manifest: The Deployment.
        workload: What it says, to `check_size` with.
        now: What stands; None makes it.
        back: Told the fleet's name and the version at which it is again as it was, after half an order.

    Returns:
        The server's answer.

    Raises:
        Outdated: As `check_size`.
        Conflict: It was deleted meanwhile, or goes on changing: to be decided anew.
        BackendError: As `Connection.request`.
    """
    if now is None:
        return await send(to, apply.apply(manifest))
    if _to_be_cleared(manifest, now):
        return await _deploy_cleared(to, manifest, workload, now, back)
    return await _apply(to, manifest, workload, now)


async def _apply(to: Requests, manifest: Manifest, workload: Workload, now: Standing) -> bytes:
    async def write(_: Standing, place: _Place) -> bytes:
        return await send(to, apply.apply({**manifest, "metadata": {**manifest["metadata"], **place}}))

    return await _upon(to, manifest, workload, now, write)


async def _upon(
    to: Requests,
    manifest: Manifest,
    workload: Workload,
    now: Standing,
    write: Callable[[Standing, _Place], Awaitable[_T]],
) -> _T:
    """Write on the version that stands, and if that is old on the next one, as long as its size is the one known of.

    The last try, right after such a look, is on whatever version there is: of a Deployment whose status moves all the
    time no version lasts until it is written on, and a fleet must be told nevertheless.
    """
    metadata = manifest["metadata"]
    backoff = Backoff(SystemClock(), random.Random(), initial=_PAUSE, limit=8 * _PAUSE)  # noqa: S311 - jitter
    for left in reversed(range(_TRIES)):
        place = {"uid": now.uid, "resourceVersion": now.version} if left else {"uid": now.uid}
        try:
            return await write(now, place)
        except Conflict:
            if not left:
                raise
            await backoff.wait()
            found = await standing(to, metadata["namespace"], metadata["name"])
            if found is None or found.uid != now.uid:
                raise
            check_size(workload, found)
            now = found
    raise AssertionError("unreachable: the last try returns or raises")


def _to_be_cleared(manifest: Manifest, now: Standing) -> bool:
    """Whether there is an affinity that is to be another, or none."""
    return bool(now.affinity) and now.affinity != manifest["spec"]["template"]["spec"].get("affinity")


async def _deploy_cleared(
    to: Requests, manifest: Manifest, workload: Workload, now: Standing, back: Callable[[str, int], None]
) -> bytes:
    """Take away an affinity, and apply all upon that.

    Server-side apply takes back the terms and leaves empty objects around them, so that the template is not the one
    that it was before, and going back to it makes new pods. The rollout is held meanwhile, in the same write: nothing
    is made of the template in between, and the apply that follows says whether it goes on.
    """
    before = now

    async def clear(upon: Standing, place: _Place) -> Standing:
        nonlocal before
        if not _to_be_cleared(manifest, upon):
            return upon
        before = upon
        answer = await _merge(to, manifest, place, paused=True, affinity=None)
        return standing_in(answer, manifest["metadata"]["name"])

    try:
        return await _apply(to, manifest, workload, await _upon(to, manifest, workload, now, clear))
    except (Conflict, BackendRefused):
        with suppress(AgentFleetError):  # the first error is what is told; all of it is tried again then
            await _put_back(to, manifest, before, back)
        raise


async def _put_back(to: Requests, manifest: Manifest, before: Standing, back: Callable[[str, int], None]) -> None:
    """Put back the affinity that was taken away and let the rollout go on, if nothing else has changed since."""
    metadata = manifest["metadata"]
    now = await standing(to, metadata["namespace"], metadata["name"])
    if now is not None and now.uid == before.uid and now.paused and now.template == before.without_affinity:
        answer = await _merge(to, manifest, {"uid": now.uid}, paused=before.paused, affinity=before.affinity)
        back(metadata["name"], version_in(answer))


async def _merge(
    to: Requests, manifest: Manifest, place: _Place, *, paused: bool, affinity: Mapping[str, Any] | None
) -> bytes:
    metadata = manifest["metadata"]
    said = {"paused": paused, "template": {"spec": {"affinity": affinity}}}
    path = DEPLOYMENTS.path(metadata["namespace"], metadata["name"])
    return await merge(to, path, {"metadata": dict(place), "spec": said})
