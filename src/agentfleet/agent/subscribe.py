"""An agent fetches its configuration: a stream of server-sent events that it keeps open, or a question now and then.

What was accepted stays in force whatever happens to the connection. Who is cut off comes back after a random time
within a span that doubles ("full jitter"; Brooker, "Exponential backoff and jitter", AWS 2015), and that begins with
what the server has asked for, so that a thousand who are cut off together do not come back together. He says what he
runs and what he has judged, and is sent what is newer, if anything is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentfleet.agent.fetch import Target, open_stream, request
from agentfleet.agent.incoming import BadResponse, Events

Offer = Callable[[int, Mapping[str, Any]], Awaitable[tuple[int, str]]]
"""Judges a revision: a status as in HTTP (200 in force, 409 not newer, 422 refused, 504 no answer), and why."""

CONNECT_TIMEOUT = 3.0
"""Seconds to connect, and to the head of the answer."""
SILENCE = 15.0
"""Seconds without a byte after which a stream is dead; the server shows each five that it lives."""
RETRY = (1.0, 4.0)
"""Spans in seconds over which a return is spread: the first, unless the server asks for more, and the widest."""
ACK_TIMEOUT = 10.0
_LIMIT = 8 * 2**20
_FAILURES = (OSError, TimeoutError, BadResponse, EOFError)


class Subscription:
    """Fetches one instance's configuration, and says what came of it. Runs in one event loop.

    Args:
        url: Of the cluster, such as `http://manager:8080/api/v1/clusters/researchers`.
        instance: Who asks.
        offer: Judges each revision.
        running: The revision in force.
        token: Gives the bearer token, read anew for each connection, as it may be renewed; None for none.
        poll: Seconds between two questions; None keeps a stream open.
        warn: Told what goes wrong, once for each kind.
        rng: Draws the jitter.

    Raises:
        SpecError: `url` is no such address.
    """

    def __init__(
        self,
        url: str,
        instance: str,
        *,
        offer: Offer,
        running: Callable[[], int],
        token: Callable[[], str | None] = lambda: None,
        poll: float | None = None,
        warn: Callable[[str], None] = lambda _: None,
        rng: random.Random | None = None,
    ) -> None:
        self._target = Target.of(url)
        self._instance = instance
        self._offer, self._running = offer, running
        self._token = token
        self._poll = poll
        self._warn = warn
        self._rng = rng if rng is not None else random.Random()  # noqa: S311 - jitter
        self._judged = 0
        self._refused: tuple[int, str] = (0, "")
        self._newest: tuple[str, bytes] | None = None
        self._arrived = asyncio.Event()
        self._acked: tuple[int, int] | None = None
        self._unacked = asyncio.Event()
        self._spread = RETRY[0]
        self._trouble: str | None = None
        self.connected = False
        """Whether the stream is open, or the last question was answered."""
        self.heard = asyncio.Event()
        """Set when a revision was offered for the first time."""

    async def run(self) -> None:
        """Fetch until cancelled."""
        tasks = [asyncio.create_task(loop()) for loop in (self._acknowledge, self._fetch, self._judge)]
        try:
            await asyncio.gather(*tasks)  # none of them returns
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def note(self) -> None:
        """What is in force has changed otherwise than by this subscription: it is said."""
        self._unacked.set()

    # ------------------------------------------------------------------------------------------ fetching

    async def _fetch(self) -> None:
        attempt = 0
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await (self._stream() if self._poll is None else self._ask())
                self._trouble = None
            except _FAILURES as error:
                self._complain(f"{type(error).__name__}: {error}"[:300])
            lasted = asyncio.get_running_loop().time() - began
            attempt = 0 if self.connected and lasted > self._spread else attempt + 1
            failed, self.connected = not self.connected, self._poll is not None and self.connected
            if self._poll is not None and not failed:
                await asyncio.sleep(self._poll * (0.75 + self._rng.random() / 2))
            else:
                await asyncio.sleep(self.pause(attempt))

    def pause(self, attempt: int) -> float:
        """Seconds until the next attempt: any within a span that doubles, and is no narrower than the server asks."""
        widest = max(RETRY[1], self._spread)
        return self._rng.uniform(0.0, min(widest, max(RETRY[0], self._spread) * 2.0 ** min(max(0, attempt - 1), 8)))

    async def _stream(self) -> None:
        """Keep a stream open for as long as it lives."""
        events = Events(self._take, wanted="config", limit=_LIMIT)
        running, refused = self._said()
        headers = self._headers() | {"Accept": "text/event-stream"}
        if self._judged:
            headers["Last-Event-ID"] = str(self._judged)
        path = self._target.path("/config/stream", instance=self._instance, running=running, refused=refused)
        loop = asyncio.get_running_loop()
        stream = await open_stream(
            self._target, path, headers, on_body=lambda piece: self._read(events, piece), timeout=CONNECT_TIMEOUT
        )
        try:
            self.connected = True
            self._acked = (running, refused)  # said by asking
            self._unacked.set()  # unless that has changed meanwhile
            while True:
                left = stream.heard_at + SILENCE - loop.time()
                if left <= 0:
                    raise TimeoutError(f"nothing was heard for {SILENCE:g} s")
                if await stream.ended(left):
                    return
        finally:
            stream.close()

    def _read(self, events: Events, piece: bytes) -> None:
        events.feed(piece)
        if events.retry is not None:
            self._spread = min(60.0, max(RETRY[0], events.retry))

    async def _ask(self) -> None:
        self.connected = False
        headers = self._headers() | ({"If-None-Match": f'"{self._judged}"'} if self._judged else {})
        running, refused = self._said()
        path = self._target.path("/config", instance=self._instance, running=running, refused=refused)
        status, _, body = await request(self._target, "GET", path, headers, limit=_LIMIT, timeout=ACK_TIMEOUT)
        if status == 200:
            self._take("", body)
        elif status not in (304, 404):
            raise BadResponse(f"the server answered {status}")
        self.connected = True

    def _headers(self) -> dict[str, str]:
        token = self._token()
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    # ------------------------------------------------------------------------------------------ judging

    def _take(self, id: str, data: bytes) -> None:
        """A revision has arrived; of several that wait the newest alone is judged."""
        self._newest = (id, data)
        self._arrived.set()

    async def _judge(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._newest is None:
                continue
            (_, data), self._newest = self._newest, None
            proposal = _parse(data)
            if proposal is None:
                self._complain("a revision could not be read")
                continue
            attempt = 0
            while not await self._consider(*proposal):
                self.heard.set()
                attempt += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.pause(attempt)):
                        await self._arrived.wait()
                        break  # what has arrived is judged instead
            self.heard.set()

    async def _consider(self, revision: int, document: Mapping[str, Any]) -> bool:
        """Offer a revision; whether there was an answer. Silence is no refusal: it is offered again."""
        status, why = await self._offer(revision, document)
        if status == 504:
            self._complain(f"revision {revision}: {why}")
            return False
        self._judged = max(self._judged, revision)
        if status == 422:
            self._refused = (revision, why)
        self._unacked.set()
        return True

    # ------------------------------------------------------------------------------------------ saying

    async def _acknowledge(self) -> None:
        """Say what is in force whenever that has changed, spread over a part of what a return is spread over."""
        while True:
            await self._unacked.wait()
            await asyncio.sleep(
                self._rng.uniform(0.05, 0.25) * self._spread
            )  # when the change itself has gone out to all
            self._unacked.clear()
            attempt = 0
            while not await self._say():
                attempt += 1
                await asyncio.sleep(self.pause(attempt))

    def _said(self) -> tuple[int, int]:
        """What is in force, and the newest that was refused since."""
        running, refused = self._running(), self._refused[0]
        return running, refused if refused > running else 0

    async def _say(self) -> bool:
        (running, refused), why = self._said(), self._refused[1]
        if self._acked == (running, refused) and not refused:
            return True
        said = {"instance": self._instance, "revision": running, "refused": refused, "why": why if refused else ""}
        body = json.dumps(said | {"via": "stream" if self._poll is None else "poll"}).encode("ascii")
        path = self._target.path("/config/acks")
        headers = self._headers() | {"Content-Type": "application/json"}
        try:
            status, _, _ = await request(self._target, "POST", path, headers, body=body, timeout=ACK_TIMEOUT)
        except _FAILURES:
            return False
        if status >= 500 or status == 429:
            return False
        if status >= 300:
            self._complain(f"an acknowledgement was answered {status}")
        self._acked = (running, refused)
        return True

    def _complain(self, trouble: str) -> None:
        kind = trouble.partition(":")[0]
        if self._trouble != kind:
            self._trouble = kind
            self._warn(f"configuration from {self._target}: {trouble}")


def _parse(data: bytes) -> tuple[int, dict[str, Any]] | None:
    try:
        said = json.loads(data)
        revision, document = said["revision"], said["document"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = type(revision) is int and 1 <= revision < 2**63 and isinstance(document, dict)
    return (revision, document) if sound else None
