"""Live configuration on the agent's side: revisions only go up, and a rejected document changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from agentfleet.agent.kept import KeptConfig

Apply = Callable[[int, Mapping[str, Any]], Awaitable[str | None]]
"""Has the user's loop accept a document: None, or why it refuses. Raises TimeoutError when it does not say."""


class Configuration:
    """The newest accepted document. Changed in the user's loop only; read from anywhere."""

    __slots__ = ("_now", "callback")

    def __init__(self) -> None:
        # one tuple, replaced whole, so that no reader ever pairs a revision with another one's document
        self._now: tuple[int, Mapping[str, Any]] = (0, MappingProxyType({}))
        self.callback: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def revision(self) -> int:
        """Revision of the document in force, 0 before the first."""
        return self._now[0]

    @property
    def document(self) -> Mapping[str, Any]:
        """The document in force, read-only."""
        return self._now[1]

    async def accept(self, revision: int, document: Mapping[str, Any]) -> None:
        """Ask the agent's callback, and put the document in force unless it raises."""
        proposed = MappingProxyType(dict(document))
        if self.callback is not None:
            answer = self.callback(proposed)
            if inspect.isawaitable(answer):
                await answer
        self._now = (revision, proposed)


class Intake:
    """Takes revisions in, one at a time, wherever they come from: pushed, subscribed to, or from the disk.

    Runs in the server's loop.

    Args:
        config: What is in force.
        apply: Has the user's loop accept a document.
        kept: Where what was accepted is kept.
        warn: Told what goes wrong there.
    """

    def __init__(
        self, config: Configuration, apply: Apply, *, kept: KeptConfig | None, warn: Callable[[str], None]
    ) -> None:
        self._config, self._apply, self._kept, self._warn = config, apply, kept, warn
        self._lock = asyncio.Lock()

    async def offer(self, revision: int, document: Mapping[str, Any]) -> tuple[int, str]:
        """Put a document in force, if it is newer than what is, and the agent accepts it.

        Returns:
            A status as in HTTP, and why: 200 it is in force and kept, 409 it is not newer, 422 it is refused, 504 the
            agent has not said.
        """
        async with self._lock:  # one at a time, or an older one could overtake a newer one in its callback
            present = self._config.revision
            if revision < present or (revision == present and document != self._config.document):
                return 409, f"revision {present} is in force; {revision} is not newer"
            if revision > present:
                try:
                    refusal = await self._apply(revision, document)
                except TimeoutError:
                    return 504, "on_config did not return in time"
                if refusal is not None:
                    return 422, refusal
                await self._keep(revision, dict(document))
        return 200, ""

    async def recall(self) -> None:
        """Put in force what was kept, if that is newer than what is."""
        kept = await _in_thread(self._kept.read) if self._kept is not None else None
        self._complain()
        if kept is None or kept[0] <= self._config.revision:
            return
        async with self._lock:
            if kept[0] <= self._config.revision:
                return
            try:
                refusal = await self._apply(*kept)
            except TimeoutError:
                refusal = "on_config did not return in time"
        if refusal is not None:
            self._warn(f"the configuration that was kept, revision {kept[0]}, is refused: {refusal}")

    async def _keep(self, revision: int, document: dict[str, Any]) -> None:
        if self._kept is not None:
            kept = self._kept
            await _in_thread(lambda: kept.write(revision, document))
            self._complain()

    def _complain(self) -> None:
        if self._kept is not None and self._kept.trouble is not None:
            self._warn(self._kept.trouble)


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Run what may wait for the disk in a daemon thread: an executor's would keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(value: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def body() -> None:
        value, error = None, None
        try:
            value = call()
        except BaseException as raised:  # noqa: BLE001  carried over to the event loop, and raised there
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent has ended
            loop.call_soon_threadsafe(finish, value, error)

    threading.Thread(target=body, name="agentfleet-config", daemon=True).start()
    return await done
