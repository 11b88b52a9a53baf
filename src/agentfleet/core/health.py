"""Is this instance well? One verdict from any mix of signals: probes, heartbeats, the backend's and the agent's word.

The rules, each of them a property test:

1. Only evidence makes an instance unhealthy: `failures` consecutive failures of one check and one more that confirms
   them, a silence beyond what its heartbeats explain, its own word that it is busy without progress, or its backend's
   word. No evidence, no change.
2. A slow observer is no evidence: a probe that failed slowly while the prober itself was slow for half the time-out
   does not count (Dadgar, Phillips, Currey, "Lifeguard", DSN-W 2018), and a silence is shortened by the time in which
   the observer was deaf.
3. Every check must pass, and the worst one decides.
4. Until a check has passed once, its failures count only after the start-up grace.
5. A restart begins anew; an instance met in mid-life is UNKNOWN until there is evidence.
6. An instance that keeps changing its mind stays unhealthy until it is calm.

One decision costs the same in a fleet of ten and of a hundred thousand, and remembers about 150 bytes an instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from agentfleet.core.evidence import Beat, HealthMemory, Probed, Seen, Signal, Streak, Tick, shared
from agentfleet.core.phi import Rhythm, expected, phi, silence_for
from agentfleet.core.reason import Reason
from agentfleet.instances import AgentStatus, HealthState, Phase
from agentfleet.specs import Check, CustomCheck, HealthPolicy, HeartbeatCheck, HttpCheck, TcpCheck

__all__ = ["Beat", "HealthMemory", "Probed", "Seen", "Signal", "Streak", "Tick", "Verdict", "decide"]

_Probing = HttpCheck | TcpCheck | CustomCheck

# ------------------------------------------------------------------------------------------------ what is decided


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is believed of an instance, since when, why, and what would tell more.

    `since` is in seconds since the epoch; `wake` is when to send a `Tick`, None when only a signal can change anything.
    `again` says that the check just answered has failed often enough, and should be asked once more at once: only if
    that fails too, the instance is unhealthy. Whoever does not ask at once gets the same verdict a period later.
    """

    state: HealthState
    since: float
    reasons: tuple[Reason, ...]
    wake: float | None = None
    again: bool = False


_PASSING: Final = (Reason("health.passing", "every check passes"),)
_READY: Final = (Reason("health.ready", "the backend says that it is ready"),)
_PENDING: Final = (Reason("health.pending", "it does not run yet"),)
_DRAINING: Final = (Reason("health.draining", "it finishes its work, and is judged no more"),)
_UNDECIDED: Final = (Reason("health.undecided", "no check has passed or failed often enough to decide"),)
_STUCK: Final = Reason("health.stuck", "it says that it is busy, and reports no progress")
_UNDAMPED: Final = (HealthState.STARTING, HealthState.DEAD)
_GONE: Final = {
    Phase.EXITED: (Reason("health.exited", "its process has ended"),),
    Phase.LOST: (Reason("health.lost", "its node cannot be reached"),),
}


def decide(policy: HealthPolicy, signal: Signal, memory: HealthMemory, now: float) -> tuple[Verdict, HealthMemory]:
    """Judge one instance anew after one signal.

    Args:
        policy: The rules. After a change of policy the memory may be kept; checks are matched by position.
        signal: What has happened.
        memory: From the last decision on this instance; `HealthMemory()` before the first.
        now: Seconds since the epoch, not before the last decision's.
    """
    seen = _absorb(policy, signal, memory, now)
    state, reasons = _judge(policy, seen, now)
    flaps = seen.flaps
    if policy.flap_window and state is not seen.state and state not in _UNDAMPED:
        state, reasons, flaps = _damp(policy, seen, state, reasons, now)
    if state is not seen.state:
        seen = replace(seen, state=state, since=now, flaps=flaps)
    if isinstance(signal, Probed) and signal.error and state in (HealthState.SUSPECT, HealthState.UNHEALTHY):
        reasons = (*reasons, Reason("health.probe_failed", signal.error, {"latency_s": signal.latency}))
    again = isinstance(signal, Probed) and seen is not memory and _needs_confirming(policy, signal, memory, seen)
    return Verdict(seen.state, seen.since, reasons, _wake(policy, seen, now), again), seen


# ------------------------------------------------------------------------------------------------ taking in a signal


