"""The rate limit in front of an API server, in virtual time."""

from __future__ import annotations

from collections import Counter

import anyio

from agentfleet.backends.kubernetes.limits import TokenBucket
from agentfleet.testing import virtual


class Callers:
    """Pass a bucket all at once, as far as it lets them; notes when and in which order."""

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        self.passed: list[tuple[int, float]] = []

    async def call(self, number: int) -> None:
        await self.bucket.take()
        self.passed.append((number, round(anyio.current_time(), 3)))

    @property
    def times(self) -> list[float]:
        return [at for _, at in self.passed]


@virtual
async def test_a_burst_passes_at_once_and_the_rest_at_the_rate_in_order() -> None:
    callers = Callers(TokenBucket(qps=50, burst=5))
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(callers.call, number)
            await anyio.lowlevel.checkpoint()
    assert callers.passed == [(number, max(0, number - 4) / 50) for number in range(10)]
    assert round(callers.bucket.waited, 3) == round(sum(callers.times), 3)
    await anyio.sleep(60.0)
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(callers.call, number)
    assert Counter(callers.times[10:])[callers.times[10]] == 5, "a rest brings back one burst, and no more"


@virtual
async def test_a_server_that_asks_to_be_left_alone_is_by_those_who_wait_already() -> None:
    callers = Callers(TokenBucket(qps=50, burst=5))
    async with anyio.create_task_group() as tasks:
        for number in range(30):
            tasks.start_soon(callers.call, number)
        await anyio.sleep(0.05)
        callers.bucket.hold(2.0)
        await anyio.sleep(1.0)
        callers.bucket.hold(0.5)  # which ends before
    before = [at for at in callers.times if at < 0.05]
    after = callers.times[len(before) :]
    assert len(before) == 7
    assert after == [round(2.05 + number / 50, 3) for number in range(23)], "one after the other"


@virtual
async def test_a_rest_that_the_server_asked_for_brings_no_burst() -> None:
    callers = Callers(TokenBucket(qps=10, burst=100))
    callers.bucket.hold(3.0)
    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(callers.call, number)
    assert callers.times == [3.0, 3.1, 3.2, 3.3]


@virtual
async def test_who_gives_up_waiting_takes_nobodys_turn() -> None:
    callers = Callers(TokenBucket(qps=1, burst=1))
    async with anyio.create_task_group() as tasks:
        await callers.call(0)
        with anyio.move_on_after(0.5):
            await callers.call(1)
        tasks.start_soon(callers.call, 2)
    assert callers.passed == [(0, 0.0), (2, 1.0)]
