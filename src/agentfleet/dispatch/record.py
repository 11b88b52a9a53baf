"""RECORD: what the dispatcher journals, and how it reads its past back.

`task.submitted`, `task.assigned`, `task.retried`, then `task.completed` or `task.quarantined`. Now and then a
"state.dispatch" event lists every open task, so that neither a trimmed history nor a long one stands in the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentfleet.clock import Clock
from agentfleet.dispatch.job import Job, Result, new_job
from agentfleet.errors import JournalError, SpecError
from agentfleet.events import Event
from agentfleet.stores.journal import Journal

STATE = "state.dispatch"
_CHECKPOINT_EVERY = 10_000
_RESULT_LIMIT = 16_384


@dataclass(slots=True)
class Past:
    """An open task as the journal has it."""

    job: Job
    instance: str | None = None
    """Who had it when the record ends; None when it was waiting."""
    address: str | None = None


class Record:
    """The dispatcher's side of the journal."""

    def __init__(self, journal: Journal, clock: Clock, fleet: str) -> None:
        self._journal = journal
        self._clock = clock
        self._fleet = fleet
        self._checkpoint_seq: int | None = None

    def write(self, kind: str, instance: str | None = None, **data: Any) -> int:
        """Append one event and return its seq; raises `JournalError`."""
        return self._journal.append(Event(self._clock.now(), self._fleet, kind, instance, data)).seq

    def submitted(self, job: Job, payload: object) -> None:
        """A task was taken on."""
        self.write("task.submitted", id=job.id, payload=payload)

    def assigned(self, job: Job, instance: str, address: str) -> int:
        """A task is about to be sent."""
        return self.write("task.assigned", instance, id=job.id, attempt=job.attempt, address=address)

    def completed(self, result: Result) -> None:
        """A task has ended; small results are kept, for a caller who asks again after a restart."""
        data: dict[str, Any] = {"id": result.id, "attempt": result.attempt, "ok": result.ok}
        if not result.ok:
            data |= {"cause": result.cause, "error": result.error}
        elif len(json.dumps(result.value)) <= _RESULT_LIMIT:
            data["value"] = result.value
        self.write("task.completed", result.instance, **data)

    def due(self, seq: int, open_jobs: int) -> bool:
        """Whether so much was written since the last checkpoint that another one pays."""
        if self._checkpoint_seq is None:
            self._checkpoint_seq = seq
        return seq - self._checkpoint_seq > max(_CHECKPOINT_EVERY, 4 * open_jobs)

    def checkpoint(self, pasts: Iterable[Past]) -> None:
        """Write down every open task."""
        tasks = [
            {
                "id": past.job.id,
                "payload": json.loads(past.job.payload),
                "attempt": past.job.attempt,
                "kills": past.job.kills,
                "failures": past.job.failures,
                "instance": past.instance,
                "address": past.address,
            }
            for past in pasts
        ]
        self._checkpoint_seq = self.write(STATE, tasks=tasks)

    def replay(self) -> tuple[dict[str, Past], list[Result]]:
        """Open tasks in the order of their submission, and the results that are still known, oldest first.

        Raises:
            JournalError: The journal cannot be read, or an event of ours makes no sense.
        """
        state = self._journal.last_state(self._fleet, STATE)
        past: dict[str, Past] = {}
        ended: list[Result] = []
        event = state
        try:
            for item in state.data["tasks"] if state is not None else ():
                past[item["id"]] = _restore(item)
            for event in self._journal.read(fleet=self._fleet, after=0 if state is None else state.seq):
                if event.kind.startswith("task."):
                    _replay(event, past, ended)
        except (KeyError, TypeError, SpecError) as error:
            where = "?" if event is None else f"{event.seq} ({event.kind})"
            raise JournalError(f"event {where} of fleet {self._fleet} makes no sense: {error!r}") from error
        return past, ended


def _restore(item: Mapping[str, Any]) -> Past:
    job = new_job(item["id"], item["payload"])
    job.attempt, job.kills, job.failures = item["attempt"], list(item["kills"]), item["failures"]
    return Past(job, item["instance"], item["address"])


def _replay(event: Event, past: dict[str, Past], ended: list[Result]) -> None:
    id = event.data["id"]
    if event.kind == "task.submitted":
        past[id] = Past(new_job(id, event.data["payload"]))
        return
    if id not in past:
        return  # its submission was trimmed after it had ended
    found = past[id]
    if event.kind == "task.assigned":
        found.instance, found.address = event.instance, event.data.get("address")
        found.job.attempt = event.data["attempt"]
    elif event.kind == "task.retried":
        found.instance = None
        found.job.attempt = event.data["attempt"]
        found.job.kills = list(event.data.get("kills", ()))
        found.job.failures = event.data.get("failures", 0)
    elif event.kind in ("task.completed", "task.quarantined"):
        del past[id]
        ended.append(_result(event))


def _result(event: Event) -> Result:
    data = event.data
    missing = data.get("ok") and "value" not in data
    return Result(
        id=data["id"],
        ok=bool(data.get("ok")),
        value=data.get("value"),
        cause="result-not-kept" if missing else data.get("cause"),
        error="it succeeded, but its result was too large for the journal" if missing else data.get("error"),
        attempt=data["attempt"],
        instance=event.instance,
    )
