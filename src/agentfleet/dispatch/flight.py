"""One task with one instance: send it, and find out what became of it, across broken connections."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

import anyio

from agentfleet.clock import Clock
from agentfleet.dispatch.job import Job, Result
from agentfleet.dispatch.lanes import Lane
from agentfleet.dispatch.ports import Requests
from agentfleet.errors import DeadlineExceeded
from agentfleet.signals.http import HttpError, Response

_BREAKS = 3
_PAUSE = 0.1
_REST = (0.1, 30.0)


class Fate(StrEnum):
    """What became of a flight that brought no result."""

    UNREACHED = "unreached"
    """Nobody took the task: it did not count as a try."""
    BUSY = "busy"
    """The instance had no room, or drains."""
    DIED = "died"
    """The instance had taken the task and was gone before it answered."""
    BARRED = "barred"
    """The instance may have the task, and does not let us ask."""


class Flight:
    """A task that is with an instance."""

    __slots__ = ("abandoned", "asked", "attempt", "job", "lane", "rest", "resume", "scope")

    def __init__(self, job: Job, lane: Lane, *, resume: bool = False) -> None:
        self.job = job
        self.lane = lane
        self.attempt = job.attempt
        self.resume = resume
        """Whether the instance may have the task already."""
        self.asked: tuple[str, str | None] | None = None
        """The door at which it was asked last."""
        self.abandoned = False
        """The instance is gone; the task has been handed on, and an answer would be a surprise."""
        self.rest = 0.5
        """Seconds the instance asked to be left alone."""
        self.scope = anyio.CancelScope()


async def fly(flight: Flight, http: Requests, clock: Clock, timeout: float) -> Result | Fate:
    """Ask until there is an answer, or reason to believe that none will come.

    A broken connection does not mean a dead instance: it is asked again whether it has the task, so that nothing runs
    twice that one instance still works on.
    """
    headers = {"Content-Type": "application/json"}
    flight.asked = address, token = flight.lane.door
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    if not address:
        return Fate.BARRED  # taken up from the journal, and not seen serving since
    for broken in range(_BREAKS + 1):
        if broken:
            await clock.sleep(_PAUSE * 2**broken)
        body = flight.job.body(resume=flight.resume)
        try:
            response = await http.request("POST", address, "/tasks", body=body, headers=headers, timeout=timeout)
        except DeadlineExceeded:
            return _failed(flight, "timeout", f"{flight.lane.id} did not answer within {timeout:g} s")
        except HttpError as error:
            if not error.sent:
                return Fate.DIED if flight.resume else Fate.UNREACHED
            flight.resume = True
            continue
        if flight.resume and response.status in (429, 503) and b"draining" not in response.body:
            continue  # it has no room for the question, which says nothing about the task
        return _judge(flight, response)
    return Fate.DIED


def _judge(flight: Flight, response: Response) -> Result | Fate:
    status = response.status
    if status == 200:
        return _read(flight, response.body)
    if status in (429, 503):
        flight.rest = _retry_after(response)
        return Fate.BUSY
    if flight.resume:
        if status == 404:
            return Fate.DIED  # the process that had it is gone, and another one answers in its place
        if status in (401, 403):
            return Fate.BARRED
    return _failed(flight, f"http-{status}", f"{flight.lane.id} answered {status}: {response.body[:200]!r}")


def _read(flight: Flight, body: bytes) -> Result:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        return _failed(flight, "bad-answer", f"{flight.lane.id} did not answer JSON: {error}")
    if not isinstance(data, dict) or data.get("id") != flight.job.id or not isinstance(data.get("ok"), bool):
        return _failed(flight, "bad-answer", f"{flight.lane.id} answered something else: {body[:200]!r}")
    if data["ok"]:
        return Result(flight.job.id, ok=True, value=data.get("result"), attempt=flight.attempt, instance=flight.lane.id)
    return _failed(flight, str(data.get("cause") or "failed"), str(data.get("error") or ""))


def _failed(flight: Flight, cause: str, error: str) -> Result:
    return Result(flight.job.id, ok=False, cause=cause, error=error, attempt=flight.attempt, instance=flight.lane.id)


def _retry_after(response: Response) -> float:
    text = response.headers.get("retry-after", "")
    seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 1.0
    return min(max(seconds, _REST[0]), _REST[1])
