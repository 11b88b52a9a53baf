"""Two autoscalers that fight over one size: ours yields, says why, and goes on when it is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.contention import (
    FLIPS,
    WINDOW,
    ContentionDecision,
    ContentionMemory,
    ContentionObserved,
    decide,
)

OURS, THEIRS, NOTHING = ContentionObserved(scaled=True), ContentionObserved(rival="hpa"), ContentionObserved()


def told(
    *happened: tuple[float, ContentionObserved], memory: ContentionMemory | None = None
) -> tuple[list[ContentionDecision], ContentionMemory]:
    """What is decided of each of these, in order."""
    decisions, kept = [], memory or ContentionMemory()
    for at, observed in happened:
        decision, kept = decide(observed, kept, at)
        decisions.append(decision)
    return decisions, kept


def fight(rounds: int, every: float = 30.0) -> list[tuple[float, ContentionObserved]]:
    """Ours and theirs in turn."""
    return [(at, who) for n in range(rounds) for at, who in ((every * n, OURS), (every * n + every / 2, THEIRS))]


def test_a_fight_ends_with_ours_holding_still() -> None:
    decisions, _ = told(*fight(FLIPS + 1))
    assert [each.held for each in decisions] == [False] * (2 * FLIPS + 1) + [True]
    began = decisions[-1].began
    assert began is not None
    assert began.code == "scaling.contested"
    assert "hpa has taken back" in began.text
    assert began.numbers["flips"] == FLIPS + 1


@pytest.mark.parametrize("who", [OURS, THEIRS, NOTHING])
def test_one_side_alone_is_no_fight(who: ContentionObserved) -> None:
    decisions, _ = told(*[(float(at), who) for at in range(100)])
    assert not any(each.held for each in decisions)


def test_slow_rounds_are_no_fight() -> None:
    decisions, _ = told(*fight(50, every=WINDOW / FLIPS + 1))
    assert not any(each.held for each in decisions)


def test_it_goes_on_when_the_size_has_been_left_alone() -> None:
    happened = fight(FLIPS + 1)
    last = happened[-1][0]
    _, memory = told(*happened)
    decisions, memory = told(
        (last + WINDOW / 2, THEIRS), (last + WINDOW, NOTHING), (last + 1.5 * WINDOW, NOTHING), memory=memory
    )
    assert [each.held for each in decisions] == [True, True, False]
    assert decisions[-1].ended is not None
    at = last + 1.5 * WINDOW
    decisions, _ = told((at + 1, OURS), (at + 2, THEIRS), memory=memory)
    assert [each.held for each in decisions] == [False, True], "who only answers is known by now"
    decisions, _ = told((at + WINDOW, OURS), (at + WINDOW + 1, THEIRS), memory=memory)
    assert not any(each.held for each in decisions), "that is forgotten, too"


@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.sampled_from([OURS, THEIRS, NOTHING])),
        max_size=60,
    )
)
def test_laws(steps: list[tuple[float, ContentionObserved]]) -> None:
    """It holds only after enough flips, says so once, and never for longer than the window after the last rival."""
    now, memory, held, flips, last_rival = 0.0, ContentionMemory(), False, 0, 0.0
    for wait, observed in steps:
        now += wait
        if observed.rival is not None:
            flips += memory.scaled
            last_rival = now
        decision, memory = decide(observed, memory, now)
        assert (decision.began is not None) == (decision.held and not held)
        assert (decision.ended is not None) == (held and not decision.held)
        assert len(memory.flips) <= FLIPS + 1 or held
        if decision.held:
            assert flips > FLIPS
            assert now < last_rival + WINDOW
        held = decision.held
