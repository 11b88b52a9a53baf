"""The health verdict by example: each rule once, with its numbers."""

from __future__ import annotations

import json
import math

import pytest

from agentfleet.core.health import Beat, HealthMemory, Probed, Seen, Signal, Tick, Verdict, decide
from agentfleet.errors import JournalError
from agentfleet.instances import AgentStatus, HealthState, Phase
from agentfleet.specs import HealthPolicy, HeartbeatCheck, HttpCheck, TcpCheck

UNKNOWN, STARTING, HEALTHY = HealthState.UNKNOWN, HealthState.STARTING, HealthState.HEALTHY
SUSPECT, UNHEALTHY, DEAD = HealthState.SUSPECT, HealthState.UNHEALTHY, HealthState.DEAD
HTTP = HealthPolicy(checks=(HttpCheck(period=2.0, timeout=1.0, failures=3, successes=2),), startup=10.0)
BEATS = HealthPolicy(checks=(HeartbeatCheck(interval=1.0, phi=8.0, min_silence=3.0),), startup=20.0)


class Subject:
    """One instance under judgement."""

    def __init__(self, policy: HealthPolicy, memory: HealthMemory | None = None) -> None:
        self.policy = policy
        self.memory = memory or HealthMemory()
        self.verdict: Verdict | None = None

    def __call__(self, signal: Signal) -> HealthState:
        self.verdict, self.memory = decide(self.policy, signal, self.memory, signal.at)
        return self.verdict.state

    @property
    def codes(self) -> list[str]:
        assert self.verdict is not None
        return [reason.code for reason in self.verdict.reasons]

    @property
    def again(self) -> bool:
        assert self.verdict is not None
        return self.verdict.again

    @property
    def wake(self) -> float | None:
        assert self.verdict is not None
        return self.verdict.wake

    def started(self, at: float = 100.0) -> Subject:
        self(Seen(Phase.RUNNING, at, started_at=at, ready=True))
        return self


def ok(at: float, check: int = 0, status: AgentStatus | None = None) -> Probed:
    return Probed(check, True, at, 0.01, 0.0, None, status)


def bad(at: float, check: int = 0, *, lag: float = 0.0, latency: float = 1.0, state: str | None = None) -> Probed:
    return Probed(check, False, at, latency, lag, "no answer", AgentStatus(state) if state else None)


def test_a_life() -> None:
    one = Subject(HTTP)
    assert one(Seen(Phase.PENDING, 90.0)) is STARTING
    assert one.codes == ["health.pending"]
    assert one(Seen(Phase.RUNNING, 100.0, started_at=100.0)) is STARTING
    assert one(bad(101.0)) is STARTING
    assert one(ok(102.0)) is STARTING
    assert one(ok(103.0)) is HEALTHY
    assert one.verdict is not None
    assert (one.verdict.since, one.wake, one.codes) == (103.0, None, ["health.passing"])
    assert one(bad(105.0)) is SUSPECT
    assert one.codes == ["health.failing", "health.probe_failed"]
    assert one(ok(107.0)) is HEALTHY
    for at in (109.0, 111.0, 113.0):
        assert one(bad(at)) is SUSPECT
    assert one.codes == ["health.confirming", "health.probe_failed"]
    assert one(bad(113.1)) is UNHEALTHY
    assert one.codes == ["health.failed", "health.probe_failed"]
    assert one(ok(115.0)) is UNHEALTHY
    assert one.codes == ["health.recovering"]
    assert one(ok(117.0)) is HEALTHY
    assert one(Seen(Phase.DRAINING, 118.0, started_at=100.0)) is HEALTHY
    for at in (119.0, 121.0, 123.0, 125.0):
        assert one(bad(at)) is HEALTHY
    assert one(Seen(Phase.EXITED, 126.0, started_at=100.0)) is DEAD
    assert one.codes == ["health.exited"]


def test_failures_count_after_the_grace_only() -> None:
    one = Subject(HTTP).started(100.0)
    assert [one(bad(100.0 + second)) for second in range(10)] == [STARTING] * 10
    assert [one(bad(110.0 + second)) for second in range(4)] == [STARTING] * 3 + [UNHEALTHY]


def test_failures_after_a_success_count_within_the_grace() -> None:
    one = Subject(HTTP.replace(checks=(HttpCheck(failures=2),))).started(100.0)
    assert [one(ok(100.5)), one(bad(101.0)), one(bad(102.0))] == [HEALTHY, SUSPECT, SUSPECT]
    assert one(bad(102.5)) is UNHEALTHY


