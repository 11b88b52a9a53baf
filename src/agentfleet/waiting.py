"""Waiting until a fleet has got somewhere: with a deadline if one is given, and never past the fleet's own end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from agentfleet.errors import DeadlineExceeded, OperationRefused, SpecError
from agentfleet.units import parse_duration, show

Timeout = float | str | None
"""How long to wait: seconds, a duration such as "30s" or "1m30s", or None for no deadline."""


def timeout_of(value: object) -> float | None:
    """A deadline in seconds from what a caller gave as `timeout`, None for none; raises `SpecError` otherwise."""
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise SpecError(f"timeout: {error}; None sets no deadline") from error


def seconds_of(value: object, name: str) -> float:
    """A span of time in seconds from what a caller gave as the argument `name`; raises `SpecError` if it is none."""
    try:
        return parse_duration(value)
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from error


def period_of(value: object, name: str) -> float:
    """Likewise for a span of more than 0 seconds."""
    seconds = seconds_of(value, name)
    if not seconds:
        raise SpecError(f"{name}: must be more than 0 seconds, not {show(value)}")
    return seconds


class Waiting:
    """Whoever waits for one fleet.

    Args:
        fleet: Name of the fleet, for messages.
    """

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet
        self._pulse = anyio.Event()
        self._scopes: set[anyio.CancelScope] = set()
        self._closed = False
        self._refusal: OperationRefused | None = None

    async def pulse(self) -> None:
        """Wait for the next beat."""
        await self._pulse.wait()

    def beat(self) -> None:
        """Let those look again who wait for the fleet to get somewhere."""
        pulse, self._pulse = self._pulse, anyio.Event()
        pulse.set()

    async def until(self, reached: Callable[[], bool], timeout: float | None, what: str) -> None:
        """Wait until something is so; looks again at each beat. Raises like `within`."""

        async def wait() -> None:
            while not reached():
                await self.pulse()

        await self.within(timeout, what, wait)

    async def within(self, timeout: float | None, what: str, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait for `wait`.

        Args:
            timeout: Seconds to wait at most; None sets no deadline.
            what: What is waited for, in words that follow "until".
            wait: Returns when it has come.

        Raises:
            DeadlineExceeded: It has not come within `timeout` seconds; what was asked for goes on.
            OperationRefused: The fleet was closed before it came.
            NotLeader: Likewise another manager leads it now.
        """
        with anyio.move_on_after(timeout) as scope:
            self._scopes.add(scope)
            try:
                return await wait()
            finally:
                self._scopes.discard(scope)
        if self._refusal is not None:
            raise self._refusal
        if self._closed or timeout is None:
            raise OperationRefused(f"fleet {self._fleet} was closed before {what}; a new Fleet on its journal goes on")
        raise DeadlineExceeded(f"fleet {self._fleet}: waited {timeout:g} s until {what}; it goes on")

    def close(self, refusal: OperationRefused | None = None) -> None:
        """End every waiting: nothing will come any more, and `refusal` says why if the fleet is not closed."""
        self._closed = True
        self._refusal = refusal
        for scope in self._scopes:
            scope.cancel()
