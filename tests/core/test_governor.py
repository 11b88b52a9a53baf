"""The disruption governor: what it lets through, whatever is asked of it and whatever happens meanwhile."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from agentfleet.core import governor
from agentfleet.core.governor import (
    STORM_MINIMUM,
    Cause,
    Disruption,
    GovernorDecision,
    GovernorMemory,
    GovernorObserved,
    surviving,
)
from agentfleet.disruptions import Disruptions, InFlight
from agentfleet.specs import RecoveryPolicy

RANK = list(Cause)
TENTHS = st.integers(0, 1000).map(lambda tenths: tenths / 10)


def policies() -> st.SearchStrategy[RecoveryPolicy]:
    shares = st.sampled_from([0, 1, 2, 5, "0%", "1%", "10%", "34%", "100%"])
    cooldowns = st.sampled_from([0.0, 0.1, 0.7, 30.0])
    return st.builds(
        RecoveryPolicy,
        max_disrupted=shares,
        freeze_below=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        cooldown=cooldowns,
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """A fleet's counts, the slots that have proved themselves, and what is asked."""

    desired: int
    good: int
    sick: int
    restored: tuple[int, ...] = ()
    asked: tuple[Disruption, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """The governor's brake and the book of disruptions that its caller keeps."""

    in_flight: tuple[InFlight, ...] = ()
    frozen_at: float | None = None
    calm_since: float | None = None

    @property
    def brake(self) -> GovernorMemory:
        return GovernorMemory(self.frozen_at, self.calm_since)


def decide(policy: RecoveryPolicy, seen: Seen, memory: Memory, now: float) -> tuple[GovernorDecision, Memory]:
    """One decision with the book kept around it, as a fleet's turn keeps it."""
    book = Disruptions(lambda _slot, _entry: None)
    book.restore(memory.in_flight)
    book.end(seen.restored)
    book.keep_newest(surviving(len(book), seen.desired, seen.good))
    known = frozenset(request.slot for request in seen.asked if request.slot in book)
    observed = GovernorObserved(seen.desired, seen.good, seen.sick, len(book), known, seen.asked)
    decision, brake = governor.decide(policy, observed, memory.brake, now)
    book.end(decision.ended)
    for request in decision.begun:
        book.begin(request.slot, request.cause, now)
    return decision, Memory(book.entries(), brake.frozen_at, brake.calm_since)


def requests(slots: int = 20) -> st.SearchStrategy[Disruption]:
    return st.builds(
        Disruption,
        slot=st.integers(0, slots),
        cause=st.sampled_from(Cause),
        serving=st.booleans(),
        surplus=st.booleans(),
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[RecoveryPolicy, Seen, Memory, float]:
    """Any input at all, plausible or not."""
    now = draw(TENTHS)
    flying = draw(st.lists(st.integers(0, 20), unique=True, max_size=6))
    frozen_at = draw(st.none() | st.floats(0, 1).map(lambda part: now * part))
    calm = draw(st.none() | st.floats(0, 1).map(lambda part: now * part)) if frozen_at is not None else None
    memory = Memory(tuple(InFlight(slot, draw(st.sampled_from(Cause)), 0.0) for slot in flying), frozen_at, calm)
    observed = Seen(
        desired=draw(st.integers(0, 30)),
        good=draw(st.integers(0, 30)),
        sick=draw(st.integers(0, 30)),
        restored=tuple(draw(st.lists(st.integers(0, 20), max_size=4))),
        asked=tuple(draw(st.lists(requests(), max_size=12))),
    )
    return draw(policies()), observed, memory, now


def through_json(memory: Memory) -> Memory:
    """The memory as a journal gives it back, the book entry by entry."""
    brake = GovernorMemory.from_dict(json.loads(json.dumps(memory.brake.to_dict())))
    book = [(each.slot, json.loads(json.dumps(each.to_dict()))) for each in memory.in_flight]
    return Memory(tuple(InFlight.from_dict(slot, data) for slot, data in book), brake.frozen_at, brake.calm_since)


def ask(
    policy: RecoveryPolicy,
    *asked: Disruption,
    desired: int,
    good: int,
    sick: int = 0,
    memory: Memory | None = None,
    restored: tuple[int, ...] = (),
    now: float = 0.0,
) -> tuple[GovernorDecision, Memory]:
    observed = Seen(desired, good, sick, restored, asked)
    return decide(policy, observed, memory or Memory(), now)


def codes(decision: GovernorDecision) -> list[str]:
    return [reason.code for _, reason in decision.held]


# ---------------------------------------------------------------------------------------------- one decision


@given(situations())
def test_a_decision_is_a_function_of_its_arguments(
    case: tuple[RecoveryPolicy, Seen, Memory, float],
) -> None:
    """The same input gives the same output, leaves the input as it was, and the memory survives JSON unchanged."""
    policy, observed, memory, now = case
    kept = copy.deepcopy((observed, memory))
    first = decide(policy, observed, memory, now)
    assert decide(policy, observed, memory, now) == first
    assert (observed, memory) == kept
    assert through_json(memory) == memory
    assert through_json(first[1]) == first[1]


@given(situations())
def test_every_request_is_answered_once_and_every_refusal_explained(
    case: tuple[RecoveryPolicy, Seen, Memory, float],
) -> None:
    """What is asked is either admitted or held; what is held, and every freeze, carries a code and a sentence."""
    policy, observed, memory, now = case
    decision, after = decide(policy, observed, memory, now)
    answered = [*decision.admitted, *(request for request, _ in decision.held)]
    assert sorted(answered, key=repr) == sorted(observed.asked, key=repr)
    assert all(reason.code.startswith("governor.") and reason.text for _, reason in decision.held)
    assert not decision.frozen or decision.reasons
    assert bool(decision.reasons) or (memory.frozen_at is None) is (after.frozen_at is None)


@given(situations())
def test_the_laws_hold_for_any_single_decision(
    case: tuple[RecoveryPolicy, Seen, Memory, float],
) -> None:
    """Budget, floor, storm and priority hold for any input, even for one that no fleet could produce."""
    decision, after = decide(*case)
    check_decision(case, decision, after)


@given(situations())
def test_waking_when_told_finds_something_to_do(
    case: tuple[RecoveryPolicy, Seen, Memory, float],
) -> None:
    """A wake-up lies ahead, and at that instant the brake has changed: no spinning, and no date that is missed."""
    policy, observed, memory, now = case
    decision, after = decide(policy, observed, memory, now)
    if decision.wake is None:
        return
    assert decision.wake > now
    later, latest = decide(policy, replace(observed, asked=(), restored=()), after, decision.wake)
    assert later.wake is None or later.wake > decision.wake
    half_open = after.frozen_at is not None and now < after.frozen_at + policy.cooldown <= decision.wake
    assert half_open or latest.frozen_at is None


def check_decision(
    case: tuple[RecoveryPolicy, Seen, Memory, float],
    decision: GovernorDecision,
    after: Memory,
) -> None:
    """The laws that a single decision must keep."""
    policy, observed, memory, now = case
    before = {item.slot for item in memory.in_flight} - set(observed.restored)
    flying = {item.slot for item in after.in_flight}
    new = [item for item in after.in_flight if item.slot not in before]
    assert decision.in_flight == len(after.in_flight) == len(flying)
    assert decision.budget == policy.budget(observed.desired)

    # budget: what is added fits into it; what was above it may stay, and does not grow
    assert not new or len(flying) <= decision.budget

    # floor: replay the admissions; each serving one leaves enough, or was more than enough
    good = observed.good
    for request in decision.admitted:
        if request.serving:
            good -= 1
            assert good >= observed.desired - decision.budget or (request.surplus and good >= observed.desired)

    # nothing is admitted beside the books
    for request in decision.admitted:
        assert request.surplus or request.slot in flying or request.slot in {r.slot for r in _surplus(decision)}

    # storm: before the cool-down only the operator; after it one at a time; no machine shrinks the fleet
    if after.frozen_at is not None:
        machines = [item for item in new if item.cause is not Cause.OPERATOR]
        if now < after.frozen_at + policy.cooldown:
            assert not machines
        assert not machines or len(flying) == 1
        assert not [r for r in decision.admitted if r.surplus and r.cause is Cause.SCALING]

    # priority: served by rank, and nobody passes one who waits for the budget
    ranks = [RANK.index(request.cause) for request in decision.admitted]
    assert ranks == sorted(ranks)
    waiting = [r for r, why in decision.held if why.code == "governor.budget"]
    first = min((RANK.index(r.cause) for r in waiting), default=None)
    assert first is None or all(RANK.index(item.cause) <= first for item in new)


def _surplus(decision: GovernorDecision) -> list[Disruption]:
    return [request for request in decision.admitted if request.surplus]


# ---------------------------------------------------------------------------------------------- a fleet under fire


class GovernedFleet(RuleBasedStateMachine):
    """A small fleet with sick, dead and good instances, whose every disruption asks the governor.

    The model keeps its own book of disruptions: a slot is entered when a request for it is admitted, and struck out
    when it is good again, is wanted no more, or (oldest first) when the fleet is not short of that many.
    """

    @initialize(policy=policies(), desired=st.integers(0, 24), bad=st.integers(0, 24))
    def start(self, policy: RecoveryPolicy, desired: int, bad: int) -> None:
        self.policy = policy
        self.desired = desired
        self.slots = {slot: "sick" if slot < bad else "good" for slot in range(desired)}
        self.now = 0.0
        self.memory = Memory()
        self.book: list[int] = []
        self.restored: set[int] = set()
        self.next_slot = desired

    # ---- the world

    def _count(self, state: str) -> int:
        return sum(1 for each in self.slots.values() if each == state)

    def _become(self, slot: int, state: str) -> None:
        self.slots[slot] = state
        if state == "good":
            self.restored.add(slot)

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 15.0, 30.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data(), state=st.sampled_from(["sick", "dead", "good"]), many=st.booleans())
    def fate(self, data: st.DataObject, state: str, many: bool) -> None:
        """Instances fall sick, die or recover by themselves, one or many."""
        if self.slots:
            chosen = data.draw(st.sets(st.sampled_from(sorted(self.slots)), max_size=len(self.slots) if many else 1))
            for slot in chosen:
                self._become(slot, state)

    @rule()
    def settle(self) -> None:
        """What was started comes up."""
        for slot, state in self.slots.items():
            if state in ("starting", "dead"):  # dead ones are started without asking: that disrupts nobody
                self._become(slot, "good")

    @rule(desired=st.integers(0, 24))
    def resize(self, desired: int) -> None:
        """Growth is carried out at once, for nobody is disrupted by it; shrinking has to ask."""
        self.desired = desired
        while len(self.slots) < desired:
            self.slots[self.next_slot] = "starting"
            self.next_slot += 1

    # ---- asking

    def _request(self, slot: int, cause: Cause, *, surplus: bool = False) -> Disruption:
        return Disruption(slot, cause, serving=self.slots[slot] == "good", surplus=surplus)

    @rule(data=st.data(), json_between=st.booleans())
    def turn(self, data: st.DataObject, json_between: bool) -> None:
        """Everybody asks for what they please."""
        asked = [self._request(slot, Cause.RECOVERY) for slot, state in self.slots.items() if state == "sick"]
        if self.slots:
            some = st.lists(st.sampled_from(sorted(self.slots)), max_size=4)
            for cause in (Cause.SCALING, Cause.ROLLOUT, Cause.OPERATOR):
                chosen = data.draw(some) if cause is not Cause.SCALING else []
                retired = data.draw(st.booleans()) and cause is Cause.ROLLOUT
                asked += [self._request(slot, cause, surplus=retired) for slot in chosen]
            excess = len(self.slots) - self.desired
            if excess > 0:
                leaving = sorted(self.slots, reverse=True)[:excess]
                asked += [self._request(slot, Cause.SCALING, surplus=True) for slot in leaving]
        order = data.draw(st.permutations(asked))
        if json_between:
            self.memory = through_json(self.memory)
        self._decide(tuple(order))

    def _decide(self, asked: tuple[Disruption, ...]) -> GovernorDecision:
        observed = Seen(
            self.desired, self._count("good"), self._count("sick") + self._count("dead"), tuple(self.restored), asked
        )
        decision, after = decide(self.policy, observed, self.memory, self.now)
        check_decision((self.policy, observed, self.memory, self.now), decision, after)
        self.book = [slot for slot in self.book if slot not in self.restored]
        short = max(0, self.desired - observed.good)
        self.book = self.book[max(0, len(self.book) - short) :]
        before = set(self.book)
        self.restored = set()
        gone: set[int] = set()
        for request in decision.admitted:
            good = self._count("good")
            if request.slot in gone:
                continue
            if request.surplus and (not request.serving or good > self.desired):
                gone.add(request.slot)
                self.book = [slot for slot in self.book if slot != request.slot]
            else:
                if request.slot not in self.book:
                    self.book.append(request.slot)
                if self.slots[request.slot] == "good":
                    assert good - 1 >= self.desired - decision.budget
            if request.surplus and len(self.slots) > self.desired:
                gone.add(request.slot)
                del self.slots[request.slot]
            else:  # restarted, replaced, or retired and filled again
                self.slots[request.slot] = "starting"
        # the law itself: our own disruptions fit into the budget, at every instant
        assert len(set(self.book) - before) == 0 or len(self.book) <= decision.budget
        self.memory = after
        event(f"frozen={decision.frozen}")
        return decision

    # ---- the end of all faults

    @precondition(lambda self: hasattr(self, "policy"))
    @rule()
    def faults_stop(self) -> None:
        """When faults stop, everything sick is healed, the fleet thaws, and whoever asks is served in the end."""
        for _ in range(200):
            decision = self._decide(
                (
                    *(self._request(slot, Cause.RECOVERY) for slot, state in self.slots.items() if state == "sick"),
                    *(
                        self._request(slot, Cause.SCALING, surplus=True)
                        for slot in sorted(self.slots, reverse=True)[: max(0, len(self.slots) - self.desired)]
                        if self.slots[slot] != "sick"
                    ),
                )
            )
            if self.policy.budget(self.desired) == 0:
                assert all(request.surplus for request in decision.admitted)
                return  # documented: a budget of 0 lets nothing be disrupted, ever
            self.settle()
            self.resize(self.desired)
            self.now = max(self.now + 0.1, decision.wake or 0.0)
            healthy = all(state == "good" for state in self.slots.values()) and len(self.slots) == self.desired
            if healthy and not decision.frozen:
                break
        else:
            raise AssertionError(f"no convergence: {self.slots} {self.memory}")
        for cause in Cause:
            if self.slots:
                slot = min(self.slots)
                assert self._decide((self._request(slot, cause),)).admitted
                self.settle()


GovernedFleet.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestGovernedFleet = GovernedFleet.TestCase


# ---------------------------------------------------------------------------------------------- one by one


def serving(slot: int, cause: Cause = Cause.ROLLOUT) -> Disruption:
    return Disruption(slot, cause, serving=True)


def sick(slot: int, cause: Cause = Cause.RECOVERY) -> Disruption:
    return Disruption(slot, cause, serving=False)


TEN_PERCENT = RecoveryPolicy(max_disrupted="10%", freeze_below=0.5, cooldown=30.0)


def test_a_budget_is_used_up_and_given_back() -> None:
    """Ten of a hundred go; the eleventh waits until one of the ten is good again."""
    asked = [serving(slot) for slot in range(12)]
    decision, memory = ask(TEN_PERCENT, *asked, desired=100, good=100)
    assert len(decision.admitted) == 10
    assert codes(decision) == ["governor.budget"] * 2
    decision, memory = ask(TEN_PERCENT, *asked[10:], desired=100, good=91, memory=memory, restored=(3,))
    assert [request.slot for request in decision.admitted] == [10]
    assert decision.in_flight == 10


def test_sick_ones_use_up_the_floor() -> None:
    """With two of ten sick and a budget of one, nobody who serves is taken."""
    decision, _ = ask(TEN_PERCENT, serving(0), desired=10, good=8, sick=2)
    assert codes(decision) == ["governor.floor"]


def test_a_slot_out_of_service_costs_nothing_more() -> None:
    """The second restart of the same sick instance needs no second place in the budget."""
    _, memory = ask(TEN_PERCENT, sick(4), desired=10, good=9, sick=1)
    decision, memory = ask(TEN_PERCENT, sick(4), sick(5), desired=10, good=8, sick=2, memory=memory, now=60.0)
    assert decision.admitted == (sick(4),)
    assert codes(decision) == ["governor.budget"]
    assert memory.in_flight == (InFlight(4, Cause.RECOVERY, 0.0),)


@pytest.mark.parametrize("surge", [0, 3])
def test_surplus_goes_as_far_as_the_fleet_has_enough(surge: int) -> None:
    """Retiring is free while more are good than wanted, and a disruption like any other below that."""
    retired = [Disruption(slot, Cause.ROLLOUT, serving=True, surplus=True) for slot in range(5)]
    decision, memory = ask(TEN_PERCENT, *retired, desired=10, good=10 + surge)
    assert len(decision.admitted) == surge + 1
    assert len(memory.in_flight) == 1


def test_a_removed_slot_is_waited_for_no_more() -> None:
    """A restarting instance that is scaled away gives its place in the budget back."""
    _, memory = ask(TEN_PERCENT, sick(9), desired=10, good=9, sick=1)
    gone = Disruption(9, Cause.SCALING, serving=False, surplus=True)
    _, memory = ask(TEN_PERCENT, gone, desired=9, good=8, memory=memory)
    decision, _ = ask(TEN_PERCENT, sick(3), desired=9, good=8, sick=1, memory=memory)
    assert decision.admitted == (sick(3),)


def test_a_storm_freezes_then_goes_one_at_a_time_then_thaws() -> None:
    """Sixty sick of a hundred: nothing for 30 s, then one by one, and everything 30 s after the share is back."""
    asked = [sick(slot) for slot in range(60)]
    decision, memory = ask(TEN_PERCENT, *asked, desired=100, good=40, sick=60)
    assert decision.frozen
    assert not decision.admitted
    assert decision.wake == 30.0
    decision, memory = ask(TEN_PERCENT, *asked, desired=100, good=40, sick=60, memory=memory, now=30.0)
    assert len(decision.admitted) == 1
    decision, memory = ask(TEN_PERCENT, *asked[1:], desired=100, good=40, sick=59, memory=memory, now=31.0)
    assert not decision.admitted
    decision, memory = ask(
        TEN_PERCENT, *asked[1:], desired=100, good=90, sick=10, memory=memory, restored=(0,), now=40.0
    )
    assert decision.reasons[0].code == "governor.cooling"
    assert len(decision.admitted) == 1
    assert decision.wake == 70.0
    decision, memory = ask(TEN_PERCENT, *asked[2:], desired=100, good=90, sick=10, memory=memory, now=70.0)
    assert decision.reasons[0].code == "governor.thawed"
    assert len(decision.admitted) == 9


def test_a_new_storm_begins_a_new_calm() -> None:
    """Calm that is interrupted does not count: the fleet thaws a whole cool-down after the last storm."""
    _, memory = ask(TEN_PERCENT, desired=10, good=3, sick=7)
    _, memory = ask(TEN_PERCENT, desired=10, good=10, memory=memory, now=20.0)
    _, memory = ask(TEN_PERCENT, desired=10, good=3, sick=7, memory=memory, now=40.0)
    _, memory = ask(TEN_PERCENT, desired=10, good=10, memory=memory, now=45.0)
    decision, memory = ask(TEN_PERCENT, desired=10, good=10, memory=memory, now=74.0)
    assert decision.frozen
    decision, memory = ask(TEN_PERCENT, desired=10, good=10, memory=memory, now=75.0)
    assert not decision.frozen


def test_the_operator_passes_a_freeze_but_not_the_budget() -> None:
    """A human who insists is served in a storm, within the budget and above the floor."""
    asked = [sick(slot, Cause.OPERATOR) for slot in range(3)]
    decision, _ = ask(TEN_PERCENT, *asked, sick(3), desired=20, good=5, sick=15)
    assert decision.admitted == tuple(asked[:2])
    assert codes(decision) == ["governor.budget", "governor.frozen"]


@pytest.mark.parametrize("serves", [True, False])
def test_no_machine_shrinks_a_fleet_in_a_storm(serves: bool) -> None:
    """A scale-down waits, even at the half-open pace; an operator's is carried out."""
    for cause, admitted in ((Cause.SCALING, 0), (Cause.OPERATOR, 1)):
        gone = Disruption(0, cause, serves, surplus=True)
        decision, _ = ask(TEN_PERCENT, gone, desired=5, good=6, sick=9, memory=Memory((), 0.0), now=99.0)
        assert len(decision.admitted) == admitted
        decision, _ = ask(TEN_PERCENT, gone, desired=5, good=5, sick=9, memory=Memory((), 0.0), now=99.0)
        assert len(decision.admitted) == admitted


def test_fewer_than_three_sick_are_no_storm() -> None:
    """A fleet of one or two, all sick, is healed and not frozen."""
    assert STORM_MINIMUM == 3
    for size in (1, 2):
        decision, _ = ask(TEN_PERCENT, sick(0), desired=size, good=0, sick=size)
        assert decision.admitted
        assert not decision.frozen


@given(st.integers(STORM_MINIMUM, 1000), st.integers(0, 1000))
def test_a_share_of_exactly_the_limit_is_no_storm(bad: int, good: int) -> None:
    """Below means below: a healthy share equal to `freeze_below` freezes nothing, whatever the fractions."""
    exact = RecoveryPolicy(freeze_below=good / (good + bad))
    assert not ask(exact, desired=good + bad, good=good, sick=bad)[0].frozen


def test_a_single_instance_may_be_disrupted() -> None:
    """A fleet of one has a budget of one: it can be restarted and upgraded."""
    assert ask(TEN_PERCENT, serving(0), desired=1, good=1)[0].admitted


def test_a_budget_of_nothing_holds_for_ever() -> None:
    """With max_disrupted=0 nothing in service or sick is touched; only what is more than wanted may go."""
    never = RecoveryPolicy(max_disrupted=0)
    gone = Disruption(2, Cause.SCALING, serving=True, surplus=True)
    decision, _ = ask(never, serving(0, Cause.OPERATOR), sick(1), gone, desired=9, good=10, now=1e9)
    assert decision.admitted == (gone,)
    assert codes(decision) == ["governor.budget", "governor.budget"]


def test_the_strongest_cause_is_served_first() -> None:
    """Whoever is given first: operator, recovery, rollout, scaling."""
    asked = [serving(rank, cause) for rank, cause in enumerate(reversed(Cause))]
    decision, _ = ask(RecoveryPolicy(max_disrupted=2), *asked, desired=10, good=10)
    assert [request.cause for request in decision.admitted] == [Cause.OPERATOR, Cause.RECOVERY]


def test_memory_is_plain_json() -> None:
    """The memory is what a journal can hold."""
    memory = Memory((InFlight(3, Cause.OPERATOR, 1.5),), 2.0, 3.0)
    data: dict[str, Any] = memory.brake.to_dict()
    assert data == {"frozen_at": 2.0, "calm_since": 3.0}
    assert memory.in_flight[0].to_dict() == {"cause": "operator", "since": 1.5}
    assert through_json(memory) == memory


def test_the_book_strikes_out_the_oldest_first() -> None:
    """What is beyond the fleet's shortage leaves from the old end, and each change is told once."""
    told: list[tuple[int, InFlight | None]] = []
    book = Disruptions(lambda slot, entry: told.append((slot, entry)))
    for slot in (4, 2, 9, 2):
        book.begin(slot, Cause.ROLLOUT, float(slot))
    assert list(book) == [4, 2, 9]
    book.keep_newest(1)
    assert list(book) == [9]
    book.end([9, 9, 77])
    assert [slot for slot, entry in told if entry is None] == [4, 2, 9]
    assert len(told) == 6


def test_places_that_wait_to_be_filled_are_known_oldest_first() -> None:
    """Only slots in the book count, those that were filled meanwhile are passed over, and a new manager asks of all."""
    book = Disruptions(lambda _slot, _entry: None)
    for slot in (1, 2, 3):
        book.begin(slot, Cause.RECOVERY, 0.0)
    for slot in (3, 2, 8):
        book.emptied(slot)
    assert book.unfilled(lambda slot: slot != 2) == [3]
    assert book.unfilled(lambda _slot: True) == [3]
    again = Disruptions(lambda _slot, _entry: None)
    again.restore(book.entries())
    assert again.unfilled(lambda slot: slot != 1) == [2, 3]
