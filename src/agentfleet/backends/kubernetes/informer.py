"""An informer keeps a copy of the objects of one kind as the API server has them, by one list and then by watching.

Alone, as the eyes of a controller of your own::

    async with Connection.find() as connection, Informer(connection, PODS, namespace="default") as pods:
        await pods.wait_synced()
        print(len(pods.cache), "pods")
        async for event in pods.events():  # a Snapshot, then Changed and Removed
            match event:
                case Changed(object=pod, before=None):
                    print("new", pod.metadata.name, pod.status.phase)
                case Removed(object=pod):
                    print("gone", pod.metadata.name)

What it stands for:

- Nothing is lost and nothing is told twice: a watch goes on from the last resource version, its end never means that
  there is nothing more, history that is compacted away (410) means a new list, and a list only tells what differs.
- A dead connection is noticed: the server says something at least once a minute (bookmarks); longer silence than
  `silence` ends the watch. A server that closes at once, or is away, is asked again with back-off; no loop runs hot.
- The event loop is never held for long: lists come in pages, and long bursts of events let others have their turn.
- `wait_for` waits until the copy shows a write of one's own, so that nothing is decided on a picture from before it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.errors import Expired, error_of_status
from agentfleet.backends.kubernetes.informer_cache import Changed, ObjectCache, Removed, Snapshot, key_of
from agentfleet.backends.kubernetes.informer_metrics import InformerMetrics, LastWord
from agentfleet.backends.kubernetes.informer_queue import Closed, Unread
from agentfleet.backends.kubernetes.objects import KubeObject
from agentfleet.backends.kubernetes.resources import Resource, decode, selector
from agentfleet.backends.kubernetes.retry import Backoff
from agentfleet.backends.kubernetes.watching import (
    Added,
    Bookmark,
    Deleted,
    Failed,
    LineSplitter,
    Modified,
    event_reader,
)
from agentfleet.clock import Clock, SystemClock
from agentfleet.errors import (
    BackendError,
    BackendRefused,
    BackendUnavailable,
    DeadlineExceeded,
    InstanceGone,
    SpecError,
)

__all__ = ["Informer"]

ObjectT = TypeVar("ObjectT", bound=KubeObject)

_SLICE = 0.005
"""Seconds after which a burst of events lets other tasks have their turn."""
_GLANCE = 16
"""Events between two looks at the clock."""
_LIVED = 10.0
"""A watch that lasted this many seconds was a good one, even if nothing happened in it."""
_FRUITLESS = 3
"""Watches that broke at the same point after which the point is given up for a new list."""


class Informer(Generic[ObjectT]):
    """A live copy of the objects of one kind. Use it as an async context manager.

    Args:
        connection: How the API server is asked.
        resource: The kind, such as `PODS`.
        namespace: The namespace; all for None.
        labels: What labels must be: a mapping, or a selector as Kubernetes writes it.
        fields: A field selector, such as "spec.nodeName=n1".
        page: Objects in one page of a list. 500 pods are about 3 MB, and 10 ms of CPU in one turn.
        silence: Seconds without a word from the server after which a watch is given up. The server's bookmarks come
            about once a minute: less than 75 makes quiet watches begin anew each time, which is cheap for kinds that
            always move (leases).
        watch_for: Seconds that one watch lasts, about; then the next one goes on from there.
        relist_every: Seconds after which everything is listed again, about, in case an event was lost on the way.
        clock: Sleeps between attempts.
        rng: Draws the jitter.
    """

    def __init__(
        self,
        connection: Requests,
        resource: Resource[ObjectT],
        *,
        namespace: str | None = None,
        labels: Mapping[str, str] | str | None = None,
        fields: str | None = None,
        page: int = 500,
        silence: float = 90.0,
        watch_for: float = 300.0,
        relist_every: float = 3600.0,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._connection = connection
        self._resource = resource
        self._path = resource.path(namespace)
        self._query: dict[str, str] = {}
        if labels:
            self._query["labelSelector"] = labels if isinstance(labels, str) else selector(labels)
        if fields:
            self._query["fieldSelector"] = fields
        self._page = page
        self._silence = silence
        self._watch_for = watch_for
        self._relist_every = relist_every
        self._rng = rng or random.Random()  # noqa: S311 - jitter is no secret
        self._backoff = Backoff(clock or SystemClock(), self._rng)
        self._read_event = event_reader(resource)
        self._cache: ObjectCache[ObjectT] = ObjectCache()
        self._readers: set[Unread[ObjectT]] = set()
        self._resume: str | None = None
        self._relist_at = 0.0
        self._fruitless = 0
        self._synced = False
        self._closed = False
        self._error: Exception | None = None
        self._moved = anyio.Event()
        self._waiting = 0
        self._tasks: TaskGroup | None = None
        self.metrics = InformerMetrics()
        self.last_word = LastWord()

    async def __aenter__(self) -> Self:
        self.last_word.begin()
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._run, name=f"informer {self._path}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        self._closed = True
        self.last_word.end()
        for reader in self._readers:
            reader.close()
        self._pulse()
        self._tasks.cancel_scope.cancel()
        if isinstance(error, anyio.get_cancelled_exc_class()):  # perhaps by the group, because its task failed
            return await self._tasks.__aexit__(kind, error, trace)
        await self._tasks.__aexit__(None, None, None)  # the body's own error stays as it is, not in a group
        return None

    # -- what users read

    @property
    def cache(self) -> Mapping[str, ObjectT]:
        """The objects by "namespace/name" (by name where there are no namespaces): live and read-only."""
        return self._cache.objects

    @property
    def synced(self) -> bool:
        """Whether the first list is complete. It stays so: afterwards `staleness` tells how old the copy may be."""
        return self._synced

    @property
    def version(self) -> int:
        """The resource version up to which the copy is complete."""
        return self._cache.version

    @property
    def staleness(self) -> float:
        """Seconds since the server last said anything: the copy is at most that old. Infinite before the first list."""
        return self.last_word.age

    @property
    def dropped(self) -> int:
        """Events that were no news: repeated, late, or about an object's predecessor."""
        return self._cache.dropped

    @property
    def error(self) -> Exception | None:
        """Why the last list or watch failed; None while all is well."""
        return self._error

    async def wait_synced(self, timeout: float = 60.0) -> None:
        """Wait for the first complete list.

        Raises:
            BackendRefused: The server refuses: a permission, a selector, the credentials.
            InstanceGone: The server has no such kind.
            SpecError: The configuration of the connection is wrong.
            BackendUnavailable: The informer was closed.
            DeadlineExceeded: It did not come within `timeout` seconds; the message tells the last error.
        """
        with anyio.move_on_after(timeout):
            while not self._synced:
                if isinstance(self._error, BackendRefused | InstanceGone | SpecError):
                    raise self._error
                await self._wait()
            return
        raise DeadlineExceeded(f"list {self._path}: not complete within {timeout:g} s{self._because()}")

    async def wait_for(self, resource_version: str | int, timeout: float = 10.0) -> None:
        """Wait until the copy shows everything up to a resource version, usually that of one's own last write.

        Args:
            resource_version: From the answer to a write to an object that this informer selects: others are not told
                to it one by one, and it may take a minute until it hears that time has passed them.
            timeout: Seconds to wait.

        Raises:
            BackendUnavailable: The informer was closed.
            DeadlineExceeded: The copy did not get there; decide nothing on it.
        """
        wanted = int(resource_version)
        with anyio.move_on_after(timeout):
            while not self._synced or self._cache.version < wanted:
                await self._wait()
            return
        raise DeadlineExceeded(
            f"watch {self._path}: at resource version {self._cache.version}, not at {wanted} within {timeout:g} s"
            f"{self._because()}"
        )

    async def events(self) -> AsyncGenerator[Snapshot[ObjectT] | Changed[ObjectT] | Removed[ObjectT], None]:
        """A `Snapshot` once the first list is complete, then what changes; ends when the informer is closed.

        Each iteration is its own reader. A slow one skips what an object was in between, never what it is. Close the
        iterator (`aclose`) when you leave it early.
        """
        unread: Unread[ObjectT] = Unread()
        if self._closed:
            return
        self._readers.add(unread)
        try:
            while not self._synced:
                await self._wait()
            unread.forget()
            yield Snapshot(tuple(self._cache.objects.values()))
            while (change := await unread.next()) is not None:
                yield change
        except Closed:
            return
        finally:
            self._readers.discard(unread)

    # -- the loop

    async def _run(self) -> None:
        while True:
            caught: Exception | None = None
            try:
                if self._resume is None or anyio.current_time() >= self._relist_at:
                    await self._list()
                await self._watch()
            except Expired as error:
                self.metrics.expired += 1
                self._resume = None
                caught = error
            except (BackendError, DeadlineExceeded, SpecError) as error:
                self.metrics.failures += 1
                caught = error
            self._error = caught
            self._pulse()
            await self._backoff.wait(caught)

    async def _list(self) -> None:
        """Read everything, page by page, and tell what differs."""
        self._resume = None  # until it is complete: half a list and an old watch do not go together
        self.metrics.lists += 1
        self.metrics.relists += self.metrics.lists > 1
        query: dict[str, str | int | bool] = {**self._query, "limit": self._page}
        keys: set[str] = set()
        while True:
            body = await self._connection.request("GET", self._path, query=query)
            await anyio.lowlevel.checkpoint()  # reading was one turn of the loop, decoding another, taking in a third
            page = decode(self._resource.read_page, body, f"list {self._path}")
            del body
            await anyio.lowlevel.checkpoint()
            self.metrics.pages += 1
            for each in page.items or ():
                keys.add(key_of(each.metadata))
                self._tell(self._cache.put(each, listed=True))
            if not page.metadata.continue_token:
                break
            query["continue"] = page.metadata.continue_token
        version = page.metadata.resource_version
        self._tell(self._cache.keep(keys, version))
        self._resume = version
        self.last_word.heard()
        self._relist_at = anyio.current_time() + self._relist_every * (0.9 + 0.2 * self._rng.random())
        self._fruitless = 0
        self._synced = True
        self._error = None
        self._pulse()

    async def _watch(self) -> None:
        """Watch until the server or we end it; raises what it broke of."""
        lasts = self._watch_for * (0.9 + 0.2 * self._rng.random())
        query: dict[str, str | int | bool] = {
            **self._query,
            "watch": True,
            "allowWatchBookmarks": True,
            "resourceVersion": self._resume or "",
            "timeoutSeconds": max(1, round(lasts)),
        }
        begun = anyio.current_time()
        events = self.metrics.events
        streaming = False
        try:
            # the server ends the watch; if it forgets to, or it is time for a list, we do
            with anyio.move_on_after(min(lasts + 15.0, max(0.0, self._relist_at - begun))):
                async with self._connection.stream(self._path, query=query, silence=self._silence) as pieces:
                    streaming = True
                    self.metrics.reconnects += self.metrics.watches >= self.metrics.lists
                    self.metrics.watches += 1
                    self.last_word.heard()
                    self._error = None
                    await self._follow(pieces)
        except BackendUnavailable:
            if streaming and self.metrics.events == events:
                self._fruitless += 1
                if self._fruitless >= _FRUITLESS:  # the point itself may be what it breaks at
                    self._resume = None
            raise
        finally:
            if self.metrics.events > events or (streaming and anyio.current_time() - begun > _LIVED):
                self._backoff.reset()
                self._fruitless = 0

    async def _follow(self, pieces: AsyncIterator[bytes]) -> None:
        """Take in what a watch says, as long as it says something."""
        splitter = LineSplitter()
        turn_ends = anyio.current_time() + _SLICE
        async for piece in pieces:
            self.last_word.heard()
            for number, line in enumerate(splitter.lines(piece)):
                if not number % _GLANCE and anyio.current_time() >= turn_ends:
                    self._pulse()
                    await anyio.lowlevel.checkpoint()
                    turn_ends = anyio.current_time() + _SLICE
                self._take(line)
            self._pulse()
        if splitter.unfinished:
            raise BackendUnavailable(f"watch {self._path}: it ended in the middle of an event")

    def _take(self, line: bytes) -> None:
        """Take in one event."""
        event = self._read_event(line)
        match event:
            case Added() | Modified() | Deleted():
                self.metrics.events += 1
                change = self._cache.remove if isinstance(event, Deleted) else self._cache.put
                self._tell(change(event.object))
                self._seen(event.object.metadata.resource_version)
            case Bookmark():
                self.metrics.bookmarks += 1
                self._cache.reached(event.object.metadata.resource_version)
                self._seen(event.object.metadata.resource_version)
            case Failed():
                raise error_of_status(f"watch {self._path}", event.object)

    def _seen(self, version: str) -> None:
        """The next watch goes on from here; never from an earlier point, whatever comes late."""
        before = self._resume
        if not version.isdecimal() or not before or not before.isdecimal() or int(version) > int(before):
            self._resume = version or before

    def _tell(self, changes: Sequence[Changed[ObjectT] | Removed[ObjectT]]) -> None:
        if changes:
            for reader in self._readers:
                reader.add(changes)

    def _pulse(self) -> None:
        """Let those look again who wait for the copy to get somewhere."""
        if self._waiting:
            moved, self._moved = self._moved, anyio.Event()
            moved.set()

    async def _wait(self) -> None:
        if self._closed:
            raise Closed(f"the informer of {self._path} is closed")
        self._waiting += 1
        try:
            await self._moved.wait()
        finally:
            self._waiting -= 1

    def _because(self) -> str:
        return "" if self._error is None else f"; at last: {self._error}"