def test_the_failure_that_reaches_the_threshold_is_confirmed_at_once() -> None:
    one = Subject(HTTP).started()
    one(ok(101.0)), one(ok(102.0))
    assert [one(bad(110.0)), one.again, one(bad(112.0)), one.again] == [SUSPECT, False, SUSPECT, False]
    assert [one(bad(114.0)), one.again] == [SUSPECT, True]
    assert [one(Tick(114.1)), one.again] == [SUSPECT, False]
    assert [one(bad(114.2, lag=30.0)), one.again] == [SUSPECT, False]  # no evidence, and asked for but once
    assert [one(bad(116.0)), one.again] == [UNHEALTHY, False]
    assert one.verdict is not None
    assert one.verdict.reasons[0].numbers == {"failures": 4, "limit": 3}
    assert [one(bad(118.0)), one.again] == [UNHEALTHY, False]


def test_a_success_instead_of_the_confirmation_wipes_out_all_failures() -> None:
    one = Subject(HTTP).started()
    one(ok(101.0)), one(ok(102.0))
    for turn in range(5):
        assert [one(bad(110.0 + 10 * turn + second)) for second in range(3)] == [SUSPECT] * 3
        assert [one.again, one(ok(114.0 + 10 * turn)), one.again] == [True, HEALTHY, False]


def test_a_stricter_policy_needs_no_confirmation_of_what_is_certain() -> None:
    one = Subject(HTTP.replace(checks=(HttpCheck(failures=9),))).started()
    one(ok(101.0))
    for second in range(8):
        one(bad(110.0 + second))
    one.policy = HTTP
    assert [one(bad(120.0)), one.again] == [UNHEALTHY, False]


def test_one_met_in_mid_life_is_unknown_until_there_is_evidence() -> None:
    one = Subject(HTTP)
    assert one(Seen(Phase.RUNNING, 1000.0, started_at=100.0)) is UNKNOWN
    assert one(Tick(5000.0)) is UNKNOWN
    assert one(bad(5001.0)) is UNKNOWN
    assert [one(ok(5002.0)), one(ok(5003.0))] == [UNKNOWN, HEALTHY]
    two = Subject(HTTP)
    two(Seen(Phase.RUNNING, 1000.0, started_at=100.0))
    assert [two(bad(1001.0 + second)) for second in range(4)] == [UNKNOWN] * 3 + [UNHEALTHY]


@pytest.mark.parametrize(
    "again",
    [Seen(Phase.RUNNING, 120.0, started_at=119.0), Seen(Phase.RUNNING, 120.0, started_at=100.0, restarts=1)],
)
def test_a_restart_begins_anew(again: Seen) -> None:
    one = Subject(HTTP).started(100.0)
    one(ok(101.0)), one(ok(102.0))
    for at in (103.0, 104.0, 105.0, 106.0):
        one(bad(at))
    assert one.memory.state is UNHEALTHY
    assert one(again) is STARTING
    assert one.verdict is not None
    assert one.verdict.since == 120.0
    assert one.memory.checks == HealthMemory(checks=one.memory.checks).checks
    assert all(streak.run == 0 for streak in one.memory.checks)
    assert not one.memory.flaps


def test_a_start_time_that_trembles_is_no_restart_and_old_news_is_no_news() -> None:
    one = Subject(HTTP).started(100.0)
    one(ok(101.0)), one(ok(102.0))
    assert one(Seen(Phase.RUNNING, 103.0, started_at=100.9)) is HEALTHY
    one(Seen(Phase.RUNNING, 104.0, started_at=104.0, restarts=2))
    assert one(Seen(Phase.EXITED, 105.0, started_at=100.0, restarts=1)) is STARTING


def test_a_lost_node_that_returns_needs_new_evidence() -> None:
    one = Subject(HTTP).started(100.0)
    one(ok(101.0)), one(ok(102.0))
    assert one(Seen(Phase.LOST, 200.0, started_at=100.0)) is DEAD
    assert one(ok(201.0)) is DEAD
    assert one(Seen(Phase.RUNNING, 210.0, started_at=100.0)) is UNKNOWN
    assert [one(ok(211.0)), one(ok(212.0))] == [UNKNOWN, HEALTHY]