def _absorb(policy: HealthPolicy, signal: Signal, memory: HealthMemory, now: float) -> HealthMemory:
    """The memory with the signal in it, the verdict still the old one."""
    if len(memory.checks) != len(policy.checks):
        fitted = (memory.checks + (Streak(),) * len(policy.checks))[: len(policy.checks)]
        memory = replace(memory, checks=shared(fitted))
    if isinstance(signal, Probed):
        return _absorb_probe(policy, signal, memory, now)
    if isinstance(signal, Beat):
        return _absorb_beat(policy, signal, memory)
    if isinstance(signal, Seen):
        return _absorb_sight(policy, signal, memory, now)
    if signal.lag > 0 and memory.rhythm is not None:
        return replace(memory, rhythm=memory.rhythm.excused(signal.lag, now))
    return memory


def _absorb_probe(policy: HealthPolicy, probe: Probed, memory: HealthMemory, now: float) -> HealthMemory:
    if not 0 <= probe.check < len(policy.checks) or memory.phase not in (Phase.RUNNING, None):
        return memory  # a late answer to a question of an earlier policy or life
    check = policy.checks[probe.check]
    if isinstance(check, HeartbeatCheck):
        return memory
    streak = memory.checks[probe.check]
    status = probe.status
    stuck = memory.stuck if status is None else _is_stuck(policy, status)
    if probe.ok:
        run = min(max(streak.run, 0) + 1, check.successes)
        passing = True if run >= check.successes else streak.passing
    elif _is_excused(policy, probe, memory, now):
        run, passing = streak.run, streak.passing
    else:
        run = max(min(streak.run, 0) - 1, -check.failures - 1)
        passing = False if run < -check.failures else streak.passing
    checks = memory.checks
    if run != streak.run or passing is not streak.passing:
        checks = shared((*checks[: probe.check], Streak(passing, run), *checks[probe.check + 1 :]))
    elif stuck is memory.stuck:
        return memory
    return replace(memory, checks=checks, stuck=stuck)


def _is_excused(policy: HealthPolicy, probe: Probed, memory: HealthMemory, now: float) -> bool:
    """Whether a failed probe says nothing about the instance."""
    check = policy.checks[probe.check]
    assert not isinstance(check, HeartbeatCheck)
    half = check.deadline / 2
    if probe.lag >= half and probe.latency >= half:
        return True  # it was slow because the prober was; a quick "connection refused" is evidence at any lag
    if probe.status is not None and probe.status.state == "draining":
        return True  # it may well answer 503 while it finishes
    return memory.checks[probe.check].passing is None and _in_grace(policy, memory, now)


def _needs_confirming(policy: HealthPolicy, probe: Probed, before: HealthMemory, after: HealthMemory) -> bool:
    """Whether this very failure has reached the threshold; an excused one has not, so nobody is asked in a loop."""
    if not 0 <= probe.check < len(policy.checks):
        return False
    check, streak = policy.checks[probe.check], after.checks[probe.check]
    if isinstance(check, HeartbeatCheck) or not _is_unconfirmed(check, streak):
        return False
    return before.checks[probe.check : probe.check + 1] != (streak,)


def _is_unconfirmed(check: _Probing, streak: Streak) -> bool:
    return streak.run == -check.failures and streak.passing is not False


def _is_stuck(policy: HealthPolicy, status: AgentStatus) -> bool:
    return (
        policy.stuck_after is not None
        and status.state == "busy"
        and status.last_progress is not None
        and status.last_progress >= policy.stuck_after
    )


def _in_grace(policy: HealthPolicy, memory: HealthMemory, now: float) -> bool:
    return memory.started_at is not None and now - memory.started_at < policy.startup


def _absorb_beat(policy: HealthPolicy, beat: Beat, memory: HealthMemory) -> HealthMemory:
    checks = [check for check in policy.checks if isinstance(check, HeartbeatCheck)]
    if not checks or memory.phase in _GONE:
        return memory
    rhythm = memory.rhythm or expected(checks[0].interval, beat.at)
    most = max(_patience(policy, check, rhythm) for check in checks)
    return replace(memory, rhythm=rhythm.heard(beat.at, most))


