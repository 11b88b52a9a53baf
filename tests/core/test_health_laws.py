"""The health verdict by law: whatever signals come in whatever order, these hold."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.health import Beat, HealthMemory, Probed, Seen, Signal, Tick, Verdict, decide
from agentfleet.instances import AgentStatus, HealthState, Phase
from agentfleet.specs import HealthPolicy, HeartbeatCheck, HttpCheck, TcpCheck

UNHEALTHY, HEALTHY = HealthState.UNHEALTHY, HealthState.HEALTHY

counts = st.integers(1, 5)
probe_checks = st.builds(HttpCheck, period=st.just(2.0), timeout=st.just(1.0), failures=counts, successes=counts)
heartbeats = st.builds(HeartbeatCheck, interval=st.floats(0.1, 5), phi=st.floats(0.5, 12), min_silence=st.floats(0, 10))
policies = st.builds(
    HealthPolicy,
    checks=st.lists(st.one_of(probe_checks, st.builds(TcpCheck, failures=counts), heartbeats), max_size=3).map(tuple),
    startup=st.floats(0, 30),
    stuck_after=st.none() | st.floats(1, 100),
    flap_window=st.floats(0, 100),
    flap_limit=st.integers(1, 6),
)
statuses = st.none() | st.builds(
    AgentStatus, state=st.sampled_from(["idle", "busy", "draining"]), last_progress=st.none() | st.floats(0, 200)
)
probes = st.builds(
    Probed,
    check=st.integers(0, 3),
    ok=st.booleans(),
    at=st.just(0.0),
    latency=st.floats(0, 2),
    lag=st.just(0.0) | st.floats(0, 2),
    error=st.none() | st.just("no"),
    status=statuses,
)
sights = st.builds(
    Seen,
    phase=st.sampled_from(Phase),
    at=st.just(0.0),
    started_at=st.none() | st.floats(0, 100),
    restarts=st.integers(0, 2),
    ready=st.booleans(),
)
signals = st.one_of(
    probes, probes, st.just(Beat(0.0)), sights, st.builds(Tick, at=st.just(0.0), lag=st.just(0.0) | st.floats(0, 9))
)
histories = st.lists(st.tuples(st.floats(0, 10), signals), max_size=60)
RUNNING = Seen(Phase.RUNNING, 100.0, started_at=100.0, ready=True)


def run(
    policy: HealthPolicy, history: list[tuple[float, Signal]], memory: HealthMemory | None = None, now: float = 100.0
) -> tuple[list[tuple[float, Verdict]], HealthMemory]:
    """Play signals with the spans between them; the verdict after each."""
    memory = memory or HealthMemory()
    verdicts = []
    for gap, signal in history:
        now += gap
        verdict, memory = decide(policy, replace(signal, at=now), memory, now)
        verdicts.append((now, verdict))
    return verdicts, memory


@given(policies, histories)
def test_determinism_and_purity(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    memory, now = HealthMemory(), 100.0
    for gap, signal in history:
        now += gap
        before = copy.deepcopy(memory)
        first = decide(policy, signal, memory, now)
        assert first == decide(policy, signal, before, now)
        assert memory == before
        memory = first[1]


@given(policies, histories)
def test_the_verdict_is_consistent(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    verdicts, _ = run(policy, history)
    since, state = None, None
    for now, verdict in verdicts:
        assert verdict.reasons
        assert verdict.since <= now
        assert verdict.wake is None or verdict.wake > now
        json.dumps([reason.to_dict() for reason in verdict.reasons], allow_nan=False)
        if state is not None and verdict.state is state and verdict.since != since:
            assert verdict.since == now  # a restart begins anew
        since, state = verdict.since, verdict.state


@given(policies, histories, st.integers(0, 60))
def test_memory_survives_json_at_any_point(policy: HealthPolicy, history: list[tuple[float, Signal]], cut: int) -> None:
    straight, end = run(policy, history)
    head, memory = run(policy, history[:cut])
    revived = HealthMemory.from_dict(json.loads(json.dumps(memory.to_dict(), allow_nan=False)))
    assert revived == memory
    tail, end_again = run(policy, history[cut:], revived, head[-1][0] if head else 100.0)
    assert [*head, *tail] == straight
    assert end_again == end


@given(policies, histories)
def test_without_evidence_nobody_is_unhealthy(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    """Sights of a ready instance, time, and probes of a stalled prober: none of it is evidence."""
    policy = policy.replace(checks=tuple(check for check in policy.checks if not isinstance(check, HeartbeatCheck)))

    def harmless(signal: Signal) -> Signal:
        if isinstance(signal, Probed):
            return replace(signal, ok=False, lag=10.0, latency=10.0, status=None)
        return replace(signal, ready=True) if isinstance(signal, Seen) else signal

    verdicts, _ = run(policy, [(gap, harmless(signal)) for gap, signal in history])
    assert all(verdict.state is not UNHEALTHY for _, verdict in verdicts)


@given(probe_checks, st.lists(st.booleans(), max_size=80))
def test_fewer_failures_than_the_threshold_never_suffice(check: HttpCheck, results: list[bool]) -> None:
    policy = HealthPolicy(checks=(check,), startup=0, flap_window=0)
    verdicts, _ = run(policy, [(0, RUNNING), *[(2.0, Probed(0, ok, 0.0)) for ok in results]])
    row = 0
    for ok, (_, verdict) in zip(results, verdicts[1:], strict=True):
        row = 0 if ok else row + 1
        if row > check.failures:
            assert verdict.state is UNHEALTHY
    needed = check.failures + 1  # the last one confirms the others
    if not any(all(not ok for ok in results[at : at + needed]) for at in range(len(results) - needed + 1)):
        assert all(verdict.state is not UNHEALTHY for _, verdict in verdicts)


@given(policies, histories)
def test_one_more_probe_is_asked_for_when_it_decides(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    """Only a failed probe asks for another; if that fails too, the instance is unhealthy, and no third is asked for."""
    memory, now = HealthMemory(), 100.0
    for gap, signal in history:
        now += gap
        verdict, memory = decide(policy, signal, memory, now)
        if not verdict.again:
            continue
        assert isinstance(signal, Probed)
        assert not signal.ok
        confirmed, _ = decide(policy, Probed(signal.check, False, now + 1.0), memory, now + 1.0)
        judged = memory.state is not UNHEALTHY and memory.phase in (Phase.RUNNING, None)
        assert confirmed.state is UNHEALTHY or not judged or _is_excusable(policy, signal.check, memory, now + 1.0)
        assert not confirmed.again


def _is_excusable(policy: HealthPolicy, check: int, memory: HealthMemory, now: float) -> bool:
    return (
        memory.checks[check].passing is None
        and memory.started_at is not None
        and now - memory.started_at < policy.startup
    )


@given(policies, histories)
def test_successes_heal(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    """After whatever happened: running, ready, beating, and enough successes of each check; calm; then healthy."""
    verdicts, memory = run(policy, history)
    now = verdicts[-1][0] if verdicts else 100.0
    running = Seen(Phase.RUNNING, now, started_at=now, restarts=memory.restarts, ready=True)
    cure: list[tuple[float, Signal]] = [(0.0, running)]
    for index in range(len(policy.checks)):
        cure += [(0.0, Probed(index, True, now, status=AgentStatus()))] * 5
    cure.append((0.0, Beat(now)))
    verdicts, memory = run(policy, cure, memory, now)
    if verdicts[-1][1].state is UNHEALTHY:
        assert [reason.code for reason in verdicts[-1][1].reasons] == ["health.flapping"]
        later = verdicts[-1][1].wake
        while later is not None and verdicts[-1][1].state is UNHEALTHY:
            verdicts, memory = run(policy, [(0.0, Beat(later)), (0.0, Tick(later))], memory, later)
            later = verdicts[-1][1].wake
    assert verdicts[-1][1].state is HEALTHY


@given(st.integers(1, 5), st.floats(1, 100), st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=200))
def test_flapping_is_bounded(limit: int, window: float, results: list[tuple[float, bool]]) -> None:
    policy = HealthPolicy(checks=(TcpCheck(failures=1),), startup=0, flap_window=window, flap_limit=limit)
    verdicts, _ = run(policy, [(0, RUNNING), *[(gap, Probed(0, ok, 0.0)) for gap, ok in results for _ in range(2)]])
    changes = [
        now
        for (_, before), (now, after) in pairwise(verdicts)
        if (before.state is UNHEALTHY) is not (after.state is UNHEALTHY)
    ]
    for start in changes:
        assert sum(start <= at < start + window for at in changes) <= limit + 1


@given(policies, histories, st.booleans())
def test_a_restart_begins_anew(policy: HealthPolicy, history: list[tuple[float, Signal]], ready: bool) -> None:
    verdicts, memory = run(policy, history)
    now = (verdicts[-1][0] if verdicts else 100.0) + 1.0
    again = Seen(Phase.RUNNING, now, started_at=now, restarts=memory.restarts + 1, ready=ready)
    verdict, after = decide(policy, again, memory, now)
    fresh_verdict, fresh = decide(policy, again, HealthMemory(), now)
    assert (verdict, after) == (fresh_verdict, fresh)
    if policy.checks:
        assert verdict.state is HealthState.STARTING


@given(policies, histories)
def test_time_alone_changes_nothing_before_wake(policy: HealthPolicy, history: list[tuple[float, Signal]]) -> None:
    verdicts, memory = run(policy, history)
    if not verdicts:
        return
    now, verdict = verdicts[-1]
    end = min(verdict.wake if verdict.wake is not None else now + 1e6, now + 1e6)
    for moment in (now, now + (end - now) / 2):
        if moment < end:
            later, after = decide(policy, Tick(moment), memory, moment)
            assert (later.state, later.since, after) == (verdict.state, verdict.since, memory)


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.DRAINING, Phase.EXITED, Phase.LOST])
@given(policy=policies, results=st.lists(probes, max_size=20))
def test_probes_judge_only_what_runs(phase: Phase, policy: HealthPolicy, results: list[Probed]) -> None:
    verdicts, _ = run(
        policy, [(0, RUNNING), (1.0, Seen(phase, 0.0, started_at=100.0)), *[(1.0, probe) for probe in results]]
    )
    assert len({verdict.state for _, verdict in verdicts[1:]}) == 1
