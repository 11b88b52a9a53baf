"""Asking one instance how it is: HTTP, TCP, and your own functions, each answered with a `Probed`."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import anyio

from agentfleet.clock import Clock
from agentfleet.core.evidence import Probed
from agentfleet.errors import DeadlineExceeded, SpecError
from agentfleet.instances import AgentStatus, Instance
from agentfleet.signals.http import HttpClient, HttpError, connect_check
from agentfleet.specs import Check, CustomCheck, HttpCheck, TcpCheck

STATUS_PATH = "/status"
_STATES = frozenset({"idle", "busy", "draining"})
_LONGEST_TEXT = 256
"""Characters kept of an agent's words: a thousand agents' statuses must stay small."""
_LARGEST_COUNT = 2**63


class Prober(Protocol):
    """Asks one instance. An answer that is late, wrong or missing is a failed probe, never an exception."""

    async def probe(self, instance: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        """Perform `check`, which is number `index` of its policy, within the check's deadline.

        Args:
            instance: Whom to ask.
            index: Returned in the answer.
            check: What to ask; heartbeats are not asked for.
            credential: Bearer token that the instance wants to see.
        """
        ...


class SocketProber:
    """Asks over the network, and calls custom checks.

    Args:
        http: Keeps the connections; the caller closes it.
        clock: Dates the answers and measures latency.
    """

    def __init__(self, http: HttpClient, clock: Clock) -> None:
        self._http = http
        self._clock = clock

    async def probe(self, instance: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        """Perform one check; see `Prober.probe`."""
        start = self._clock.now()
        status: AgentStatus | None = None
        error: str | None = None
        try:
            if isinstance(check, HttpCheck):
                status, error = await self._ask(_address(instance), check, credential)
            elif isinstance(check, TcpCheck):
                await connect_check(_address(instance), check.deadline)
            elif isinstance(check, CustomCheck):
                error = await call_check(check, instance)
            else:
                error = "heartbeats come by themselves and cannot be asked for"
        except (HttpError, DeadlineExceeded, SpecError) as failure:
            error = str(failure)
        now = self._clock.now()
        return Probed(index, error is None, now, now - start, 0.0, error, status)

    async def _ask(
        self, address: str, check: HttpCheck, credential: str | None
    ) -> tuple[AgentStatus | None, str | None]:
        """What the agent says of itself, if asked, and what is wrong with the answer, if anything."""
        headers = {"Authorization": f"Bearer {credential}"} if credential is not None else None
        response = await self._http.request("GET", address, check.path, headers=headers, timeout=check.deadline)
        asks_status = check.path.partition("?")[0] == STATUS_PATH
        status = parse_status(response.body) if asks_status else None
        if 200 <= response.status < 400:
            return status, None
        return status, f"GET {check.path} of {address} answered {response.status}"


def parse_status(body: bytes) -> AgentStatus | None:
    """What an agent says at GET /status; None if it is no JSON object.

    Unknown keys are ignored and a value of the wrong kind counts as absent, because agents of many versions and
    languages answer here, and one bad field must not hide the others.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # JSON, UTF-8 and digits beyond reason are all ValueErrors
        return None
    if not isinstance(data, dict):
        return None
    state = data.get("state")
    return AgentStatus(
        state=state if isinstance(state, str) and state in _STATES else "idle",
        in_flight=_count(data, "in_flight") or 0,
        queue_length=_count(data, "queue_length") or 0,
        last_progress=_span(data, "last_progress"),
        completed=_count(data, "completed") or 0,
        failed=_count(data, "failed") or 0,
        cause=_text(data, "cause"),
        task=_text(data, "task"),
        config_revision=_count(data, "config_revision"),
        version=_text(data, "version"),
    )


def _count(data: Mapping[str, Any], name: str) -> int | None:
    value = data.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT else None


def _span(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LARGEST_COUNT:
        return None
    return float(value) if math.isfinite(value) else None


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    return value[:_LONGEST_TEXT] if isinstance(value, str) else None


def _address(instance: Instance) -> str:
    if instance.address is None:
        raise SpecError("it has no address yet")
    return instance.address


async def call_check(check: CustomCheck, instance: Instance) -> str | None:
    """Call the user's function within the check's deadline; what is wrong, or None.

    A plain function is called directly and must not block; one that waits for anything is written `async`.
    """
    with anyio.move_on_after(check.deadline):
        try:
            answer = _function(check.call)(instance)
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:  # noqa: BLE001 - the boundary to foreign code: whatever it raises is its verdict
            return f"{check.call if isinstance(check.call, str) else 'the custom check'} raised {error!r}"[:500]
        return None if answer else "the custom check said no"
    return f"the custom check did not answer within {check.deadline:g} s"


def _function(call: Callable[..., Any] | str) -> Callable[..., Any]:
    return _imported(call) if isinstance(call, str) else call


@functools.lru_cache(maxsize=256)
def _imported(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is not callable")
    return found  # type: ignore[no-any-return]