def _absorb_sight(policy: HealthPolicy, seen: Seen, memory: HealthMemory, now: float) -> HealthMemory:
    if memory.phase is not None and seen.restarts < memory.restarts:
        return memory  # out of date
    if _is_new_life(seen, memory):
        unmoved = memory.started_at is not None and (seen.started_at or 0.0) <= memory.started_at
        return _begin(policy, replace(seen, started_at=now) if unmoved else seen, now)
    started_at = max(seen.started_at or 0.0, memory.started_at or 0.0) or None
    if memory.phase in _GONE and seen.phase not in _GONE:  # its node is back: what was known is out of date
        return replace(_begin(policy, seen, now), state=HealthState.UNKNOWN, started_at=started_at)
    rhythm = memory.rhythm
    if seen.phase is Phase.RUNNING and memory.phase is not Phase.RUNNING:
        rhythm = rhythm.excused(math.inf, now) if rhythm else _listen(policy, now)
    if (seen.phase, seen.ready, started_at) == (memory.phase, memory.ready, memory.started_at):
        return memory
    return replace(memory, phase=seen.phase, ready=seen.ready, started_at=started_at, rhythm=rhythm)


def _is_new_life(seen: Seen, memory: HealthMemory) -> bool:
    if memory.phase is None or seen.restarts > memory.restarts:
        return True
    if seen.started_at is None or memory.started_at is None:
        return False
    # start times may be read from a clock that is adjusted: less than a second is no restart by itself
    return seen.started_at > memory.started_at + 1.0


def _begin(policy: HealthPolicy, seen: Seen, now: float) -> HealthMemory:
    """A new life, or the first sight of one."""
    running = seen.phase is Phase.RUNNING
    old = running and (seen.started_at is None or now - seen.started_at > policy.startup)
    met_in_mid_life = old or seen.phase is Phase.DRAINING
    return HealthMemory(
        state=HealthState.UNKNOWN if met_in_mid_life else HealthState.STARTING,
        since=now,
        phase=seen.phase,
        ready=seen.ready,
        started_at=seen.started_at,
        restarts=seen.restarts,
        checks=shared((Streak(),) * len(policy.checks)),
        rhythm=_listen(policy, now) if running else None,
    )


def _listen(policy: HealthPolicy, now: float) -> Rhythm | None:
    for check in policy.checks:
        if isinstance(check, HeartbeatCheck):
            return expected(check.interval, now)
    return None


# ------------------------------------------------------------------------------------------------ judging


def _judge(policy: HealthPolicy, memory: HealthMemory, now: float) -> tuple[HealthState, tuple[Reason, ...]]:
    """The state that the evidence calls for, undamped."""
    phase = memory.phase
    if phase in _GONE:
        return HealthState.DEAD, _GONE[phase]
    if phase is Phase.PENDING:
        return HealthState.STARTING, _PENDING
    if phase is Phase.DRAINING:
        return memory.state, _DRAINING
    if memory.stuck:
        return HealthState.UNHEALTHY, (_STUCK,)
    if not policy.checks:
        return _judge_readiness(policy, memory, now)
    worst: tuple[Reason, ...] = ()
    suspect = undecided = False
    for check, streak in zip(policy.checks, memory.checks, strict=True):
        if isinstance(check, HeartbeatCheck):
            passing = _is_heard(policy, check, memory, now)
        else:
            passing = streak.passing
            suspect = suspect or streak.run < 0
        if passing is False:
            worst = (*worst, _explain(policy, check, streak, memory, now))
        undecided = undecided or passing is None
    if worst:
        return HealthState.UNHEALTHY, worst
    if undecided:
        return memory.state, _UNDECIDED
    return (HealthState.SUSPECT, _suspicion(policy, memory)) if suspect else (HealthState.HEALTHY, _PASSING)


def _judge_readiness(policy: HealthPolicy, memory: HealthMemory, now: float) -> tuple[HealthState, tuple[Reason, ...]]:
    """Without checks the backend's word counts, and a lack of readiness counts once it has lasted for the grace."""
    if memory.phase is None:
        return memory.state, _UNDECIDED
    if memory.ready:
        return HealthState.HEALTHY, _READY
    state = HealthState.SUSPECT if memory.state is HealthState.HEALTHY else memory.state
    since = now if state is not memory.state else max(memory.since, memory.started_at or 0.0)
    numbers = {"not_ready_s": now - since, "grace_s": policy.startup}
    reason = Reason("health.not_ready", "the backend says that it is not ready", numbers)
    if state is HealthState.UNHEALTHY or now >= since + policy.startup:
        return HealthState.UNHEALTHY, (reason,)
    return state, (reason,)


