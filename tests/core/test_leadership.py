"""What one candidate decides, case by case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from agentfleet.core.fence import NoFence
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
OTHERS = LeaseRecord("other", 4, 7.0, "t", "v9", "u1")


class Candidate:
    """Plays the loop's part by hand."""

    def __init__(self, policy: LeasePolicy = POLICY) -> None:
        self.policy = policy
        self.memory = LeaseMemory()
        self.now = 1000.0
        self.last: LeaseDecision | None = None

    def told(self, news: News | None = None, *, after: float = 0.0, leaving: bool = False) -> LeaseDecision:
        self.now += after
        observed = LeaseObserved("me", news, 1.0, leaving)
        self.last, self.memory = decide(self.policy, observed, self.memory, self.now)
        return self.last

    def wrote(self, *, after: float = 0.0, took: float = 0.0, version: str = "v10") -> LeaseDecision:
        """The last decision's write is accepted."""
        assert self.last is not None
        assert self.last.write is not None
        record = replace(self.last.write, version=version, uid="u1", taken=False)
        return self.told(Wrote(record, self.now + after - took), after=after)

    def leading(self) -> Candidate:
        self.told()
        self.told(Looked(None))
        self.wrote()
        return self


def codes(decision: LeaseDecision) -> list[str]:
    return [reason.code for reason in decision.reasons]


def test_it_looks_first() -> None:
    assert Candidate().told().action is Action.LOOK


def test_no_lease_is_made() -> None:
    candidate = Candidate()
    candidate.told()
    decision = candidate.told(Looked(None))
    assert decision.action is Action.ACQUIRE
    assert decision.write == LeaseRecord("me", 1, 7.0, taken=True)
    assert codes(decision) == ["lease.absent"]
    decision = candidate.wrote(after=0.5, took=0.5)
    assert (decision.action, decision.epoch, decision.holder) == (Action.HOLD, 1, "me")
    assert decision.valid_until == candidate.now - 0.5 + POLICY.renew_deadline  # from before it was sent
    assert decision.wake == candidate.now - 0.5 + POLICY.renew


def test_a_lease_given_up_is_taken_at_once() -> None:
    candidate = Candidate()
    candidate.told()
    decision = candidate.told(Looked(replace(OTHERS, holder=None)))
    assert decision.action is Action.ACQUIRE
    assert decision.write is not None
    assert (decision.write.epoch, decision.write.version, decision.write.taken) == (5, "v9", True)
    assert codes(decision) == ["lease.free"]


def test_a_held_lease_is_watched_and_taken_when_it_is_silent_for_its_duration() -> None:
    candidate = Candidate()
    candidate.told()
    began, looks = candidate.now, 0
    decision = candidate.told(Looked(OTHERS))
    while decision.action is not Action.ACQUIRE:
        assert decision.action is Action.HOLD
        assert codes(decision) == ["lease.following"]
        looks += 1
        decision = candidate.told(after=decision.wake - candidate.now)
        if decision.action is Action.LOOK:
            decision = candidate.told(Looked(OTHERS), after=0.01)
    assert candidate.now == began + 7.0
    assert codes(decision) == ["lease.expired"]
    assert looks == pytest.approx(7.0 / POLICY.poll, abs=1)


def test_any_change_begins_the_wait_anew() -> None:
    candidate = Candidate()
    candidate.told()
    for number in range(20):
        decision = candidate.told(Looked(replace(OTHERS, version=f"n{number}")), after=3.0)
        assert decision.action is Action.HOLD


@pytest.mark.parametrize(("recorded", "wait"), [(3.0, 7.0), (20.0, 20.0), (1e9, 60.0), (math.inf, 60.0)])
def test_the_longer_of_the_two_durations_counts_up_to_a_limit(recorded: float, wait: float) -> None:
    candidate = Candidate()
    candidate.told()
    record = replace(OTHERS, duration=recorded)
    began = candidate.now
    candidate.told(Looked(record))
    while candidate.last is not None and candidate.last.action is not Action.ACQUIRE:
        decision = candidate.told(after=1.0)
        if decision.action is Action.LOOK:
            candidate.told(Looked(record))
    assert candidate.now - began == pytest.approx(wait, abs=1.0)
    assert candidate.now - began >= wait


