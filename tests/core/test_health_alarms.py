"""False alarms: well instances that pause, behind a network that loses probes, are not restarted."""

from __future__ import annotations

import math

import pytest
from tests.core.pauses import Troubles, watch

from agentfleet.core.health import HealthMemory, Probed, Seen, decide
from agentfleet.instances import HealthState, Phase
from agentfleet.specs import HealthPolicy, HttpCheck

CHECK = HttpCheck(period=2.0, failures=5)
HASTY = HttpCheck(period=2.0, failures=5, timeout=1.0)


def test_a_day_of_a_thousand_instances_has_no_false_verdict() -> None:
    """1 % of probes lost, and a pause of up to 8 s an hour and instance; 43 million probes, and none is wronged."""
    alarms = watch(CHECK, Troubles(), instances=1000, hours=24)
    print(alarms)
    assert alarms.probes == 43_200_000
    assert alarms.unconfirmed > 0  # without confirmation there would have been some
    assert alarms.verdicts == 0


def test_confirmation_is_what_prevents_them() -> None:
    """In a world ten times as bad the threshold is reached often, and nearly always in vain."""
    alarms = watch(CHECK, Troubles(loss=0.1), instances=60, hours=24)
    print(alarms)
    assert alarms.unconfirmed > 20
    assert alarms.verdicts < alarms.unconfirmed / 5  # a tenth of confirmations is lost, too


@pytest.mark.parametrize("check", [CHECK, HASTY])
@pytest.mark.parametrize("length", [4.0, 6.5, 7.0, 7.9])
def test_a_pause_and_one_lost_probe_are_never_enough(check: HttpCheck, length: float) -> None:
    """Whenever in the period the pause begins, and whichever probe around it is lost."""
    for begin in (10.0 + step / 20 for step in range(40)):
        for lost in range(12):
            assert HealthState.UNHEALTHY not in judged(check, (begin, begin + length), lost)


@pytest.mark.parametrize("check", [CHECK, HASTY])
def test_a_freeze_is_found(check: HttpCheck) -> None:
    """The same model finds an instance that never wakes."""
    states = judged(check, (10.0, math.inf), 99)
    assert states == [HealthState.HEALTHY] * 5 + [HealthState.SUSPECT] * 5 + [HealthState.UNHEALTHY]


def judged(check: HttpCheck, pause: tuple[float, float], lost: int) -> list[HealthState]:
    """The verdicts on an instance with one pause and one lost probe, until it is well again or found unhealthy."""
    policy = HealthPolicy(checks=(check,))
    _, memory = decide(policy, Seen(Phase.RUNNING, 0.0, started_at=0.0), HealthMemory(), 0.0)
    asked, states = 0.0, []
    for number in range(20):
        silent = number == lost or pause[0] <= asked < pause[1] - check.deadline
        ended = asked + (check.deadline if silent else 0.0)
        verdict, memory = decide(policy, Probed(0, not silent, ended), memory, ended)
        states.append(verdict.state)
        if verdict.state is HealthState.UNHEALTHY:
            break
        asked = ended if verdict.again else max(ended, (asked // check.period + 1) * check.period)
    return states
