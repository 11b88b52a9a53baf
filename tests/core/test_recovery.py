"""The recovery ladder: what one slot is given, and when, over any course of its illness."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.recovery import (
    GUILTY_SHARE,
    Ailment,
    Case,
    RecoveryDecision,
    RecoveryMemory,
    Remedy,
    acted,
    decide,
)
from agentfleet.specs import Backoff, RecoveryPolicy

LADDER = list(Remedy)
AILING = (Ailment.SICK, Ailment.EXITED, Ailment.LOST)
SPANS = st.sampled_from([0.0, 0.1, 0.7, 1.0, 30.0, 60.0, 300.0])


@st.composite
def policies(draw: st.DrawFn) -> RecoveryPolicy:
    low, high = sorted((draw(SPANS), draw(SPANS)))
    return RecoveryPolicy(
        cooldown=draw(SPANS),
        restarts=draw(st.integers(0, 3)),
        replacements=draw(st.integers(0, 3)),
        elsewhere=draw(st.integers(0, 2)),
        rollback=draw(st.booleans()),
        backoff=Backoff(initial=low, factor=draw(st.sampled_from([1.0, 2.0, 10.0])), limit=high),
        settle=draw(SPANS.filter(bool)),
        reset_after=draw(SPANS),
    )


def cases(ailments: Sequence[Ailment] = tuple(Ailment), since: float = 0.0) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        ailment=st.sampled_from(ailments),
        since=st.just(since),
        late_at=st.none() | st.floats(0, 2000),
        placed=st.booleans(),
        other_nodes=st.booleans(),
        revision_sick=st.sampled_from([0.0, 0.49, 0.5, 1.0]),
        crowd=st.sampled_from([0.0, 1.0, 1.0, 7.5]),
        can_roll_back=st.booleans(),
    )


memories = st.builds(
    RecoveryMemory,
    attempts=st.integers(0, 12),
    acted_at=st.none() | st.floats(0, 1000),
    healthy_since=st.none() | st.floats(0, 1000),
    rolled_back=st.booleans(),
    asked=st.booleans(),
    healed=st.booleans(),
)

steps = st.lists(st.tuples(cases(), st.sampled_from([0.0, 0.1, 1.0, 29.0, 61.0, 301.0])), max_size=40)


def through_json(memory: RecoveryMemory) -> RecoveryMemory:
    return RecoveryMemory.from_dict(json.loads(json.dumps(memory.to_dict())))


def treat(
    policy: RecoveryPolicy, case: Case, count: int, *, memory: RecoveryMemory | None = None
) -> list[tuple[Remedy, float]]:
    """The next `count` remedies, with their times, for a slot that nothing helps and where each is carried out."""
    memory, now = memory or RecoveryMemory(), case.since
    done: list[tuple[Remedy, float]] = []
    while len(done) < count:
        decision, memory = decide(policy, case, memory, now)
        if decision.remedy is None:
            assert decision.wake is not None
            assert decision.wake > now
            now = decision.wake
            continue
        done.append((decision.remedy, now))
        memory = acted(memory, decision.remedy, now)
    return done


# ---------------------------------------------------------------------------------------------- one decision


@given(policies(), cases(), memories, st.floats(0, 2000))
def test_a_decision_is_a_function_of_its_arguments(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> None:
    """The same input gives the same output, leaves the input as it was, and the memory survives JSON unchanged."""
    kept = copy.deepcopy((case, memory))
    first = decide(policy, case, memory, now)
    assert decide(policy, case, memory, now) == first
    assert (case, memory) == kept
    assert through_json(memory) == memory
    assert through_json(first[1]) == first[1]


@given(policies(), cases(), memories, st.floats(0, 2000))
def test_what_acts_and_what_waits_says_why(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> None:
    """A remedy, and the withholding of one, carries a code and a sentence."""
    decision, _ = decide(policy, case, memory, now)
    withheld = case.ailment not in (Ailment.NONE, Ailment.UNPROVEN)
    if decision.remedy is not None or withheld:
        assert decision.reasons
    assert all(reason.code.startswith("recovery.") and reason.text for reason in decision.reasons)


@given(policies(), cases(), memories, st.floats(0, 2000))
def test_waking_when_told_finds_something_to_do(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> None:
    """A wake-up lies ahead, and at that instant the remedy is due or the history forgotten: no spinning on rounding."""
    decision, after = decide(policy, case, memory, now)
    if decision.wake is None:
        return
    assert decision.remedy is None
    assert decision.wake > now
    later, latest = decide(policy, case, after, decision.wake)
    assert later.remedy is not None or latest == RecoveryMemory()


@given(policies(), cases(), memories, st.floats(0, 2000))
def test_a_remedy_that_is_held_is_asked_for_again(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> None:
    """Deciding is not doing: until `acted` is called the same remedy is wanted and the history stays."""
    decision, after = decide(policy, case, memory, now)
    if decision.remedy is not None:
        again, unchanged = decide(policy, case, after, now + 1000)
        assert again.remedy is decision.remedy
        assert unchanged == after
        assert replace(after, healthy_since=memory.healthy_since) == memory


# ---------------------------------------------------------------------------------------------- the whole course


@given(policies(), steps, st.booleans())
def test_any_course_of_illness_keeps_the_laws(
    policy: RecoveryPolicy, course: list[tuple[Case, float]], json_between: bool
) -> None:
    """Whatever a slot goes through: the right ones are acted on, asked once, rolled back once, LOST never restarted."""
    memory, now = RecoveryMemory(), 0.0
    episode: list[Remedy] = []
    for case, seconds in course:
        now += seconds
        if json_between:
            memory = through_json(memory)
        healthy_before = memory.healthy_since
        decision, memory = decide(policy, case, memory, now)
        if memory == RecoveryMemory():
            episode = []
        if case.ailment is Ailment.NONE:
            assert decision.remedy is None
            assert healthy_before is None or memory.healthy_since in (healthy_before, None)
            continue
        assert memory.healthy_since is None, "health that was interrupted starts anew"
        if decision.remedy is None:
            continue
        check_remedy(policy, case, memory, decision.remedy, episode, now=now)
        episode.append(decision.remedy)
        memory = acted(memory, decision.remedy, now)
        assert memory.attempts == len(episode)


def check_remedy(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, remedy: Remedy, episode: list[Remedy], *, now: float
) -> None:
    """The laws of one remedy, given those that were taken since the slot was last well."""
    if case.ailment is Ailment.UNPROVEN and (not episode or memory.healed):
        assert case.late_at is not None, "what never failed, or was healed, is left to prove itself"
        assert now >= case.late_at, "what starts has its time"
    if not case.placed:
        assert remedy is not Remedy.RESTART
    if case.ailment is Ailment.LOST:
        assert remedy is not Remedy.RESTART
    if remedy is Remedy.RESTART:
        assert len(episode) < policy.restarts
        assert Remedy.ASK not in episode
    if remedy is Remedy.ELSEWHERE:
        assert case.other_nodes
    if remedy is Remedy.ROLL_BACK:
        assert Remedy.ROLL_BACK not in episode
        assert policy.rollback
        assert case.can_roll_back
        assert case.revision_sick >= GUILTY_SHARE
    if remedy is Remedy.ASK:
        assert Remedy.ASK not in episode
        assert len(episode) >= policy.restarts + policy.replacements
    if Remedy.ASK in episode:
        assert remedy is Remedy.REPLACE


@given(policies(), cases(AILING))
def test_the_ladder_is_climbed_upwards_and_ends_with_a_human(policy: RecoveryPolicy, case: Case) -> None:
    """Under one steady ailment no rung is below the one before, each is tried as often as allowed, then ASK, once."""
    rungs = policy.restarts + policy.replacements + policy.elsewhere + 2
    remedies = [remedy for remedy, _ in treat(policy, case, rungs + 5)]
    human = remedies.index(Remedy.ASK)
    climbed = remedies[:human]
    assert [LADDER.index(each) for each in climbed] == sorted(LADDER.index(each) for each in climbed)
    assert set(remedies[human + 1 :]) == {Remedy.REPLACE}
    if case.ailment is not Ailment.LOST and case.placed:
        assert climbed.count(Remedy.RESTART) == policy.restarts
        assert climbed.count(Remedy.REPLACE) == policy.replacements
        assert climbed.count(Remedy.ELSEWHERE) == (policy.elsewhere if case.other_nodes else 0)
    guilty = policy.rollback and case.can_roll_back and case.revision_sick >= GUILTY_SHARE
    assert climbed.count(Remedy.ROLL_BACK) == guilty


@given(policies(), cases((Ailment.EXITED, Ailment.LOST)))
def test_waits_grow_to_the_limit(policy: RecoveryPolicy, case: Case) -> None:
    """Each wait is at least the one before, none is above the limit, and after ASK it is the limit."""
    done = treat(policy, case, 15)
    waits = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(done)]
    for number, wait in enumerate(waits, start=1):
        asked = Remedy.ASK in [remedy for remedy, _ in done[:number]]
        expected = policy.backoff.limit * max(1.0, case.crowd) if asked else policy.backoff.delay(number)
        assert wait == pytest.approx(expected)
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(waits))


@given(policies(), cases((Ailment.SICK,)))
def test_what_runs_is_not_acted_on_within_the_cooldown(policy: RecoveryPolicy, case: Case) -> None:
    """Between two actions on a running instance lies the cool-down, even when the back-off is shorter."""
    done = treat(policy, case, 8)
    for (_, earlier), (_, later) in itertools.pairwise(done):
        assert later - earlier >= policy.cooldown - 1e-6


@given(policies(), st.lists(cases((*AILING, Ailment.UNPROVEN)), min_size=1, max_size=5), st.floats(1, 5000))
def test_attempts_in_any_window_are_bounded(policy: RecoveryPolicy, illness: list[Case], window: float) -> None:
    """However it fails: in a window there are never more attempts than rungs, plus one for each limit that fits."""
    if policy.backoff.limit == 0:
        return  # without any back-off nothing bounds it, and the user has said so
    memory, now = RecoveryMemory(), 0.0
    times: list[float] = []
    for number in range(300):
        decision, memory = decide(policy, illness[number % len(illness)], memory, now)
        if decision.remedy is not None:
            times.append(now)
            memory = acted(memory, decision.remedy, now)
        now += policy.backoff.limit / 10
    rungs = policy.restarts + policy.replacements + policy.elsewhere + 2
    for first, start in enumerate(times):
        within = [at for at in times[first:] if at - start < window]
        assert len(within) <= rungs + 1 + window / policy.backoff.limit


@given(policies(), st.sampled_from([Ailment.NONE, Ailment.UNPROVEN]), st.floats(0, 1e6))
def test_a_slot_that_never_failed_is_left_alone(policy: RecoveryPolicy, ailment: Ailment, now: float) -> None:
    """Healthy, starting or unknown without an earlier attempt: no remedy, no memory, no wake-up."""
    assert decide(policy, Case(ailment, 0.0), RecoveryMemory(), now) == (
        RecoveryDecision(None, (), None),
        RecoveryMemory(),
    )


@given(policies(), memories.filter(lambda memory: memory.healthy_since is None), st.floats(0, 1000))
def test_history_is_forgotten_after_health(policy: RecoveryPolicy, memory: RecoveryMemory, now: float) -> None:
    """Healthy for reset_after from first to last, and nothing is remembered; a moment less, and everything is."""
    well = Case(Ailment.NONE, now)
    decision, during = decide(policy, well, memory, now)
    if during != RecoveryMemory():
        assert decision.wake is not None
        assert decision.wake == now + policy.reset_after
        before = now + policy.reset_after * 0.99
        assert decide(policy, well, during, before)[1].attempts == memory.attempts
        assert decide(policy, well, during, decision.wake)[1] == RecoveryMemory()


# ---------------------------------------------------------------------------------------------- one by one

POLICY = RecoveryPolicy(backoff=Backoff(initial=1.0, factor=2.0, limit=300.0), cooldown=5.0, settle=60.0)


def test_the_default_ladder_reads_as_documented() -> None:
    """Two restarts, two replacements, one elsewhere, one rollback, a human, and then patience."""
    case = Case(Ailment.EXITED, 100.0, other_nodes=True, revision_sick=0.8, can_roll_back=True)
    names = [remedy.value for remedy, _ in treat(POLICY, case, 9)]
    assert names == ["restart", "restart", "replace", "replace", "elsewhere", "roll_back", "ask", "replace", "replace"]
    assert [at for _, at in treat(POLICY, case, 9)] == [100, 101, 103, 107, 115, 131, 163, 463, 763]


def test_an_innocent_revision_is_not_rolled_back() -> None:
    """One sick instance among healthy ones of the same revision is its own problem: a human is asked."""
    case = Case(Ailment.SICK, 0.0, revision_sick=0.4, can_roll_back=True)
    assert [remedy for remedy, _ in treat(POLICY, case, 5)][-1] is Remedy.ASK


@pytest.mark.parametrize(("others", "expected"), [(True, Remedy.ELSEWHERE), (False, Remedy.REPLACE)])
def test_a_lost_instance_is_replaced_at_once(others: bool, expected: Remedy) -> None:
    """Nothing can be restarted on a node that cannot be reached."""
    decision, _ = decide(POLICY, Case(Ailment.LOST, 0.0, other_nodes=others), RecoveryMemory(), 0.0)
    assert decision.remedy is expected


def test_a_slot_that_is_lost_again_and_again_reaches_a_human() -> None:
    """Replacements that get lost as well climb the ladder like any others."""
    remedies = [remedy for remedy, _ in treat(POLICY, Case(Ailment.LOST, 0.0, other_nodes=True), 7)]
    assert remedies == [Remedy.ELSEWHERE] * 5 + [Remedy.ASK, Remedy.REPLACE]


def _after(*remedies: Remedy, at: float = 0.0) -> RecoveryMemory:
    memory = RecoveryMemory()
    for remedy in remedies:
        memory = acted(memory, remedy, at)
    return memory


def test_an_attempt_that_proves_nothing_has_failed() -> None:
    """Still starting when `settle` is over: the next rung."""
    case, memory = Case(Ailment.UNPROVEN, 0.0), _after(Remedy.RESTART)
    assert decide(POLICY, case, memory, 59.9)[0].wake == 60.0
    assert decide(POLICY, case, memory, 60.0)[0].remedy is Remedy.RESTART


def test_an_instance_that_hangs_on_its_node_is_tried_on_another() -> None:
    """What never starts, even replaced, may climb to another node and to a rollback like what is sick."""
    memory = _after(Remedy.RESTART, Remedy.RESTART, Remedy.REPLACE, Remedy.REPLACE)
    case = Case(Ailment.UNPROVEN, 0.0, other_nodes=True)
    assert decide(POLICY, case, memory, 60.0)[0].remedy is Remedy.ELSEWHERE


def test_one_that_never_begins_its_work_is_replaced_once_it_is_late() -> None:
    """Nothing has failed, and nothing works: after the deadline it is a case like any other."""
    waiting = Case(Ailment.UNPROVEN, 0.0, late_at=600.0, placed=False)
    assert decide(POLICY, waiting, RecoveryMemory(), 599.9)[0].wake == 600.0
    assert decide(POLICY, waiting, RecoveryMemory(), 600.0)[0].remedy is Remedy.REPLACE
    assert decide(POLICY, replace(waiting, other_nodes=True), RecoveryMemory(), 600.0)[0].remedy is Remedy.ELSEWHERE
    assert decide(POLICY, replace(waiting, placed=True), RecoveryMemory(), 600.0)[0].remedy is Remedy.RESTART
    again = replace(waiting, since=600.0, late_at=1200.0)
    assert decide(POLICY, again, _after(Remedy.REPLACE, at=600.0), 700.0)[0].wake == 1200.0


def test_those_left_to_a_human_share_the_further_attempts() -> None:
    """Ten times as many as may be disrupted wait ten times as long each, so that together they try no more often."""
    memory = _after(Remedy.ASK)
    limit = POLICY.backoff.limit
    for crowd, wait in ((0.1, limit), (1.0, limit), (10.0, 10 * limit)):
        for ailment in (Ailment.EXITED, Ailment.UNPROVEN):
            assert decide(POLICY, Case(ailment, 0.0, crowd=crowd), memory, 0.0)[0].wake == wait


def test_one_that_was_healed_and_is_unknown_now_is_left_alone() -> None:
    """After the manager restarts nothing is known: an attempt of minutes ago, that helped, is no reason to act."""
    _, memory = decide(POLICY, Case(Ailment.NONE, 10.0), _after(Remedy.RESTART), 10.0)
    decision, memory = decide(POLICY, Case(Ailment.UNPROVEN, 300.0), through_json(memory), 300.0)
    assert decision.remedy is None
    assert decide(POLICY, Case(Ailment.SICK, 310.0), memory, 310.0)[0].remedy is Remedy.RESTART


def test_after_asking_even_one_that_proves_nothing_waits_the_limit() -> None:
    """Once a human was told, attempts come at the back-off's limit, sick or silent."""
    memory = _after(Remedy.ASK)
    for ailment in (Ailment.UNPROVEN, Ailment.EXITED, Ailment.SICK, Ailment.LOST):
        assert decide(POLICY, Case(ailment, 0.0), memory, 299.0)[0].remedy is None
        assert decide(POLICY, Case(ailment, 0.0), memory, 300.0)[0].remedy is Remedy.REPLACE


def test_a_first_failure_is_acted_on_at_once() -> None:
    """The first attempt waits for nothing but the ailment."""
    for ailment in AILING:
        assert decide(POLICY, Case(ailment, 7.0), RecoveryMemory(), 7.0)[0].remedy is not None


def test_a_relapse_goes_on_where_it_was() -> None:
    """Healthy for less than reset_after does not buy two more restarts."""
    memory = _after(Remedy.RESTART, Remedy.RESTART)
    _, memory = decide(POLICY, Case(Ailment.NONE, 1.0), memory, 1.0)
    assert decide(POLICY, Case(Ailment.EXITED, 599.0), memory, 599.0)[0].remedy is Remedy.REPLACE


@pytest.mark.parametrize("change", [lambda m: m, lambda m: replace(m, asked=True)])
def test_memory_survives_a_journal(change: Callable[[RecoveryMemory], RecoveryMemory]) -> None:
    """The memory is what a journal can hold, and one written before `healed` existed can be read."""
    memory = change(_after(Remedy.RESTART))
    data = memory.to_dict()
    assert RecoveryMemory.from_dict(data) == memory
    del data["healed"]
    assert RecoveryMemory.from_dict(data) == memory