def test_silence_counts_only_while_someone_listens() -> None:
    candidate = Candidate()
    candidate.told()
    candidate.told(Looked(OTHERS))
    assert candidate.told(after=60.0).action is Action.LOOK  # it was stopped for a minute, say
    decision = candidate.told(Looked(OTHERS))
    assert decision.action is Action.HOLD  # the leader may have had no store to renew at either
    assert candidate.told(after=POLICY.duration).action is Action.LOOK


def test_old_answers_are_no_change() -> None:
    candidate = Candidate()
    candidate.told()
    newer = replace(OTHERS, version="v10")
    began = candidate.now
    candidate.told(Looked(OTHERS))
    candidate.told(Looked(newer))
    for number in range(30):
        decision = candidate.told(Looked((OTHERS, newer)[number % 2]), after=0.5)
        if decision.action is Action.ACQUIRE:
            break
    assert candidate.now == began + 7.0
    assert decision.write is not None
    assert decision.write.version == "v10"
    candidate.told(Looked(replace(OTHERS, epoch=3, version="v1")))
    assert candidate.memory.record == newer


def test_a_leader_renews_and_goes_on() -> None:
    candidate = Candidate().leading()
    decision = candidate.told(after=2.0)
    assert decision.action is Action.RENEW
    assert decision.write is not None
    assert (decision.write.epoch, decision.write.version, decision.write.taken) == (1, "v10", False)
    decision = candidate.wrote(after=0.3, took=0.3, version="v11")
    assert decision.valid_until == candidate.now - 0.3 + 3.5
    assert decision.epoch == 1


def test_an_early_tick_holds() -> None:
    candidate = Candidate().leading()
    decision = candidate.told(after=0.1)
    assert decision.action is Action.HOLD
    assert codes(decision) == ["lease.leading"]


def test_a_leader_that_cannot_renew_lapses_and_comes_back_if_nobody_else_has_led() -> None:
    candidate = Candidate().leading()
    before = candidate.memory.valid_until
    decision = candidate.told(after=2.0)
    while candidate.now < before + 2:
        decision = candidate.told(Failed("no answer"), after=0.5)
        assert (decision.valid_until, decision.epoch) == (before, 1)
        decision = candidate.told(after=max(0.0, decision.wake - candidate.now))
    assert decision.action is Action.RENEW
    assert "lease.lapsed" in codes(decision)
    decision = candidate.wrote(version="v11")
    assert decision.valid_until == candidate.now + 3.5
    assert decision.epoch == 1


def test_failures_back_off() -> None:
    candidate = Candidate().leading()
    candidate.told(after=2.0)
    waits = []
    for _ in range(8):
        decision = candidate.told(Failed("no answer"))
        assert "lease.failed" in codes(decision)
        waits.append(decision.wake - candidate.now)
        candidate.told(after=waits[-1])
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0])


def test_a_leader_that_finds_another_is_over() -> None:
    candidate = Candidate().leading()
    candidate.told(after=60.0)
    decision = candidate.told(Refused())
    assert decision.epoch == 1  # not known yet, but long lapsed
    assert decision.valid_until < candidate.now
    assert candidate.told(after=decision.wake - candidate.now).action is Action.LOOK
    decision = candidate.told(Looked(replace(OTHERS, epoch=2, version="v11")))
    assert decision.epoch is None
    assert decision.valid_until == -math.inf
    assert codes(decision) == ["lease.lost", "lease.following"]


def test_a_leader_whose_answer_was_lost_looks_and_renews() -> None:
    candidate = Candidate().leading()
    candidate.told(after=2.0)
    candidate.told(Failed("no answer"), after=1.0)
    assert candidate.told(after=0.2).action is Action.RENEW  # once more, with the version that it knows
    decision = candidate.told(Refused())
    candidate.told(after=decision.wake - candidate.now)
    mine = LeaseRecord("me", 1, 7.0, "t", "v11", "u1")
    decision = candidate.told(Looked(mine))
    assert decision.action is Action.RENEW
    assert decision.epoch == 1
    assert decision.write is not None
    assert decision.write.version == "v11"


