"""Server-sent events (WHATWG, HTML 9.2) as they come, from one manager after another, without a gap."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import aiohttp
import anyio
from pydantic import ValidationError

from agentfleet.client.problems import AGAIN, error_of
from agentfleet.client.transport import Transport
from agentfleet.rest.answers import EventAnswer

_SILENCE = 60.0
"""Seconds without a sign of life after which a stream counts as broken; servers give one every 15 s."""
_PAUSES = (0.1, 5.0)
"""Seconds before the first repetition, and the most before any."""
_LONGEST_LINE = 4 * 2**20


@dataclass(slots=True)
class _Place:
    """How far a stream was read: the id of the last frame, with or without data; None before any."""

    after: int | None


@dataclass(slots=True)
class Frames:
    """Puts lines of a stream together to frames."""

    id: str | None = None
    kind: str = ""
    data: list[str] = field(default_factory=list)

    def line(self, line: str) -> tuple[str | None, str, str] | None:
        """Take one line; a frame (id, kind, data) when it is whole."""
        if not line:
            whole = (self.id, self.kind, "\n".join(self.data)) if self.data else None
            self.kind, self.data = "", []
            return whole
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            self.id = value
        elif name == "event":
            self.kind = value
        elif name == "data":
            self.data.append(value)
        return None


async def events(
    transport: Transport, path: str, *, after: int | None, kinds: Sequence[str]
) -> AsyncIterator[EventAnswer]:
    """Events from a position on, without end; resumed at the next address whenever a stream ends or breaks.

    Raises:
        AgentFleetError: A manager said that there is no such stream for this token.
    """
    place, pause, at = _Place(after), _PAUSES[0], transport.at
    while True:
        try:
            async for event in _one(transport, transport.url(at), path, place, kinds):
                if place.after is None or event.seq > place.after:
                    place.after, pause = event.seq, _PAUSES[0]
                    yield event
        except (aiohttp.ClientError, OSError, TimeoutError, _Again):
            pause = min(_PAUSES[1], pause * 2)
        at += 1  # a number of its own: what ends a stream is no reason to ask others for all else
        await anyio.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - jitter: a manager that ends has many streams


class _Again(Exception):
    """This manager cannot stream now."""


async def _one(
    transport: Transport, address: str, path: str, place: _Place, kinds: Sequence[str]
) -> AsyncIterator[EventAnswer]:
    """The events of one connection."""
    query = [("kind", kind) for kind in kinds]
    if place.after is not None:
        query.append(("after", str(place.after)))
    headers = transport.headers({"Accept": "text/event-stream"})
    limits = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_SILENCE)
    async with transport.session.get(
        address + path, params=query, headers=headers, timeout=limits, allow_redirects=False, max_line_size=8190
    ) as answer:
        if answer.status != 200:
            body = await answer.content.read(2**20)
            if answer.status in AGAIN:
                raise _Again
            raise error_of(f"GET {path}", answer.status, body)
        frames, rest = Frames(), b""
        async for chunk in answer.content.iter_any():
            rest += chunk
            *lines, rest = rest.split(b"\n")
            if len(rest) > _LONGEST_LINE:
                raise aiohttp.ClientPayloadError("a line without end")
            for line in lines:
                frame = frames.line(line.decode("utf-8", "replace").removesuffix("\r"))
                if frame is not None and (event := _event(frame)) is not None:
                    yield event
                elif line in (b"", b"\r") and frame is None:
                    place.after = _further(place.after, frames.id)


def _further(after: int | None, id: str | None) -> int | None:
    """The place that a frame without data tells, if it is further on."""
    if id is None or not (id.isascii() and id.isdigit() and len(id) <= 16):
        return after
    return int(id) if after is None else max(after, int(id))


def _event(frame: tuple[str | None, str, str]) -> EventAnswer | None:
    id, kind, data = frame
    if kind == "journal.trimmed":
        return EventAnswer.trimmed(data)
    if id is None:
        return None
    try:
        return EventAnswer.model_validate_json(data)
    except ValidationError:  # of a newer server
        return None
