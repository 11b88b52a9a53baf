"""Three candidates, one store, and everything that can go wrong between them: who may act when.

Time is played in small steps. Each candidate has a monotonic clock of its own, at any date and at a speed that may
change but is never more than `LeasePolicy.drift` times another's. Requests and answers are lost, late, or old.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentfleet.core.leadership import (
    Action,
    Failed,
    LeaseDecision,
    LeaseMemory,
    LeaseObserved,
    LeasePolicy,
    LeaseRecord,
    Looked,
    News,
    Refused,
    Wrote,
    decide,
)

POLICY = LeasePolicy()
STEP = 0.1
SLOWEST, FASTEST = 0.7, 1.4
PATIENCE = 2 * POLICY.duration / SLOWEST
"""Seconds of calm after which somebody leads: what is silent has been listened to, at worst from the beginning."""
OLD_REQUESTS = round(2 * POLICY.duration / SLOWEST / STEP)
"""Steps of calm after which no request from before is under way any more."""
MODES = ("well", "slow", "hang", "lost", "late", "stale", "unavailable", "conflict")

whom = st.integers(0, 2)
speeds = st.sampled_from([SLOWEST, FASTEST]) | st.floats(SLOWEST, FASTEST)


class Store:
    """A lease under compare-and-set, and the whole of its history."""

    def __init__(self) -> None:
        self.states: list[LeaseRecord] = []
        self.late: deque[LeaseRecord] = deque()

    def write(self, record: LeaseRecord) -> LeaseRecord | None:
        """The new state, None if the version is not the present one."""
        present = self.states[-1] if self.states else LeaseRecord(None, 0)
        if record.version != present.version:
            return None
        self.states.append(replace(record, version=f"v{len(self.states) + 1}", uid="u", taken=False))
        return self.states[-1]

    def read(self, back: int = 0) -> LeaseRecord | None:
        return self.states[max(0, len(self.states) - 1 - back)] if self.states else None


@dataclass
class Candidate:
    """One process: its clock, what it remembers, and the request that it waits for."""

    identity: str
    clock: float
    speed: float
    memory: LeaseMemory = field(default_factory=LeaseMemory)
    news: News | None = None
    wake: float = float("-inf")
    asked: LeaseDecision | None = None
    sent_at: float = 0.0
    answer: News | None = None
    mode: str = "well"
    stopped: bool = False
    leaving: bool = False

    @property
    def may_act(self) -> bool:
        return self.memory.epoch is not None and self.clock < self.memory.valid_until


class Election(RuleBasedStateMachine):
    """The machine."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.candidates: list[Candidate] = []
        self.born = 0
        self.written = 0
        """The highest epoch that has written anything."""
        self.luck = 0

    @initialize(speeds=st.tuples(*[speeds] * 3), dates=st.tuples(*[st.floats(0, 1e6)] * 3))
    def begin(self, speeds: tuple[float, ...], dates: tuple[float, ...]) -> None:
        self.candidates = [self.newborn(date, speed) for date, speed in zip(dates, speeds, strict=True)]

    def newborn(self, clock: float, speed: float) -> Candidate:
        self.born += 1
        return Candidate(f"c{self.born}", clock, speed)

    # ---------------------------------------------------------------------------------------- what happens

    @rule(seconds=st.floats(STEP, 12.0))
    def time_passes(self, seconds: float) -> None:
        for _ in range(max(1, round(seconds / STEP))):
            self.step()

    @rule(who=whom, mode=st.sampled_from(MODES))
    def trouble(self, who: int, mode: str) -> None:
        self.candidates[who].mode = mode

    @rule(mode=st.sampled_from(MODES))
    def trouble_for_all(self, mode: str) -> None:
        for candidate in self.candidates:
            candidate.mode = mode

    @rule(who=whom, speed=speeds)
    def another_speed(self, who: int, speed: float) -> None:
        self.candidates[who].speed = speed

    @rule(who=whom)
    def stop_or_continue(self, who: int) -> None:
        self.candidates[who].stopped = not self.candidates[who].stopped

    @rule(who=whom)
    def kill(self, who: int) -> None:
        before = self.candidates[who]
        self.candidates[who] = self.newborn(before.clock, before.speed)

    @rule(who=whom)
    def leave(self, who: int) -> None:
        candidate = self.candidates[who]
        candidate.leaving = True
        candidate.memory = replace(candidate.memory, valid_until=float("-inf"))  # its writers were stopped first
        candidate.wake = float("-inf")

    @rule(mode=st.sampled_from(MODES), slow=st.booleans())
    def the_leader_is_cut_off_while_its_clock_is_slow(self, mode: str, slow: bool) -> None:
        """The worst case of all: the others' clocks are fast."""
        if slow:
            self.trouble_for_all("slow")
            self.time_passes(5.0)
        for candidate in self.candidates:
            leads = candidate.may_act
            candidate.speed = SLOWEST if leads else FASTEST
            candidate.mode = mode if leads else "well"
        self.time_passes(12.0)

    @precondition(lambda self: self.store.late)
    @rule()
    def a_late_write_arrives(self) -> None:
        self.store.write(self.store.late.popleft())

    @rule()
    def calm(self) -> None:
        """Everything works again: in time somebody leads, and goes on leading."""
        for candidate in self.candidates:
            candidate.mode, candidate.stopped = "well", False
        for _ in range(OLD_REQUESTS):  # a leader may lapse while it waits for answers that were lost before
            self.step()
        waited = 0.0
        while not any(candidate.may_act for candidate in self.candidates):
            assert waited < PATIENCE
            waited += STEP
            self.step()
        (leader,) = (candidate for candidate in self.candidates if candidate.may_act)
        for _ in range(100):
            self.step()
            assert leader.may_act
            assert leader in self.candidates

    # ---------------------------------------------------------------------------------------- how it is played

    def step(self) -> None:
        for candidate in self.candidates:
            candidate.clock += STEP * candidate.speed
        self.at_most_one_may_act()
        for number, candidate in enumerate(self.candidates):
            if not candidate.stopped and not self.act(candidate):
                self.candidates[number] = self.newborn(candidate.clock, candidate.speed)
            self.at_most_one_may_act()

    def act(self, candidate: Candidate) -> bool:
        """What a process does in a step; False when it has left."""
        if candidate.asked is not None:
            waited = candidate.clock - candidate.sent_at
            if waited < (0.8 if candidate.mode == "slow" else 0.0 if candidate.answer else POLICY.request):
                return True
            candidate.news = candidate.answer or Failed("no answer")
            candidate.asked = candidate.answer = None
        elif candidate.clock < candidate.wake:
            return True
        self.luck = (self.luck * 5 + 3) % 8
        observed = LeaseObserved(candidate.identity, candidate.news, self.luck / 8, candidate.leaving)
        decision, candidate.memory = decide(POLICY, observed, candidate.memory, candidate.clock)
        candidate.news = None
        if candidate.leaving:
            candidate.memory = replace(candidate.memory, valid_until=float("-inf"))
        if decision.action is Action.DONE:
            return False
        if decision.action is Action.HOLD:
            assert decision.wake > candidate.clock
            candidate.wake = decision.wake
        else:
            candidate.asked, candidate.sent_at = decision, candidate.clock
            candidate.answer = self.answered(candidate, decision.write)
        return True

    def answered(self, candidate: Candidate, write: LeaseRecord | None) -> News | None:
        match candidate.mode:
            case "hang":
                return None
            case "unavailable":
                return Failed("connection refused")
            case "conflict" if write is not None:
                return Refused()
            case "late" if write is not None:
                self.store.late.append(write)
                return None
        if write is None:
            return Looked(self.store.read(3 if candidate.mode == "stale" else 0))
        stored = self.store.write(write)
        if candidate.mode == "lost":
            return None
        return Refused() if stored is None else Wrote(stored, candidate.sent_at)

    # ---------------------------------------------------------------------------------------- what holds

    @invariant()
    def at_most_one_may_act(self) -> None:
        """One writes at a time, and with an epoch that no earlier one has passed."""
        leaders = [candidate for candidate in self.candidates if candidate.may_act]
        assert len(leaders) <= 1
        for leader in leaders:
            assert leader.memory.epoch is not None
            assert leader.memory.epoch >= self.written
            self.written = leader.memory.epoch

    @invariant()
    def epochs_rise_with_each_holder(self) -> None:
        """By one with each take-over, and at no other time."""
        holder, epoch = None, 0
        for state in self.store.states:
            if state.holder is not None and (state.holder != holder or state.epoch != epoch):
                assert state.epoch == epoch + 1
            else:
                assert state.epoch == epoch
            holder, epoch = state.holder, state.epoch