def test_a_lease_taken_by_a_lost_answer_is_taken_again() -> None:
    candidate = Candidate()
    candidate.told()
    decision = candidate.told(Looked(LeaseRecord("me", 5, 7.0, "t", "v11", "u1")))
    assert decision.action is Action.ACQUIRE
    assert decision.epoch is None
    assert decision.write is not None
    assert decision.write.epoch == 6


def test_a_leader_whose_lease_is_deleted_waits_before_it_makes_another() -> None:
    candidate = Candidate().leading()
    candidate.told(after=2.0)
    decision = candidate.told(Refused())
    candidate.told(after=decision.wake - candidate.now)
    decision = candidate.told(Looked(None))
    assert decision.epoch is None
    began = candidate.now
    while decision.action is not Action.ACQUIRE:
        decision = candidate.told(after=decision.wake - candidate.now)
        if decision.action is Action.LOOK:
            decision = candidate.told(Looked(None))
    assert candidate.now == pytest.approx(began + 7.0)
    assert decision.write == LeaseRecord("me", 2, 7.0, taken=True)


def test_a_lease_made_again_by_another_is_followed_and_epochs_go_on_from_the_highest() -> None:
    candidate = Candidate()
    candidate.told()
    candidate.told(Looked(replace(OTHERS, epoch=40)))
    candidate.told(Looked(replace(OTHERS, epoch=1, uid="u2", version="v1")), after=1.0)
    assert candidate.memory.record is not None
    assert candidate.memory.record.uid == "u2"
    decision = candidate.told(Looked(replace(OTHERS, epoch=1, uid="u2", version="v2", holder=None)), after=1.0)
    assert decision.write is not None
    assert decision.write.epoch == 41


def test_leaving_gives_the_lease_up() -> None:
    candidate = Candidate().leading()
    decision = candidate.told(leaving=True)
    assert decision.action is Action.RELEASE
    assert decision.write == LeaseRecord(None, 1, 7.0, "", "v10", "u1")
    assert decision.epoch == 1
    decision = candidate.told(Wrote(replace(decision.write, version="v11"), candidate.now), leaving=True)
    assert decision.action is Action.DONE
    assert decision.epoch is None


def test_leaving_after_a_write_that_was_cut_off_looks_first() -> None:
    candidate = Candidate().leading()
    candidate.told(after=2.0)
    decision = candidate.told(Refused(), leaving=True)
    decision = candidate.told(after=decision.wake - candidate.now, leaving=True)
    assert decision.action is Action.LOOK
    decision = candidate.told(Looked(LeaseRecord("me", 1, 7.0, "t", "v11", "u1")), leaving=True)
    assert decision.action is Action.RELEASE
    assert decision.write is not None
    assert decision.write.version == "v11"


def test_leaving_with_nothing_is_done_at_once() -> None:
    assert Candidate().told(leaving=True).action is Action.DONE
    candidate = Candidate()
    candidate.told()
    candidate.told(Looked(OTHERS))
    assert candidate.told(leaving=True).action is Action.DONE


@pytest.mark.parametrize(
    "wrong",
    [
        {"renew_deadline": "7s"},
        {"renew": "3.5s"},
        {"duration": "61s"},
        {"poll": "3s"},
        {"renew": 0},
    ],
)
def test_policies_in_the_wrong_order_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LeasePolicy.model_validate(wrong)


def test_the_default_policy_bears_one_clock_at_double_speed() -> None:
    assert LeasePolicy().drift == 2.0


def test_no_fence_lets_everything_through() -> None:
    fence = NoFence()
    assert (fence.ensure(), fence.deadline(5.0)) == (0, 5.0)
    with fence.writing(3.0) as deadline:
        assert deadline == 3.0
