"""Following all bound pods: list, watch, and list again when the watch has expired."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from urllib.parse import urlencode

import aiohttp
import msgspec

from agentfleet.testing.kube.apiclient import ApiClient
from agentfleet.testing.kube.podview import Pod, decode_bookmark, decode_event, decode_list, decode_pod

_PATH = "/api/v1/pods"
_BOUND = "spec.nodeName!="
_PAGE = 500
_WATCH, _SILENCE = 120, 150  # seconds: how long a watch lasts, and when it counts as dead


class PodWatch:
    """Calls `seen` with every bound pod that is new or changed, and `lost` with the uid of every one that is gone."""

    def __init__(self, api: ApiClient, *, seen: Callable[[Pod], None], lost: Callable[[str], None]) -> None:
        self._api = api
        self._seen = seen
        self._lost = lost
        self._known: set[str] = set()
        self._version = ""
        self.lists = 0
        """How often it has listed."""

    async def run(self, listed: asyncio.Event) -> None:
        """Follow for ever; `listed` is set after the first list."""
        pause = 0.05
        while True:
            try:
                if not self._version:
                    await self._list()
                    listed.set()
                if await self._watch():
                    pause = 0.05
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
                pass  # the connection broke; go on from where we were
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(pause * 2, 1.0)

    async def _list(self) -> None:
        found: set[str] = set()
        following = ""
        while True:
            query = {"fieldSelector": _BOUND, "limit": _PAGE} | ({"continue": following} if following else {})
            status, said = await self._api.send("GET", f"{_PATH}?{urlencode(query)}")
            if status == 410:
                following = ""
                found.clear()
                continue
            if status != 200:
                raise aiohttp.ClientPayloadError(f"the list of pods was answered {status}: {said[:200]!r}")
            page = decode_list(said)
            for pod in page.items:
                found.add(pod.metadata.uid)
                self._seen(pod)
            following = page.metadata.next
            if not following:
                break
        self.lists += 1
        for uid in self._known - found:
            self._lost(uid)
        self._known = found
        self._version = page.metadata.resource_version

    async def _watch(self) -> bool:
        """Watch until it ends; returns whether anything came."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "fieldSelector": _BOUND,
            "resourceVersion": self._version,
            "timeoutSeconds": _WATCH,
        }
        came = False
        try:
            async for line in self._api.lines(f"{_PATH}?{urlencode(query)}", silence=_SILENCE):
                if not self._take(line):
                    self._version = ""
                    return came
                came = True
        except aiohttp.ClientResponseError as error:
            if error.status == 410:
                self._version = ""
            else:
                raise
        return came

    def _take(self, line: bytes) -> bool:
        event = decode_event(line)
        if event.type in {"ADDED", "MODIFIED"}:
            pod = decode_pod(event.object)
            self._known.add(pod.metadata.uid)
            self._version = pod.metadata.resource_version
            self._seen(pod)
        elif event.type == "DELETED":
            pod = decode_pod(event.object)
            self._known.discard(pod.metadata.uid)
            self._version = pod.metadata.resource_version
            self._lost(pod.metadata.uid)
        elif event.type == "BOOKMARK":
            self._version = decode_bookmark(event.object).metadata.resource_version
        else:
            return False  # ERROR: expired, or worse: list again
        return True
