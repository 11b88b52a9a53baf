"""Why a rollout failed, in words: what its policy says, and how instances and actions went wrong.

It is told each event as it is recorded and remembers a few words for each of the newest revisions, so that explaining a
failure never reads the journal. What an instance wrote is read when it fails: soon after, it may be gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentfleet.events import Event

_REVISIONS = 16
_LOG_DEADLINE = 2.0  # seconds; an error is not to wait long for a line of output
_LONGEST = 200


@dataclass(slots=True)
class _Case:
    """What is known against one revision since its rollout began."""

    verdict: str | None = None
    """Why the rollout failed; None while it has not."""
    failure: str | None = None
    """How the last instance failed."""
    exhibit: str | None = None
    """How an instance failed lately whose output could be read, and its last line."""
    action: str | None = None
    """Which action the backend did not do last, and why."""
    reading: anyio.Event | None = None
    """Set when the output that is being read now has been read."""


class Postmortem:
    """The failures of one fleet's rollouts.

    Args:
        rolling: The revision that is being rolled out now; None when there is none.
        revision_of: The revision of an instance; None when it is not known.
        logs: The last lines that an instance wrote.
    """

    def __init__(
        self,
        rolling: Callable[[], int | None],
        revision_of: Callable[[str], int | None],
        logs: Callable[[str], Awaitable[Sequence[str]]],
    ) -> None:
        self._rolling = rolling
        self._revision_of = revision_of
        self._logs = logs
        self._cases: dict[int, _Case] = {}
        self._tasks: TaskGroup | None = None

    def bind(self, tasks: TaskGroup) -> None:
        """Read output in this task group from now on."""
        self._tasks = tasks

    def note(self, event: Event) -> None:
        """Take in an event."""
        data = event.data
        match event.kind:
            case "rollout.started" | "fleet.deployed":
                self._cases.pop(data["revision"], None)
            case "instance.exited":
                code = data.get("exit_code")
                self._failed(event, "exited" if code is None else f"exited with code {code}")
            case "instance.blocked" if data["revision"] == self._rolling():
                self._case(data["revision"]).failure = f"{event.instance} does not start: {data['why']}"[:_LONGEST]
            case "fleet.blocked" if data["revision"] == self._rolling():
                self._case(data["revision"]).failure = f"no instance could be made: {data['why']}"[:_LONGEST]
            case "instance.unhealthy":
                self._failed(event, f"turned unhealthy ({_texts(event.reasons)})")
            case "action.failed" if event.instance is not None:
                revision = self._revision_of(event.instance)
                if revision is not None and revision == self._rolling():
                    self._case(revision).action = f"{data['action']} of {event.instance}: {data['message']}"[:_LONGEST]
            case "rollout.failed":
                self._case(data["revision"]).verdict = _texts(event.reasons)
            case "rollout.rolled_back":
                case = self._case(data["from"])
                case.verdict = case.verdict or _texts(event.reasons)

    async def explain(self, revision: int) -> str | None:
        """Why this revision's rollout failed; None when it did not."""
        case = self._cases.get(revision)
        if case is None or case.verdict is None:
            return None
        if case.reading is not None:
            await case.reading.wait()
        failure = case.exhibit or case.failure
        words = (
            case.verdict,
            f"for example {failure}" if failure else None,
            f"last failed action: {case.action}" if case.action else None,
        )
        return "; ".join(word for word in words if word)

    def _failed(self, event: Event, how: str) -> None:
        """An instance has failed. Of many at once the output of one is read."""
        revision = event.data["revision"]
        if event.instance is None or revision != self._rolling():
            return
        case = self._case(revision)
        case.failure = f"{event.instance} {how}"[:_LONGEST]
        if case.reading is None and self._tasks is not None:
            case.reading = anyio.Event()
            self._tasks.start_soon(self._read, case, case.reading, event.instance, case.failure)

    def _case(self, revision: int) -> _Case:
        case = self._cases.setdefault(revision, _Case())
        while len(self._cases) > _REVISIONS:
            del self._cases[min(self._cases)]
        return case

    async def _read(self, case: _Case, done: anyio.Event, id: str, failure: str) -> None:
        """Take down what an instance wrote last, if that can be had."""
        try:
            with anyio.fail_after(_LOG_DEADLINE):
                lines = await self._logs(id)
            written = next((line.strip() for line in reversed(lines) if line.strip()), None)
            if written is not None:
                case.exhibit = f"{failure}, its last line: {written[:_LONGEST]!r}"
        except Exception:  # noqa: BLE001 - a backend of the user's own may raise anything; then it is told without
            return
        finally:
            case.reading = None
            done.set()


def _texts(reasons: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(reason["text"] for reason in reasons)
