"""One task on its way through the dispatcher, and what its caller gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import anyio

from agentfleet.errors import OperationRefused, SpecError


@dataclass(frozen=True, slots=True)
class Result:
    """How a task ended.

    Attributes:
        id: The task's.
        ok: Whether the agent did it.
        value: What the agent returned, a JSON value; None when not ok.
        cause: Machine-readable reason of a failure: what the agent named, or "quarantined", "timeout", "bad-answer",
            "http-<status>".
        error: The failure in words.
        attempt: Which try it was, from 1.
        instance: Who answered; None when nobody did.
    """

    id: str
    ok: bool
    value: Any = None
    cause: str | None = None
    error: str | None = None
    attempt: int = 1
    instance: str | None = None


class Job:
    """A task that has been submitted and has not ended."""

    __slots__ = ("attempt", "done", "failures", "id", "kills", "last", "payload", "result")

    def __init__(self, id: str, payload: str) -> None:
        self.id = id
        self.payload = payload
        """As JSON text: encoded once, and smaller than objects."""
        self.attempt = 1
        self.kills: list[str] = []
        """Instances that were gone before they had answered."""
        self.failures = 0
        """Answers of agents that the task had failed."""
        self.last: str | None = None
        """Who had it last: another one is preferred."""
        self.done = anyio.Event()
        self.result: Result | None = None

    def body(self, *, resume: bool) -> bytes:
        """What is sent. With `resume` an agent that does not know the task says so instead of running it."""
        tail = ',"resume":true}' if resume else "}"
        return f'{{"id":{json.dumps(self.id)},"payload":{self.payload},"attempt":{self.attempt}{tail}'.encode()


class Submission:
    """A submitted task, to be waited for now, later, or never."""

    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def id(self) -> str:
        """The task's id."""
        return self._job.id

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._job.result is not None

    async def result(self) -> Result:
        """Wait for the end. A caller who stops waiting does not stop the task.

        Raises:
            OperationRefused: The dispatcher was closed first; the journal keeps the task for `recover`.
        """
        await self._job.done.wait()
        if self._job.result is None:
            raise OperationRefused(f"the dispatcher was closed before task {self.id} ended; recover() takes it up")
        return self._job.result


def new_job(id: str, payload: object) -> Job:
    """A job, or `SpecError` when the id or the payload cannot be sent."""
    if not (1 <= len(id) <= 256 and id.isprintable()):
        raise SpecError(f"task id {id[:80]!r}: use 1 to 256 printable characters")
    try:
        text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"task {id}: the payload cannot be written as JSON: {error}") from error
    return Job(id, text)
