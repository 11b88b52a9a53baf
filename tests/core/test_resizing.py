"""How changes of size end: each exactly once, for the reason that holds, and never by waiting alone while it moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.resizing import Outcome, ResizingDecision, ResizingMemory, ResizingObserved, decide
from agentfleet.specs import RolloutPolicy

POLICY = RolloutPolicy(progress_deadline=60.0)


@dataclass
class Watched:
    """A fleet whose size is followed."""

    memory: ResizingMemory = field(default_factory=ResizingMemory)

    def see(self, now: float, wanted: int | None, good: int, placed: int | None = None) -> ResizingDecision:
        observed = ResizingObserved(wanted, good, good if placed is None else placed)
        decision, self.memory = decide(POLICY, observed, self.memory, now)
        return decision

    def ends(self, now: float, wanted: int | None, good: int, placed: int | None = None) -> list[tuple[str, float]]:
        return [(each.outcome.value, each.seconds) for each in self.see(now, wanted, good, placed).ended]


def test_a_larger_size_is_reached_when_so_many_are_healthy() -> None:
    fleet = Watched()
    assert fleet.ends(0, 3, 3) == []
    assert fleet.ends(10, 5, 3, 3) == []
    assert fleet.ends(12, 5, 4, 5) == [], "one is not healthy yet"
    assert fleet.ends(15, 5, 5) == [("reached", 5)]
    assert fleet.ends(16, 5, 4) == [], "what is lost later is no matter of size"


def test_a_smaller_size_is_reached_when_no_more_hold_a_place() -> None:
    fleet = Watched()
    fleet.see(0, 5, 5)
    assert fleet.ends(1, 2, 5) == []
    assert fleet.ends(2, 2, 1, 3) == []
    assert fleet.ends(4, 2, 1, 2) == [("reached", 3)]


def test_only_a_span_without_progress_is_a_failure() -> None:
    fleet = Watched()
    fleet.see(0, 1, 1)
    fleet.see(10, 100, 1)
    for step in range(1, 99):  # an hour and a half, one a minute
        assert fleet.ends(10 + 55 * step, 100, step) == []
    moved = 10 + 55 * 98
    decision = fleet.see(moved + 30, 100, 50)
    assert decision.wake == moved + 60, "those that were healthy once count: a recovery is no progress"
    (ended,) = fleet.see(moved + 60, 100, 90).ended
    assert ended.outcome is Outcome.FAILED
    assert "10 instances are not healthy, and nothing has moved for 60 s" in ended.reason.text
    assert fleet.ends(moved + 61, 100, 100) == [], "it ends once"


def test_another_size_overtakes_and_is_followed_in_turn() -> None:
    fleet = Watched()
    fleet.see(0, 3, 3)
    assert fleet.ends(1, 9, 3) == []
    assert fleet.ends(3, 6, 5, 9) == [("overtaken", 2)]
    assert fleet.ends(4, 6, 6, 9) == [], "from 9 to 6 is down"
    assert fleet.ends(5, 6, 6, 6) == [("reached", 2)]


def test_stopping_and_starting_is_no_change_of_size() -> None:
    fleet = Watched()
    assert fleet.ends(0, 3, 0) == [], "a deployment"
    assert fleet.ends(1, None, 3) == []
    assert fleet.ends(2, 3, 0) == []
    fleet.see(3, 5, 3)
    assert fleet.ends(4, None, 4) == [("overtaken", 1)]


def test_a_size_that_is_there_already_is_reached_at_once() -> None:
    fleet = Watched()
    fleet.see(0, 9, 4)
    assert fleet.ends(1, 5, 4) == [("reached", 0)]


SIZES = st.none() | st.integers(0, 5)
LOOKS = st.lists(st.tuples(st.floats(0, 50), SIZES, st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(LOOKS)
def test_each_change_ends_once_and_for_a_reason_that_holds(looks: list[tuple[float, int | None, int, int]]) -> None:
    fleet, now = Watched(), 0.0
    wanted: int | None = None
    begun = ended = 0
    for wait, size, good, placed in looks:
        now += wait
        changed, before, wanted = size != wanted, wanted, size
        under_way = fleet.memory.under_way
        decision = fleet.see(now, size, good, placed)
        begun += changed and before is not None and size is not None
        ended += len(decision.ended)
        for each in decision.ended:
            assert each.seconds == now - each.resizing.began
            if each.outcome is Outcome.OVERTAKEN:
                assert changed
                assert under_way is not None
            elif each.outcome is Outcome.REACHED:
                assert size is not None
                assert good >= size if each.resizing.direction == "up" else placed <= size
            else:
                assert now >= each.resizing.progressed + POLICY.progress_deadline
        assert begun - ended == (fleet.memory.under_way is not None), "none is lost, none ends twice"
        assert (decision.wake is None) is (fleet.memory.under_way is None)
        assert fleet.memory.wanted == size