Election.TestCase.settings = settings(stateful_step_count=40)
TestElection = Election.TestCase

records = st.builds(
    LeaseRecord,
    holder=st.sampled_from(["me", "other", None]),
    epoch=st.integers(0, 5),
    duration=st.floats(0, 100),
    version=st.sampled_from(["v1", "v2", "v3"]),
    uid=st.sampled_from(["u1", "u2"]),
)
histories = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.one_of(
            st.none(),
            st.builds(Looked, st.none() | records),
            st.just(Refused()),
            st.just(Failed("no")),
            st.just("accepted"),
        ),
        st.floats(0, 1),
        st.booleans(),
    ),
    max_size=40,
)


@given(histories)
def test_whatever_the_store_says(history: list[tuple[float, News | str | None, float, bool]]) -> None:
    """Also for answers that no store could give: pure, it never waits for the past, acts only on writes of its own."""
    memory, now, sent_at = LeaseMemory(), 50.0, 50.0
    last: LeaseDecision | None = None
    for gap, told, luck, leaving in history:
        now += gap
        news = None if isinstance(told, str) else told
        if isinstance(told, str) and last is not None and last.write is not None:
            news = Wrote(replace(last.write, version=f"w{now}", uid="u1"), sent_at)
        observed = LeaseObserved("me", news, luck, leaving)
        before = memory
        decision, memory = decide(POLICY, observed, memory, now)
        assert (decision, memory) == decide(POLICY, observed, before, now)
        assert decision.reasons
        assert (decision.wake > now) if decision.action is Action.HOLD else (decision.wake == now)
        assert decision.valid_until <= max(before.valid_until, sent_at + POLICY.renew_deadline)
        assert (decision.epoch is not None) or decision.valid_until == float("-inf")
        if memory.epoch is not None and memory.epoch != before.epoch:
            assert isinstance(news, Wrote)
            assert memory.epoch > before.highest
        if decision.write is not None and decision.action is Action.ACQUIRE:
            assert decision.write.epoch == memory.highest + 1
        last, sent_at = decision, now
