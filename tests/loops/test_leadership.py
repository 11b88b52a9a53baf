"""The election loop on a store in memory: leading, losing, leaving, and what writers are told."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.clock import BootClock, Clock, SystemClock
from agentfleet.core.leadership import LeaseDecision, LeasePolicy, LeaseRecord
from agentfleet.errors import BackendRefused, BackendUnavailable, DeadlineExceeded, NotLeader
from agentfleet.leadership import Leadership, Term
from agentfleet.stores.leases import MemoryLeases
from agentfleet.testing import run_virtual, virtual

POLICY = LeasePolicy()


class ReplicaClock:
    """A monotonic clock of one replica: its own date, its own speed. A stopped replica sleeps until it is continued."""

    def __init__(self, *, date: float = 0.0, speed: float = 1.0) -> None:
        self.date = date
        self.speed = speed
        self.running = anyio.Event()
        self.running.set()

    def now(self) -> float:
        return self.date + self.speed * anyio.current_time()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(max(0.0, seconds) / self.speed)
        await self.running.wait()

    def stop(self) -> None:
        self.running = anyio.Event()


class StoppableLeases(MemoryLeases):
    """The same store as one replica sees it: nothing reaches a stopped one."""

    def __init__(self, store: MemoryLeases, clock: ReplicaClock) -> None:
        super().__init__(clock=clock)
        self.store = store
        self.replica = clock

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        await self.replica.running.wait()
        answer = await self.store.get(name, timeout=timeout)
        await self.replica.running.wait()
        return answer

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        await self.replica.running.wait()
        answer = await self.store.create(name, record, timeout=timeout)
        await self.replica.running.wait()
        return answer

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        await self.replica.running.wait()
        answer = await self.store.update(name, record, timeout=timeout)
        await self.replica.running.wait()
        return answer


def store() -> MemoryLeases:
    return MemoryLeases(clock=SystemClock(0.0), latency=0.02)


def candidate(
    leases: MemoryLeases,
    *,
    clock: Clock | None = None,
    identity: str | None = None,
    on_decision: Callable[[LeaseDecision], None] | None = None,
) -> Leadership:
    clock = clock or SystemClock(0.0)
    return Leadership("f", leases, clock=clock, rng=random.Random(1), identity=identity, on_decision=on_decision)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - that is the point
        await anyio.sleep(0.01)


async def lead(leadership: Leadership, timeout: float = 30.0) -> Term:
    with anyio.fail_after(timeout):
        return await anext(aiter(leadership.terms()))


# ------------------------------------------------------------------------------------------------ one


@virtual
async def test_alone_it_leads_at_once_and_goes_on() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership, 0.2)
        assert (term.epoch, term.valid) == (1, True)
        assert leadership.leads
        assert leadership.check() is term
        assert leadership.holder == leadership.identity
        before = leases.calls
        for _ in range(600):
            await anyio.sleep(0.1)
            assert term.ensure() == 1
        assert 30 <= leases.calls - before <= 34  # one write each 1.8 to 2 s, and no reads
    assert term.over
    assert leases.history["f"][-1].holder is None


@virtual
async def test_who_does_not_lead_is_refused() -> None:
    leases = store()
    async with candidate(leases) as first:
        await lead(first)
        async with candidate(leases, identity="pod-7") as second:
            await anyio.sleep(1.0)
            with pytest.raises(NotLeader, match=f"f: pod-7-.* does not lead; {first.identity} does"):
                second.check()
            assert not second.leads
            assert second.term is None


@virtual
async def test_before_the_first_answer_nobody_leads() -> None:
    async with candidate(store()) as leadership:
        with pytest.raises(NotLeader, match="nobody is known to"):
            leadership.check()


@virtual
async def test_equal_names_are_two_identities() -> None:
    leases = store()
    async with candidate(leases, identity="same") as one, candidate(leases, identity="same") as other:
        await anyio.sleep(20.0)
        assert one.identity != other.identity
        assert one.leads != other.leads
        assert {record.epoch for record in leases.history["f"]} == {1}


@virtual
async def test_it_is_entered_once() -> None:
    leadership = candidate(store())
    async with leadership:
        pass
    with pytest.raises(RuntimeError):
        await leadership.__aenter__()


@virtual
async def test_every_decision_is_told_with_its_reason() -> None:
    told: list[LeaseDecision] = []
    async with candidate(store(), on_decision=told.append):
        await anyio.sleep(3.0)
    codes = [decision.reasons[-1].code for decision in told]
    assert codes[:3] == ["lease.look", "lease.absent", "lease.leading"]
    assert codes[-2:] == ["lease.release", "lease.left"]


# ------------------------------------------------------------------------------------------------ leaving


@virtual
async def test_who_waits_leads_within_a_second_of_a_leave() -> None:
    leases = store()
    led: list[tuple[float, int]] = []

    async def second() -> None:
        async with candidate(leases) as leadership:
            term = await lead(leadership)
            led.append((anyio.current_time(), term.epoch))

    async with anyio.create_task_group() as group, candidate(leases) as first:
        await lead(first)
        group.start_soon(second)
        await anyio.sleep(10.0)
        left = anyio.current_time()
    ((at, epoch),) = led
    assert at - left < 1.0
    assert epoch == 2


class TellingLeases(MemoryLeases):
    """Tells when a lease is given up; a look takes long enough for that to come amid it."""

    def __init__(self, *, clock: Clock, latency: float) -> None:
        super().__init__(clock=clock, latency=latency)
        self.told = anyio.Event()

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        found = await super().get(name, timeout=timeout)
        await anyio.sleep(0.3)
        return found

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        kept = await super().update(name, record, timeout=timeout)
        if record.holder is None:
            told, self.told = self.told, anyio.Event()
            told.set()
        return kept

    async def given_up(self, name: str) -> None:
        del name
        await self.told.wait()


@virtual
async def test_who_hears_of_a_leave_amid_a_look_looks_again_at_once() -> None:
    """Whatever the second one is doing when the first one leaves, it does not wait for its next look."""
    policy = LeasePolicy(poll=2.0)
    for offset in range(0, 2500, 100):
        leases = TellingLeases(clock=SystemClock(0.0), latency=0.001)
        second = Leadership("f", leases, policy=policy, clock=SystemClock(0.0), rng=random.Random(1))
        leads, leave = anyio.Event(), anyio.Event()

        async def lead_first(leases: TellingLeases, leads: anyio.Event, leave: anyio.Event) -> None:
            async with candidate(leases) as first:
                await lead(first)
                leads.set()
                await leave.wait()

        async with anyio.create_task_group() as group:
            group.start_soon(lead_first, leases, leads, leave)
            await leads.wait()
            async with second:
                await anyio.sleep(5.0 + offset / 1000)
                leave.set()
                left = anyio.current_time()
                await lead(second)
                assert anyio.current_time() - left < 0.7  # the rest of a look, and another one


@virtual
async def test_leaving_takes_the_lease_along_also_when_a_renewal_is_cut_off() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        await lead(leadership)
        leases.latency = 0.4
        await until(lambda: leadership.decision is not None and leadership.decision.action == "renew")
        await anyio.sleep(0.3)  # applied, not answered
    assert leases.history["f"][-1].holder is None


@virtual
async def test_leaving_does_not_wait_for_ever() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        await lead(leadership)
        leases.hang(1000.0)
        left = anyio.current_time()
    assert anyio.current_time() - left <= 2 * POLICY.request + POLICY.renew_deadline + 0.1


@virtual
async def test_leaving_without_a_lease_asks_nothing() -> None:
    leases = store()
    leases.hang(1000.0)
    async with candidate(leases):
        pass
    assert anyio.current_time() < 0.1


@virtual
async def test_a_write_of_unknown_fate_is_waited_for() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        with pytest.raises(DeadlineExceeded), term.writing(1.0):
            raise DeadlineExceeded("no answer")
        with pytest.raises(BackendRefused), term.writing(3.0):
            raise BackendRefused("an answer")
        with term.writing(3.0):
            pass
        left = anyio.current_time()
    assert 0.9 < anyio.current_time() - left < 1.3


@virtual
async def test_a_write_under_way_is_finished_when_its_task_is_cancelled() -> None:
    answered: list[bool] = []

    async def work(term: Term) -> None:
        with term.writing(1.0):
            await anyio.sleep(0.3)
            answered.append(True)
        await anyio.sleep(0.0)
        answered.append(False)

    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        async with anyio.create_task_group() as group:
            group.start_soon(work, term)
            await anyio.sleep(0.1)
            group.cancel_scope.cancel()
        left = anyio.current_time()
    assert answered == [True]
    assert anyio.current_time() - left < 0.2  # its fate is known: nothing to wait for


@virtual
async def test_an_error_in_the_block_comes_through_and_the_lease_is_given_up() -> None:
    leases = store()
    with pytest.raises(ZeroDivisionError):
        async with candidate(leases) as leadership:
            await lead(leadership)
            raise ZeroDivisionError
    assert leases.history["f"][-1].holder is None


@virtual
async def test_terms_end_with_the_leadership() -> None:
    async with anyio.create_task_group() as group:
        seen: list[int] = []

        async def follow(leadership: Leadership) -> None:
            seen.extend([term.epoch async for term in leadership.terms()])
            seen.append(0)

        async with candidate(store()) as leadership:
            group.start_soon(follow, leadership)
            await anyio.sleep(1.0)
    assert seen == [1, 0]


@virtual
async def test_a_held_block_ends_with_its_term() -> None:
    ended: list[bool] = []
    async with anyio.create_task_group() as group:

        async def work(term: Term) -> None:
            with term.held() as scope:
                await anyio.sleep_forever()
            ended.append(scope.cancelled_caught)
            with term.held():
                await anyio.sleep_forever()  # it is over already

        async with candidate(store()) as leadership:
            group.start_soon(work, await lead(leadership))
            await anyio.sleep(5.0)
            assert ended == []
    assert ended == [True]


# ------------------------------------------------------------------------------------------------ losing


@virtual
async def test_a_hanging_store_ends_the_acting_at_the_deadline_and_the_term_comes_back() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        leases.hang(20.0)
        hung = anyio.current_time()
        await until(lambda: not term.valid)
        assert anyio.current_time() - hung <= POLICY.renew_deadline
        assert not term.over
        with pytest.raises(NotLeader, match="lapsed"):
            leadership.check()
        with pytest.raises(NotLeader):
            term.deadline(5.0)
        await anyio.sleep(20.0)
        assert leadership.check() is term  # nobody else has led
        assert term.epoch == 1


@virtual
async def test_a_write_is_cut_off_before_the_term_lapses() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        assert term.deadline(0.5) == 0.5
        assert term.deadline(60.0) == pytest.approx(term.left)
        leases.hang(60.0)
        await anyio.sleep(1.0)
        with pytest.raises(DeadlineExceeded, match="its effect is unknown"), term.writing(60.0):
            await anyio.sleep(60.0)
        assert term.left == pytest.approx(0.0, abs=0.01)
    assert not term.valid


@virtual
async def test_what_has_too_little_time_is_not_sent() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        leases.hang(60.0)
        await anyio.sleep(term.left - 0.05)
        assert term.ensure() == 1
        with pytest.raises(NotLeader, match="lapses in"):
            term.deadline(5.0)
        assert term.deadline(0.01) == 0.01
        assert "valid for" in repr(term)


@virtual
async def test_a_partition_of_the_leader_moves_the_lead_and_no_write_is_stale() -> None:
    leases, apart = store(), ReplicaClock()
    async with candidate(StoppableLeases(leases, apart), clock=SystemClock(0.0)) as first:
        term = await lead(first)
        async with candidate(leases) as second:
            await anyio.sleep(5.0)
            apart.stop()  # its answers reach it no more
            cut = anyio.current_time()
            other = await lead(second)
            assert anyio.current_time() - cut < 8.0
            assert other.epoch == 2
            assert not term.valid
            apart.running.set()
            await anyio.sleep(3.0)
            assert term.over
            with pytest.raises(NotLeader, match="epoch 1 is over"):
                term.ensure()


@virtual
async def test_a_stopped_leader_is_refused_at_its_first_use_when_it_goes_on() -> None:
    leases, clock = store(), ReplicaClock(date=1e6)
    async with candidate(StoppableLeases(leases, clock), clock=clock) as first:
        term = await lead(first)
        async with candidate(leases) as second:
            await anyio.sleep(5.0)
            clock.stop()
            await anyio.sleep(60.0)
            assert second.leads
            with pytest.raises(NotLeader):  # before any of its tasks has run
                term.ensure()
            clock.running.set()
            await anyio.sleep(5.0)
            assert term.over
            assert second.leads


@virtual
async def test_a_foreign_error_of_the_store_is_a_failure_and_a_bug_is_not_hidden() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        term = await lead(leadership)
        leases.refuse_connection(2)
        await anyio.sleep(10.0)
        assert term.valid

    class Broken(MemoryLeases):
        async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
            raise KeyError("a bug")

    with pytest.raises(BaseExceptionGroup) as caught:
        async with candidate(Broken()):
            await anyio.sleep(10.0)
    assert caught.group_contains(KeyError)


@virtual
async def test_a_store_that_forgets_its_deadline_is_cut_off() -> None:
    class Deaf(MemoryLeases):
        async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
            await anyio.sleep_forever()
            raise AssertionError

    async with candidate(Deaf()) as leadership:
        await anyio.sleep(5.0)
        assert leadership.decision is not None
        assert any("no answer within 1 s" in reason.text for reason in leadership.decision.reasons) or (
            leadership.decision.action == "look"
        )


@virtual
async def test_a_deleted_lease_is_made_again_and_the_epoch_goes_on() -> None:
    leases = store()
    async with candidate(leases) as leadership:
        await lead(leadership)
        leases.delete("f")
        await anyio.sleep(15.0)
        assert leadership.check().epoch == 2


@pytest.mark.parametrize("fault", ["conflict", "lose_answer", "refuse_connection", "stale"])
def test_one_fault_costs_no_term(fault: str) -> None:
    async def main() -> None:
        leases = store()
        async with candidate(leases) as leadership:
            term = await lead(leadership)
            for _ in range(5):
                getattr(leases, fault)(1)
                for _ in range(60):
                    await anyio.sleep(0.1)
                    assert term.ensure() == 1

    run_virtual(main)


def test_the_boot_clock_advances_like_the_loop() -> None:
    async def main() -> None:
        clock = BootClock()
        before = clock.now()
        await clock.sleep(0.02)
        assert clock.now() - before >= 0.02

    anyio.run(main)


# ------------------------------------------------------------------------------------------------ many


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_leader_is_followed_in_less_than_eight_seconds(seed: int) -> None:
    async def main() -> None:
        rng, leases = random.Random(seed), store()
        for _ in range(10):
            clock = ReplicaClock()
            async with candidate(StoppableLeases(leases, clock), clock=clock) as first:
                await lead(first)
                async with candidate(leases) as second:
                    await anyio.sleep(rng.uniform(1, 5))
                    clock.stop()
                    killed = anyio.current_time()
                    await lead(second)
                    assert anyio.current_time() - killed < 8.0
                clock.running.set()
                await anyio.sleep(1.0)

    run_virtual(main, seed=seed)


class Register:
    """What the leaders write to: it takes everything, in the order of arrival."""

    def __init__(self) -> None:
        self.newest = 0
        self.taken = 0

    async def write(self, epoch: int, delay: float) -> None:
        await anyio.sleep(delay)
        assert epoch >= self.newest, "an old epoch has written after a new one"
        self.newest = epoch
        self.taken += 1


@asynccontextmanager
async def managed(
    leases: MemoryLeases, clock: ReplicaClock, register: Register, rng: random.Random
) -> AsyncIterator[None]:
    """A manager that writes as long as it may."""

    async def work(leadership: Leadership) -> None:
        async for term in leadership.terms():
            with term.held():
                while True:
                    try:
                        with term.writing(2.0):
                            await register.write(term.epoch, rng.uniform(0, 1.5))
                    except (NotLeader, BackendUnavailable, DeadlineExceeded):
                        await clock.sleep(0.1)

    async with anyio.create_task_group() as group:
        async with Leadership("f", StoppableLeases(leases, clock), clock=clock, rng=rng) as leadership:
            group.start_soon(work, leadership)
            yield
        group.cancel_scope.cancel()


@given(st.integers(0, 2**32), st.tuples(*[st.floats(0.75, 1.4)] * 3))
def test_no_old_epoch_ever_writes(seed: int, speeds: tuple[float, ...]) -> None:
    """Three managers, each with a clock of its own, on a store in trouble; they are stopped, continued and replaced."""

    async def main() -> None:
        rng, register = random.Random(seed), Register()
        leases = MemoryLeases(clock=SystemClock(0.0), latency=0.05, trouble=0.05, rng=rng)
        clocks = [ReplicaClock(date=rng.uniform(0, 1e6), speed=speed) for speed in speeds]

        async def lives(clock: ReplicaClock) -> None:
            while True:
                async with managed(leases, clock, register, rng):
                    await anyio.sleep(rng.uniform(1, 60))

        async def suffers() -> None:
            while True:
                await anyio.sleep(rng.uniform(0, 10))
                match rng.randrange(5):
                    case 0:
                        leases.hang(rng.uniform(0, 15))
                    case 1:
                        leases.stale(rng.randint(1, 5), by=rng.randint(1, 5))
                    case 2:
                        leases.lose_answer(rng.randint(1, 3))
                    case _:
                        clock = rng.choice(clocks)
                        if clock.running.is_set():
                            clock.stop()
                        else:
                            clock.running.set()

        with anyio.move_on_after(120.0):
            async with anyio.create_task_group() as group:
                for clock in clocks:
                    group.start_soon(lives, clock)
                group.start_soon(suffers)
        for clock in clocks:
            clock.running.set()
        epochs = [record.epoch for record in leases.history["f"]]
        assert epochs == sorted(epochs)

    run_virtual(main)