def test_the_worst_check_decides() -> None:
    policy = HealthPolicy(checks=(HttpCheck(failures=2), TcpCheck(failures=1)), startup=0)
    one = Subject(policy).started()
    assert [one(ok(101.0, 0)), one(ok(101.0, 1))] == [STARTING, HEALTHY]
    assert one(bad(102.0, 0)) is SUSPECT
    assert [one(bad(103.0, 1)), one(bad(103.5, 1))] == [SUSPECT, UNHEALTHY]
    assert one.codes == ["health.failed", "health.probe_failed"]
    assert one(ok(104.0, 1)) is SUSPECT
    assert one(ok(105.0, 0)) is HEALTHY


def test_a_slow_prober_is_no_evidence_but_a_refusal_is() -> None:
    one = Subject(HTTP).started()
    one(ok(101.0)), one(ok(102.0))
    assert [one(bad(110.0 + second, lag=0.5)) for second in range(9)] == [HEALTHY] * 9
    assert [one(bad(120.0 + second, lag=30.0, latency=0.001)) for second in range(4)] == [SUSPECT] * 3 + [UNHEALTHY]


def test_an_agent_that_drains_by_its_own_word_is_not_unhealthy() -> None:
    one = Subject(HTTP).started()
    one(ok(101.0)), one(ok(102.0))
    assert [one(bad(110.0 + second, state="draining")) for second in range(9)] == [HEALTHY] * 9


def test_busy_without_progress_is_stuck() -> None:
    policy = HealthPolicy(checks=(HttpCheck(path="/status"),), stuck_after=60.0)
    one = Subject(policy).started()

    def says(at: float, state: str, progress: float | None) -> HealthState:
        return one(ok(at, status=AgentStatus(state, last_progress=progress)))

    assert says(101.0, "busy", 1.0) is HEALTHY
    assert says(102.0, "idle", 7200.0) is HEALTHY
    assert says(103.0, "draining", 7200.0) is HEALTHY
    assert says(104.0, "busy", None) is HEALTHY
    assert says(105.0, "busy", 59.9) is HEALTHY
    assert says(106.0, "busy", 60.0) is UNHEALTHY
    assert one.codes == ["health.stuck"]
    assert one(ok(107.0)) is UNHEALTHY
    assert one(bad(108.0)) is UNHEALTHY
    assert one.codes == ["health.stuck", "health.probe_failed"]
    assert says(109.0, "busy", 0.0) is HEALTHY
    assert (
        Subject(HTTP.replace(stuck_after=None)).started()(ok(1.0, status=AgentStatus("busy", last_progress=1e9)))
        is STARTING
    )


def change(one: Subject, at: float, *, well: bool) -> HealthState:
    """What a check of one failure says after a success, or after a failure that is confirmed."""
    if not well:
        one(bad(at))
    return one(ok(at) if well else bad(at))


def test_flapping_is_damped_until_it_is_calm() -> None:
    policy = HealthPolicy(checks=(HttpCheck(failures=1),), flap_window=100.0, flap_limit=4, startup=0)
    one = Subject(policy).started(0.0)
    states = [change(one, float(at), well=bool(at % 2)) for at in range(1, 20)]
    assert states == [HEALTHY, UNHEALTHY, HEALTHY, UNHEALTHY, HEALTHY] + [UNHEALTHY] * 14
    assert one.codes == ["health.flapping"]
    assert one.memory.flaps == (3.0, 4.0, 5.0, 6.0)
    assert one.wake == 103.0
    assert one(Tick(102.9)) is UNHEALTHY
    assert one(Tick(103.0)) is HEALTHY
    undamped = Subject(policy.replace(flap_window=0)).started(0.0)
    assert [change(undamped, float(at), well=bool(at % 2)) for at in range(1, 20)].count(HEALTHY) == 10


def test_heartbeats() -> None:
    one = Subject(BEATS).started(100.0)
    assert one.wake == 120.0
    assert one(Beat(100.5)) is HEALTHY
    for second in range(1, 60):
        assert one(Beat(100.5 + second)) is HEALTHY
    last = one.memory.rhythm.last if one.memory.rhythm else math.nan
    assert one.wake == last + 3.0  # so regular that only the floor is left
    assert one(Tick(last + 2.99)) is HEALTHY
    assert one(Tick(last + 3.0)) is UNHEALTHY
    assert one.codes == ["health.silent"]
    assert one.verdict is not None
    assert one.verdict.reasons[0].numbers["phi"] > 8
    assert one(Beat(last + 9.0)) is HEALTHY


