"""Which manager should lead which fleet: laws, and the few numbers that matter."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.sharing import (
    SharingMemory,
    SharingObserved,
    SharingPolicy,
    decide,
    owner,
)

POLICY = SharingPolicy()
FLEETS = [f"fleet-{number}" for number in range(300)]
names = st.text("abcdef", min_size=1, max_size=6)


@given(st.sets(names, min_size=1, max_size=6), names, names)
def test_only_the_fleets_of_whoever_goes_or_comes_move(managers: set[str], other: str, fleet: str) -> None:
    before, more = owner(fleet, managers), owner(fleet, managers | {other})
    assert more in (before, other)
    assert owner(fleet, sorted(managers, reverse=True)) == before


def test_the_work_is_shared_evenly() -> None:
    shares = Counter(owner(fleet, ["a", "b", "c"]) for fleet in FLEETS)
    assert all(70 <= count <= 130 for count in shares.values()), shares


def beaten(beats: int, *others: str, leads: list[str], me: str = "me") -> SharingObserved:
    return SharingObserved(me, leads, {me: beats, **dict.fromkeys(others, beats)})


def test_a_newcomer_is_given_its_fleets_one_by_one_when_it_has_stayed_for_a_while() -> None:
    leads, memory, handed = list(FLEETS[:20]), SharingMemory(), []
    for step in range(200):
        now = float(step)
        decision, memory = decide(POLICY, beaten(step, "you", leads=leads), memory, now)
        if decision.hand_over is not None:
            handed.append((now, decision.hand_over))
            leads.remove(decision.hand_over)
    assert handed[0][0] == POLICY.settle
    assert all(later - sooner >= POLICY.every for (sooner, _), (later, _) in pairwise(handed))
    assert {fleet for _, fleet in handed} == {each for each in FLEETS[:20] if owner(each, ["me", "you"]) == "you"}
    assert all(owner(each, ["me", "you"]) == "me" for each in leads)


def test_what_comes_back_is_not_handed_to_the_same_again() -> None:
    fleet = next(each for each in FLEETS if owner(each, ["me", "you"]) == "you")
    memory, given_away = SharingMemory(), 0
    for step in range(1000):
        decision, memory = decide(POLICY, beaten(step, "you", leads=[fleet]), memory, float(step))
        given_away += decision.hand_over is not None
    assert given_away == 1


def test_nothing_is_handed_to_who_is_silent() -> None:
    fleet = next(each for each in FLEETS if owner(each, ["me", "you"]) == "you")
    memory = SharingMemory()
    for step in range(100):
        observed = SharingObserved("me", [fleet], {"me": step, "you": 1})
        decision, memory = decide(POLICY, observed, memory, float(step))
        assert decision.hand_over is None
    assert decision.alive == ("me",)


def test_not_to_have_read_is_not_to_have_been_silent() -> None:
    memory = SharingMemory()
    for step in range(40):
        _, memory = decide(POLICY, beaten(step, "you", leads=[]), memory, float(step))
    for step in range(40, 140):
        decision, memory = decide(POLICY, SharingObserved("me", FLEETS, None), memory, float(step))
        assert decision.hand_over is None
        assert decision.alive == ("me", "you")
    decision, memory = decide(POLICY, beaten(139, "you", leads=FLEETS), memory, 140.0)
    assert decision.hand_over is not None, "it has been there all the time, as far as anybody knows"


steps = st.lists(
    st.tuples(st.floats(0.1, 60), st.none() | st.dictionaries(names, st.integers(0, 50), max_size=4)), max_size=30
)


@given(steps, st.sets(names, max_size=10))
def test_laws(story: list[tuple[float, dict[str, int] | None]], leads: set[str]) -> None:
    memory, now = SharingMemory(), 0.0
    for passed, beats in story:
        now += passed
        observed = SharingObserved("me", leads, None if beats is None else {**beats, "me": int(now)})
        before = memory
        decision, memory = decide(POLICY, observed, memory, now)
        assert decide(POLICY, observed, before, now) == (decision, memory), "the same again is the same"
        assert SharingMemory.from_dict(memory.to_dict()) == memory
        assert decision.reasons
        assert decision.alive[0] == "me"
        if decision.hand_over is not None:
            assert beats is not None
            assert decision.hand_over in leads
            assert owner(decision.hand_over, decision.alive) != "me"
            assert memory.last == now
