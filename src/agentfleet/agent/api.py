"""The agent's paths: what each request means. Runs in the server's loop.

GET /health, /ready, /metrics and /status are open, for probes cannot carry credentials; giving work and reading or
changing configuration needs the token, where one is set.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from agentfleet.agent.config import Configuration, Intake
from agentfleet.agent.ledger import Ledger, Refused, Run
from agentfleet.agent.settings import Settings
from agentfleet.agent.task import Task
from agentfleet.agent.vitals import Vitals, cpu_seconds, exposition, resident_bytes
from agentfleet.agent.wire import Answer, Head

_METHODS = {
    "/health": ("GET",),
    "/ready": ("GET",),
    "/metrics": ("GET",),
    "/status": ("GET",),
    "/tasks": ("POST",),
    "/config": ("GET", "PUT"),
}
_PROTECTED = ("/tasks", "/config")
_RETRY = {"Retry-After": "1"}
_P = "agentfleet_agent_"


def encode(value: object) -> bytes:
    """JSON bytes, pure ASCII. NaN and infinity are no JSON and raise ValueError."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def describe(status: int, message: str, **more: Any) -> Answer:
    """A refusal in words."""
    return Answer(status, encode({"error": message} | more), headers=_RETRY if status in (429, 503) else {})


class Api:
    """Answers requests from the ledger, the vitals and the configuration, and takes new ones in."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        vitals: Vitals,
        config: Configuration,
        *,
        intake: Intake,
        max_waiters: int,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._vitals = vitals
        self._config = config
        self._intake = intake
        self._waiters = 0
        self._max_waiters = max_waiters
        self._credential = f"Bearer {settings.token}".encode("utf-8", "surrogateescape") if settings.token else None

    def admit(self, head: Head) -> Answer | None:
        """Refuse what can be refused before its body is read."""
        methods = _METHODS.get(head.path)
        if methods is None:
            return describe(404, "no such path; there are " + ", ".join(_METHODS))
        if head.method not in methods:
            refusal = describe(405, f"{head.path} takes {' and '.join(methods)}")
            return Answer(405, refusal.body, headers={"Allow": ", ".join(methods)})
        if "origin" in head.headers and head.path in _PROTECTED:
            # only browsers send it: no web page may give work to an agent on its reader's machine
            return describe(403, "requests from web pages are refused")
        if head.path in _PROTECTED and not self._authorized(head):
            return Answer(
                401, describe(401, "a valid bearer token is needed").body, headers={"WWW-Authenticate": "Bearer"}
            )
        if head.length is None and head.method != "GET":
            return describe(411, "send Content-Length")
        if (head.length or 0) > self._settings.max_body:
            return describe(413, f"the body may have {self._settings.max_body} bytes")
        return None

    def _authorized(self, head: Head) -> bool:
        if self._credential is None:
            return True
        given = head.headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, self._credential)

    async def handle(self, head: Head, body: bytes, gone: asyncio.Future[None]) -> Answer | None:
        """The answer to an admitted request."""
        match head.path:
            case "/health":
                reason = self._vitals.unhealthy
                return Answer(200, b'{"ok":true}') if reason is None else describe(503, reason, ok=False)
            case "/ready":
                return self._ready()
            case "/metrics":
                return Answer(200, self._metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")
            case "/status":
                return Answer(200, encode(self.status()))
            case "/tasks":
                return await self._task(body, gone)
            case _:
                if head.method == "PUT":
                    return await self._configure(body)
                return Answer(200, encode({"revision": self._config.revision, "document": dict(self._config.document)}))

    def _ready(self) -> Answer:
        if self._ledger.draining:
            return describe(503, "draining", ok=False)
        if self._vitals.unhealthy is not None:
            return describe(503, self._vitals.unhealthy, ok=False)
        return Answer(200, b'{"ok":true}')

    def status(self) -> dict[str, Any]:
        """What the agent is doing; spans are seconds."""
        ledger, vitals = self._ledger, self._vitals
        state = "draining" if ledger.draining else "busy" if ledger.running else "idle"
        return {
            "state": state,
            "in_flight": len(ledger.running),
            "queue_length": len(ledger.waiting),
            "last_progress": round(vitals.since_progress, 3),
            "completed": ledger.completed,
            "failed": ledger.failed,
            "cause": vitals.unhealthy or ledger.cause,
            "task": next(iter(ledger.running), None),
            "step": vitals.step if ledger.running else None,
            "loop_lag": round(vitals.loop_lag, 3),
            "config_revision": self._config.revision,
            "version": self._settings.version,
        }

    def _metrics(self) -> bytes:
        ledger, vitals = self._ledger, self._vitals
        samples = [
            (_P + "tasks_completed_total", "counter", "Tasks that succeeded.", ledger.completed),
            (_P + "tasks_failed_total", "counter", "Tasks that failed.", ledger.failed),
            (_P + "tasks_in_flight", "gauge", "Tasks that run now.", len(ledger.running)),
            (_P + "queue_length", "gauge", "Tasks that wait to run.", len(ledger.waiting)),
            (_P + "requests_waiting", "gauge", "Requests that wait for a task to end.", self._waiters),
            (_P + "seconds_since_progress", "gauge", "Seconds since the last progress.", vitals.since_progress),
            (_P + "loop_lag_seconds", "gauge", "How far the agent's event loop is behind.", vitals.loop_lag),
            (_P + "config_revision", "gauge", "Revision of the configuration in force.", self._config.revision),
            ("process_cpu_seconds_total", "counter", "Processor time used.", cpu_seconds()),
            ("process_resident_memory_bytes", "gauge", "Memory in use.", resident_bytes()),
            ("process_start_time_seconds", "gauge", "When the agent started, Unix time.", vitals.started_at),
        ]
        # a copy: the user's thread may add one meanwhile
        samples += [(name, "gauge", "Published by the agent.", value) for name, value in list(vitals.gauges.items())]
        return exposition(samples, self._settings.version)

    # ------------------------------------------------------------------------------------------------ tasks

    async def _task(self, body: bytes, gone: asyncio.Future[None]) -> Answer | None:
        parsed = _parse_task(body)
        if isinstance(parsed, str):
            return describe(422, parsed)
        task, resume = parsed
        if self._waiters >= self._max_waiters:
            return describe(429, "too many requests wait for tasks already")
        run = self._ledger.submit(task, resume=resume)
        if run is Refused.UNKNOWN:
            return describe(404, "this process does not know the task")
        if run is Refused.BUSY:
            return describe(429, "busy")
        if run is Refused.DRAINING:
            return describe(503, "draining")
        assert isinstance(run, Run)
        self._waiters += 1
        try:
            await asyncio.wait((run.done, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiters -= 1
        if not run.done.done() or gone.done():
            return None  # the client left; the task goes on, and its answer is kept for whoever asks again
        if run.outcome is None:
            return describe(503, "draining")
        return Answer(200, run.outcome.body, sent=lambda: self._ledger.delivered(run))

    # ------------------------------------------------------------------------------------------------ configuration

    async def _configure(self, body: bytes) -> Answer:
        proposal = _parse_config(body)
        if isinstance(proposal, str):
            return describe(422, proposal, revision=self._config.revision)
        status, why = await self._intake.offer(*proposal)
        if status != 200:
            return describe(status, why, revision=self._config.revision)
        return Answer(200, encode({"revision": proposal[0]}))


def _load(body: bytes) -> dict[str, Any] | str:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        data = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return f"the body is not JSON: {str(error)[:200]}"
    return data if isinstance(data, dict) else "the body must be a JSON object"


def _parse_task(body: bytes) -> tuple[Task, bool] | str:
    """The task, and whether it may only be resumed: joined or answered from what is kept, never begun."""
    data = _load(body)
    if isinstance(data, str):
        return data
    id, attempt = data.get("id"), data.get("attempt", 1)
    if not (isinstance(id, str) and 1 <= len(id) <= 256 and id.isprintable()):
        return "id must be 1 to 256 printable characters"
    if type(attempt) is not int or not 1 <= attempt <= 1_000_000:
        return "attempt must be a whole number from 1"
    resume = data.get("resume", False)
    return (Task(id, data.get("payload"), attempt), resume) if isinstance(resume, bool) else "resume must be a boolean"


def _parse_config(body: bytes) -> tuple[int, dict[str, Any]] | str:
    data = _load(body)
    if isinstance(data, str):
        return data
    revision, document = data.get("revision"), data.get("document")
    if type(revision) is not int or not 1 <= revision < 2**63:
        return "revision must be a whole number from 1"
    return (revision, document) if isinstance(document, dict) else "document must be a JSON object"