def _patience(policy: HealthPolicy, check: HeartbeatCheck, rhythm: Rhythm) -> float:
    """Seconds of silence that make an instance unhealthy."""
    patience = max(check.min_silence, silence_for(check.phi, rhythm.mean, rhythm.deviation))
    return float(patience if rhythm.count else max(policy.startup, patience))


def _is_heard(policy: HealthPolicy, check: HeartbeatCheck, memory: HealthMemory, now: float) -> bool | None:
    rhythm = memory.rhythm
    if rhythm is None:
        return None
    if now >= rhythm.last + _patience(policy, check, rhythm):
        return False
    return True if rhythm.count else None


def _suspicion(policy: HealthPolicy, memory: HealthMemory) -> tuple[Reason, ...]:
    numbers = {"failures": max(-streak.run for streak in memory.checks)}
    for check, streak in zip(policy.checks, memory.checks, strict=True):
        if not isinstance(check, HeartbeatCheck) and _is_unconfirmed(check, streak):
            return (Reason("health.confirming", "a check has failed often enough; one more probe decides", numbers),)
    return (Reason("health.failing", "a check fails, not often enough to decide", numbers),)


def _explain(policy: HealthPolicy, check: Check, streak: Streak, memory: HealthMemory, now: float) -> Reason:
    if isinstance(check, HeartbeatCheck):
        assert memory.rhythm is not None
        rhythm, silence = memory.rhythm, now - memory.rhythm.last
        numbers = {
            "silence_s": silence,
            "patience_s": _patience(policy, check, rhythm),
            "phi": phi(silence, rhythm.mean, rhythm.deviation),
            "beats": rhythm.count,
        }
        return Reason("health.silent", "its heartbeats have stopped", numbers)
    if streak.run > 0:
        numbers = {"successes": streak.run, "needed": check.successes}
        return Reason("health.recovering", f"its {check.kind} check passes again, not often enough yet", numbers)
    return Reason("health.failed", f"its {check.kind} check fails", {"failures": -streak.run, "limit": check.failures})


def _damp(
    policy: HealthPolicy, memory: HealthMemory, state: HealthState, reasons: tuple[Reason, ...], now: float
) -> tuple[HealthState, tuple[Reason, ...], tuple[float, ...]]:
    """The same, with an instance that recovers too often kept out of service, and the change written down."""
    was, will_be = memory.state is HealthState.UNHEALTHY, state is HealthState.UNHEALTHY
    if was is will_be:
        return state, reasons, memory.flaps
    recent = tuple(at for at in memory.flaps if at + policy.flap_window > now)
    if was and len(recent) >= policy.flap_limit:
        numbers = {"changes": len(recent), "window_s": policy.flap_window, "calm_in_s": _calm(policy, memory) - now}
        return (
            memory.state,
            (Reason("health.flapping", "it changes its mind too often to be trusted", numbers),),
            memory.flaps,
        )
    return state, reasons, (*recent, now)[-policy.flap_limit :]


def _calm(policy: HealthPolicy, memory: HealthMemory) -> float:
    """When fewer than `flap_limit` changes will be left in the window."""
    return float(memory.flaps[-policy.flap_limit] + policy.flap_window)


def _wake(policy: HealthPolicy, memory: HealthMemory, now: float) -> float | None:
    """The next instant at which time alone may change the verdict."""
    if memory.phase not in (Phase.RUNNING, None):
        return None
    wakes: list[float] = []
    if memory.rhythm is not None:
        for check in policy.checks:
            if isinstance(check, HeartbeatCheck):
                wakes.append(memory.rhythm.last + _patience(policy, check, memory.rhythm))  # noqa: PERF401
    if memory.state is HealthState.UNHEALTHY:
        if policy.flap_window and len(memory.flaps) >= policy.flap_limit:
            wakes.append(_calm(policy, memory))
    elif not policy.checks and not memory.ready and memory.phase is not None:
        wakes.append(max(memory.since, memory.started_at or 0.0) + policy.startup)
    return min((wake for wake in wakes if wake > now), default=None)
