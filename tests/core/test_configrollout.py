"""Configuration in rings: the laws of one step over any counts, of one trial, and of rollouts in a small fleet."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import ValidationError

from agentfleet.configspec import ConfigRollout
from agentfleet.core.configrollout import (
    ENOUGH,
    ConfigMemory,
    ConfigObserved,
    ConfigPhase,
    Tasks,
    begin,
    decide,
    limit_of,
)
from agentfleet.core.configtrial import Looks, Sight, Trial, forgiven, look, tasks_since
from agentfleet.core.reason import Reason
from agentfleet.units import share_of

HOLD = Reason("config.paused", "the fleet is paused")
COUNT = st.integers(0, 30)


@st.composite
def policies(draw: st.DrawFn) -> ConfigRollout:
    numbers = sorted(draw(st.lists(st.integers(1, 12), max_size=3)))
    shares = [f"{each}%" for each in sorted(draw(st.lists(st.integers(1, 99), max_size=2)))]
    return ConfigRollout(
        rings=[*numbers, *shares, "100%"],
        bake=draw(st.sampled_from([0.0, 30.0])),
        confirm=draw(st.sampled_from([0.0, 15.0])),
        max_failed=draw(st.sampled_from([0, 1, 3, "0%", "10%", "50%", "100%"])),
        max_errors=draw(st.sampled_from([0.0, 0.1, 1.0])),
        auto_rollback=draw(st.booleans()),
    )


def tasks() -> st.SearchStrategy[Tasks]:
    return st.tuples(st.integers(0, 60), st.floats(0, 1)).map(lambda pair: Tasks(pair[0], int(pair[0] * pair[1])))


@st.composite
def observations(draw: st.DrawFn) -> ConfigObserved:
    """Any counts that can be, and many that cannot."""
    trials = draw(COUNT)
    proved = draw(st.integers(0, trials))
    return ConfigObserved(
        size=draw(COUNT),
        ready=draw(COUNT),
        trials=trials,
        proved=proved,
        spoiled=draw(st.integers(0, trials - proved)),
        refused=draw(st.integers(0, 5)),
        failed=draw(st.integers(0, 5)),
        others=draw(COUNT),
        others_bad=draw(COUNT),
        tasks=draw(tasks()),
        others_tasks=draw(tasks()),
        hold=draw(st.none() | st.just(HOLD)),
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[ConfigRollout, ConfigObserved, ConfigMemory, float]:
    policy, now = draw(policies()), draw(st.floats(100, 1000))
    memory = ConfigMemory(
        began_at=0.0,
        ring=draw(st.integers(0, len(policy.rings) - 1)),
        ring_at=0.0,
        target=draw(COUNT),
        filled=draw(st.booleans()),
        suspected_at=draw(st.none() | st.floats(0, 1).map(lambda part: now * part)),
        phase=draw(st.sampled_from(ConfigPhase)),
        before=draw(tasks()),
    )
    return policy, draw(observations()), memory, now


def through_json(memory: ConfigMemory) -> ConfigMemory:
    return ConfigMemory.from_dict(json.loads(json.dumps(memory.to_dict())))


# ------------------------------------------------------------------------------------------------ one step


@given(situations())
def test_a_decision_is_a_function_of_what_it_is_given(
    situation: tuple[ConfigRollout, ConfigObserved, ConfigMemory, float],
) -> None:
    """The same answer twice, from copies, and from a memory that went through the journal; nothing is changed."""
    policy, observed, memory, now = situation
    kept = copy.deepcopy((observed, memory))
    first = decide(policy, observed, memory, now)
    assert first == decide(policy, copy.deepcopy(observed), through_json(memory), now)
    assert (observed, memory) == kept
    assert through_json(first[1]) == first[1]


@given(situations())
def test_what_one_step_may_do(situation: tuple[ConfigRollout, ConfigObserved, ConfigMemory, float]) -> None:
    policy, observed, memory, now = situation
    decision, after = decide(policy, observed, memory, now)
    event(f"{memory.phase} to {after.phase}")
    assert decision.phase is after.phase
    if memory.phase is not ConfigPhase.PROGRESSING:
        assert after == memory
        assert decision.release == 0
        assert decision.roll_back is (memory.phase is ConfigPhase.FAILED and policy.auto_rollback)
        return
    assert decision.reasons, "every step says why"
    assert 0 <= decision.release <= observed.ready
    if decision.release:
        share = share_of(policy.rings[after.ring], observed.size, round_up=True)
        assert observed.trials + decision.release <= min(after.target, observed.size)
        assert memory.target or after.target <= max(1, share, observed.trials)
    if observed.hold is not None or not observed.size:
        assert decision.release == 0
        assert after.phase is not ConfigPhase.COMPLETE
        assert after.ring == memory.ring
    if after.ring > memory.ring or after.phase is ConfigPhase.COMPLETE:
        assert observed.proved > 0
        assert observed.trials == observed.proved + observed.spoiled, "it waits for whoever has said nothing"
        assert observed.refused < limit_of(policy, observed.tried)
        assert observed.trials >= ENOUGH * min(memory.target or 1, observed.size)
    assert decision.roll_back is (after.phase is ConfigPhase.FAILED and policy.auto_rollback)


@given(situations())
def test_silence_alone_never_takes_anything_back(
    situation: tuple[ConfigRollout, ConfigObserved, ConfigMemory, float],
) -> None:
    """Without a refusal, a failure or failed tasks nothing is stopped, whatever is missing and for how long."""
    policy, observed, memory, now = situation
    silent = replace(observed, refused=0, failed=0, tasks=Tasks(observed.tasks.ended, 0), spoiled=0)
    decision, after = decide(policy, silent, replace(memory, phase=ConfigPhase.PROGRESSING), now + 1e6)
    assert after.phase in (ConfigPhase.PROGRESSING, ConfigPhase.COMPLETE)
    assert not decision.roll_back


@given(situations())
def test_a_failure_stops_it_only_when_it_stands(
    situation: tuple[ConfigRollout, ConfigObserved, ConfigMemory, float],
) -> None:
    """But for refusals nothing is judged before `confirm` is over, and nothing that befalls the others as well."""
    policy, observed, memory, now = situation
    observed = replace(observed, refused=0)
    memory = replace(memory, phase=ConfigPhase.PROGRESSING)
    _, after = decide(policy, observed, memory, now)
    if after.phase is ConfigPhase.FAILED:
        assert memory.suspected_at is not None or policy.confirm == 0
        assert now >= (now if memory.suspected_at is None else memory.suspected_at) + policy.confirm
        if observed.tasks.share <= max(memory.before.share, observed.others_tasks.share) + policy.max_errors:
            assert observed.failed >= limit_of(policy, observed.tried)
            others = observed.others_bad / observed.others if observed.others else 0.0
            assert others < 0.5 * observed.failed / observed.tried or not observed.others


def test_one_of_one_is_enough_and_one_of_a_thousand_is_not() -> None:
    policy = ConfigRollout()
    assert limit_of(policy, 1) == 1
    assert limit_of(policy, 50) == 5
    assert limit_of(policy, 1000) == 100
    assert limit_of(policy.replace(max_failed=3), 1) == 1, "when all have failed, it has failed"
    assert limit_of(policy.replace(max_failed=0), 1000) == 1


@pytest.mark.parametrize(
    ("rings", "message"),
    [
        ((1, "5%"), "the last must be '100%'"),
        ((0, "100%"), "at least one instance"),
        (("0%", "100%"), "at least one instance"),
        ((5, 1, "100%"), "no fewer instances"),
        (("50%", "5%", "100%"), "no fewer instances"),
        ((), "at least 1 item"),
        ((1, "101%", "100%"), "at most 100%"),
        ((1.5, "100%"), "whole number"),
    ],
)
def test_rings_that_make_no_sense_are_refused(rings: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConfigRollout(rings=rings)


# ------------------------------------------------------------------------------------------------ one trial

PROCESS = (0, 10.0)
TRIED = Trial(100.0, PROCESS, Tasks(5, 1))
WELL = Sight(PROCESS, Looks.GOOD, good_since=20.0, running_since=101.0, tasks=Tasks(30, 4))


def test_a_trial_is_proved_by_time_in_good_health_with_it() -> None:
    assert not look(TRIED, WELL, bake=60, now=160.9).proved
    proved = look(TRIED, WELL, bake=60, now=161.0)
    assert (proved.proved, proved.failure) == (True, "")
    for sight in (
        replace(WELL, running_since=None),
        replace(WELL, looks=Looks.UNKNOWN),
        replace(WELL, good_since=150.0),
        replace(WELL, refuses=True),
        replace(WELL, running_since=150.0),
    ):
        assert not look(TRIED, sight, bake=60, now=161.0).proved, sight
    assert look(proved, replace(WELL, looks=Looks.BAD), bake=60, now=170).proved, "a proof stays"


def test_a_failure_stays_and_what_we_have_done_ourselves_is_none() -> None:
    sick = look(TRIED, replace(WELL, looks=Looks.BAD), bake=60, now=110)
    assert sick.failure == "sick"
    assert look(sick, WELL, bake=60, now=120).failure == "sick"
    again = replace(WELL, process=(1, 111.0))
    assert look(TRIED, again, bake=60, now=112).failure == "restarted"
    assert look(TRIED, replace(again, renewed=True), bake=60, now=112) == replace(
        TRIED, process=(1, 111.0), tasks=Tasks()
    )
    assert look(TRIED, replace(WELL, looks=Looks.UNKNOWN), bake=60, now=110).failure == ""
    assert look(TRIED, replace(WELL, refuses=True), bake=60, now=110).failure == "refused"


def test_what_was_forgiven_is_not_held_against_it_before_it_is_well_again() -> None:
    sick = look(TRIED, replace(WELL, looks=Looks.BAD), bake=60, now=110)
    excused = forgiven(sick)
    assert (excused.failure, excused.excused) == ("", True)
    still = look(excused, replace(WELL, looks=Looks.BAD, process=(1, 111.0)), bake=60, now=111)
    assert (still.failure, still.excused) == ("", True)
    well = look(still, replace(WELL, process=(1, 111.0), good_since=120.0), bake=60, now=121)
    assert not well.excused
    assert look(well, replace(WELL, looks=Looks.BAD, process=(1, 111.0)), bake=60, now=130).failure == "sick"
    refused = look(TRIED, replace(WELL, refuses=True), bake=60, now=110)
    assert forgiven(refused) == refused


def test_tasks_count_from_the_trial_on() -> None:
    assert tasks_since(TRIED, WELL) == Tasks(25, 3)
    assert tasks_since(TRIED, replace(WELL, process=(1, 111.0), tasks=Tasks(3, 2))) == Tasks(3, 2)
    assert Tasks(19, 19).share == 0.0, "too few to tell"
    assert Tasks(20, 10).share == 0.5


@given(
    st.builds(
        Trial,
        at=st.floats(0, 1e9),
        process=st.tuples(st.integers(0, 9), st.none() | st.floats(0, 1e9)),
        tasks=tasks(),
        proved=st.booleans(),
        failure=st.sampled_from(["", "sick", "refused", "restarted"]),
        excused=st.booleans(),
    )
)
def test_a_trial_goes_through_the_journal(trial: Trial) -> None:
    assert Trial.from_list(json.loads(json.dumps(trial.to_list()))) == trial


# ------------------------------------------------------------------------------------------------ whole rollouts


class Rollouts(RuleBasedStateMachine):
    """A fleet of instances that come, go, fall silent, fail and recover, while a configuration is rolled out."""

    @initialize(policy=policies(), size=st.integers(1, 25))
    def start(self, policy: ConfigRollout, size: int) -> None:
        self.policy, self.now = policy, 0.0
        self.fleet = dict.fromkeys(range(size), "good")
        self.next = size
        self.trials: dict[int, Trial] = {}
        self.since: dict[int, float] = {}
        self.silent: set[int] = set()
        self.ever_failed = False
        self.memory = begin(0.0)
        self.allowed = 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 31.0]), held=st.booleans(), admits=st.integers(0, 30))
    def decide(self, seconds: float, held: bool, admits: int) -> None:
        self.now += seconds
        for number, trial in tuple(self.trials.items()):
            if number not in self.fleet:
                if not trial.failure:
                    del self.trials[number]
                continue
            looks = Looks.UNKNOWN if number in self.silent else Looks(self.fleet[number])
            running = None if number in self.silent else trial.at
            sight = Sight(PROCESS, looks, self.since.get(number, 0.0), running)
            self.trials[number] = look(trial, sight, bake=self.policy.bake, now=self.now)
        here = [trial for number, trial in self.trials.items() if number in self.fleet]
        on_trial = self.trials.keys() & self.fleet.keys()
        observed = ConfigObserved(
            size=len(self.fleet),
            ready=sum(looks == "good" and number not in self.trials for number, looks in self.fleet.items()),
            trials=len(here),
            proved=sum(trial.proved for trial in here),
            spoiled=sum(trial.spoiled for trial in here),
            failed=sum(bool(trial.failure) for trial in self.trials.values()),
            others=len(self.fleet) - len(here),
            others_bad=sum(looks == "bad" for number, looks in self.fleet.items() if number not in on_trial),
            hold=HOLD if held else None,
        )
        before = self.memory
        decision, self.memory = decide(self.policy, observed, through_json(self.memory), self.now)
        if decision.forgive:
            self.trials = {number: forgiven(trial) for number, trial in self.trials.items()}
        ready = [number for number, looks in self.fleet.items() if looks == "good" and number not in self.trials]
        for number in ready[: min(decision.release, admits)]:
            self.trials[number] = Trial(self.now, PROCESS)
        if self.memory.target and not before.target:
            share = share_of(self.policy.rings[self.memory.ring], len(self.fleet), round_up=True)
            assert self.memory.target <= max(1, share, self.allowed)
            self.allowed = self.memory.target
        if self.memory.ring > before.ring:
            assert all(trial.proved or trial.failure for trial in here), "somebody has said nothing"
        if self.memory.phase is ConfigPhase.FAILED:
            assert self.ever_failed

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if self.fleet:
            number = data.draw(st.sampled_from(sorted(self.fleet)))
            self.fleet[number] = "bad"
            self.ever_failed = self.ever_failed or number in self.trials

    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        if self.fleet:
            number = data.draw(st.sampled_from(sorted(self.fleet)))
            self.fleet[number], self.since[number] = "good", self.now
            self.silent.discard(number)

    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        if self.fleet:
            self.silent.add(data.draw(st.sampled_from(sorted(self.fleet))))

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if self.fleet:
            del self.fleet[data.draw(st.sampled_from(sorted(self.fleet)))]

    @rule()
    def come(self) -> None:
        self.fleet[self.next], self.since[self.next] = "good", self.now
        self.next += 1

    @invariant()
    def no_more_than_the_ring_have_it(self) -> None:
        """What is not proved yet is with no more instances than the ring may hold."""
        if hasattr(self, "allowed"):
            assert len(self.trials.keys() & self.fleet.keys()) <= self.allowed


Rollouts.TestCase.settings = settings(stateful_step_count=40)
TestRollouts = Rollouts.TestCase


def test_a_rollout_in_which_all_goes_well_is_over_after_its_rings() -> None:
    policy = ConfigRollout(rings=(1, "10%", "100%"), bake=60.0)
    memory, now, trials, rings = begin(0.0), 0.0, 0, []
    while memory.phase is ConfigPhase.PROGRESSING:
        proved = trials  # a minute passes between two looks
        observed = ConfigObserved(size=40, ready=40 - trials, trials=trials, proved=proved, others=40 - trials)
        decision, memory = decide(policy, observed, memory, now)
        trials += decision.release
        if decision.release:
            rings.append(decision.release)
        now += 60.0
    assert memory.phase is ConfigPhase.COMPLETE
    assert rings == [1, 3, 36]


def test_a_fleet_whose_instances_change_all_the_time_gets_there_too() -> None:
    """One of ten goes for each that proves it: nine tenths of a ring are enough, and new ones are not waited for."""
    policy = ConfigRollout(rings=("100%",), bake=60.0)
    memory = replace(begin(0.0), target=100, filled=True)
    decision, after = decide(policy, ConfigObserved(size=100, ready=9, trials=91, proved=91), memory, 1.0)
    assert after.phase is ConfigPhase.COMPLETE
    decision, after = decide(policy, ConfigObserved(size=100, ready=11, trials=89, proved=89), memory, 1.0)
    assert decision.release == 11
    decision, after = decide(policy, ConfigObserved(size=100, ready=0, trials=89, proved=89), memory, 1.0)
    assert (decision.release, decision.reasons[0].code) == (0, "config.short")
