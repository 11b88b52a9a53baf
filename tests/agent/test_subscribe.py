"""What an agent that fetches its configuration makes of it, in virtual time and without a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agentfleet.agent.subscribe import RETRY, Subscription
from agentfleet.testing import run_virtual

CALLBACK = 30.0
"""Seconds after which a callback that does not return is given up."""


class Slow:
    """An agent whose callback takes too long, the first times."""

    def __init__(self, seed: int, silent: int) -> None:
        self.silent = silent
        self.offered: list[tuple[float, int]] = []
        self.running = 0
        self.warnings: list[str] = []
        self.subscription = Subscription(
            "http://manager/",
            "a",
            offer=self._offer,
            running=lambda: self.running,
            warn=self.warnings.append,
            rng=random.Random(seed),
        )

    async def _offer(self, revision: int, _document: Mapping[str, Any]) -> tuple[int, str]:
        self.offered.append((asyncio.get_running_loop().time(), revision))
        if len(self.offered) <= self.silent:
            await asyncio.sleep(CALLBACK)
            return 504, "on_config did not return in time"
        self.running = revision
        return 200, ""

    def arrives(self, revision: int) -> None:
        self.subscription._take("", json.dumps({"revision": revision, "document": {}}).encode())

    async def judges(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.subscription._judge()


def test_a_callback_that_is_too_slow_is_no_refusal_and_is_called_again() -> None:
    run_virtual(_is_called_again)


async def _is_called_again() -> None:
    pauses = []
    for seed in range(20):
        agent = Slow(seed, silent=4)
        agent.arrives(7)
        judging = asyncio.create_task(agent.judges(4 * (CALLBACK + RETRY[1]) + 1))
        await asyncio.sleep(CALLBACK + 0.5)
        assert agent.subscription._said() == (0, 0), "silence is neither proof nor failure"
        assert agent.subscription.heard.is_set()
        await judging
        assert (agent.running, agent.subscription._said()) == (7, (7, 0))
        times = [at for at, _ in agent.offered]
        pauses += [later - earlier - CALLBACK for earlier, later in itertools.pairwise(times)]
        assert len(times) == 5, "and once more only"
        assert len(agent.warnings) == 1, "it is told once"
    assert min(pauses) >= 0
    assert RETRY[0] < max(pauses) <= RETRY[1], "more rarely, up to a bound"
    assert len({round(each, 6) for each in pauses}) == len(pauses), "a thousand do not call at one time"


def test_what_is_newer_is_judged_instead_of_what_had_no_answer() -> None:
    run_virtual(_what_is_newer_is_judged)


async def _what_is_newer_is_judged() -> None:
    agent = Slow(1, silent=1)
    agent.arrives(7)
    judging = asyncio.create_task(agent.judges(100))
    await asyncio.sleep(CALLBACK / 2)
    agent.arrives(8)
    await judging
    assert [revision for _, revision in agent.offered] == [7, 8]
    assert (agent.running, agent.subscription._said()) == (8, (8, 0))