def test_a_first_heartbeat_is_waited_for_as_long_as_the_grace() -> None:
    one = Subject(BEATS).started(100.0)
    assert [one(Tick(119.9)), one(Tick(120.0))] == [STARTING, UNHEALTHY]
    adopted = Subject(BEATS)
    assert adopted(Seen(Phase.RUNNING, 1000.0, started_at=1.0)) is UNKNOWN
    assert [adopted(Tick(1019.9)), adopted(Tick(1020.0))] == [UNKNOWN, UNHEALTHY]


def test_an_irregular_rhythm_is_given_more_patience() -> None:
    one = Subject(BEATS).started(100.0)
    at = 100.0
    for step in range(100):
        at += 0.5 if step % 2 else 4.0
        one(Beat(at))
    assert one.memory.state is HEALTHY
    assert one.wake is not None
    assert one.wake > at + 8.0


def test_time_in_which_the_observer_was_deaf_is_no_silence() -> None:
    one = Subject(BEATS).started(100.0)
    for second in range(30):
        one(Beat(100.0 + second))
    assert one(Tick(160.0, lag=30.0)) is HEALTHY
    assert one.wake == 162.0
    assert one(Tick(162.0)) is UNHEALTHY


def test_another_observer_begins_to_listen_anew() -> None:
    one = Subject(BEATS).started(100.0)
    for second in range(30):
        one(Beat(100.0 + second))
    heir = Subject(BEATS, HealthMemory.from_dict(json.loads(json.dumps(one.memory.to_dict()))))
    assert heir(Tick(900.0, lag=math.inf)) is HEALTHY
    assert heir(Tick(902.9)) is HEALTHY
    assert heir(Tick(903.0)) is UNHEALTHY


def test_without_checks_the_backend_decides() -> None:
    one = Subject(HealthPolicy(startup=10.0))
    assert one(Tick(1.0)) is UNKNOWN
    assert one(Seen(Phase.PENDING, 90.0)) is STARTING
    assert one(Seen(Phase.RUNNING, 100.0, started_at=100.0)) is STARTING
    assert one.wake == 110.0
    assert one(Seen(Phase.RUNNING, 105.0, started_at=100.0, ready=True)) is HEALTHY
    assert [one.wake] == [None]  # a list, or mypy believes it for good
    assert one(Seen(Phase.RUNNING, 200.0, started_at=100.0)) is SUSPECT
    assert one.wake == 210.0
    assert [one(Tick(209.9)), one(Tick(210.0))] == [SUSPECT, UNHEALTHY]
    assert one.codes == ["health.not_ready"]
    assert one(Seen(Phase.RUNNING, 220.0, started_at=100.0, ready=True)) is HEALTHY


def test_never_ready_is_unhealthy_after_the_grace() -> None:
    one = Subject(HealthPolicy(startup=10.0))
    one(Seen(Phase.PENDING, 50.0))
    one(Seen(Phase.RUNNING, 100.0, started_at=100.0))
    assert [one(Tick(109.9)), one(Tick(110.0))] == [STARTING, UNHEALTHY]


def test_a_policy_that_gains_and_loses_checks_keeps_the_rest() -> None:
    one = Subject(HealthPolicy(checks=(TcpCheck(),))).started()
    assert one(ok(101.0)) is HEALTHY
    one.policy = HealthPolicy(checks=(TcpCheck(), HttpCheck()))
    assert one(Tick(102.0)) is HEALTHY
    assert [one(bad(103.0 + second, 1)) for second in range(3)] == [HEALTHY] * 3  # it is still within its grace
    assert [one(bad(203.0 + second, 1)) for second in range(4)] == [HEALTHY] * 3 + [UNHEALTHY]
    one.policy = HealthPolicy(checks=(TcpCheck(),))
    assert one(bad(300.0, 1)) is HEALTHY
    assert one(ok(301.0)) is HEALTHY


def test_memory_is_small_and_shared() -> None:
    one, two = Subject(HTTP).started(), Subject(HTTP).started()
    one(ok(101.0)), two(ok(101.5))
    assert one.memory.checks is two.memory.checks
    same = one.memory
    for at in range(102, 110):
        one(ok(float(at)))
    steady = one.memory
    one(ok(111.0))
    assert one.memory is steady
    assert steady is not same


@pytest.mark.parametrize("broken", [{}, {"state": "fine"}, HealthMemory().to_dict() | {"checks": [1]}])
def test_a_broken_record_is_an_error(broken: dict[str, object]) -> None:
    with pytest.raises(JournalError, match="not a health memory"):
        HealthMemory.from_dict(broken)
