"""Hypothesis strategies for valid specs, instances and fault plans. Needs hypothesis.

Numbers are round (tenths of seconds, whole percents), so that what a failing test shrinks to can be read.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from agentfleet.instances import AgentStatus, Instance, Node, Phase, Usage
from agentfleet.specs import (
    AgentTemplate,
    Backoff,
    Check,
    CpuTarget,
    FleetSpec,
    HealthPolicy,
    HeartbeatCheck,
    HttpCheck,
    MemoryTarget,
    MetricTarget,
    QueueTarget,
    RecoveryPolicy,
    RolloutPolicy,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
    Target,
    TcpCheck,
)
from agentfleet.testing.fault_plan import Fault, FaultKind, FaultPlan

EPOCH = 1_700_000_000.0
"""Dates of generated instances are within a day before this."""


def names() -> st.SearchStrategy[str]:
    """Fleet names."""
    return st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)


def texts(max_size: int = 20, *, without: str = "") -> st.SearchStrategy[str]:
    """Printable text, not empty, without some characters."""
    # what str.isprintable accepts: no control, format, surrogate or private characters, no space but " "
    printable = st.characters(exclude_categories=("C", "Z"), exclude_characters=without) | st.just(" ")
    return st.text(printable.filter(str.isprintable), min_size=1, max_size=max_size)


def seconds(least: float = 0.0, most: float = 600.0) -> st.SearchStrategy[float]:
    """Time spans in tenths of a second."""
    return st.integers(round(least * 10), round(most * 10)).map(lambda tenths: tenths / 10)


def shares(least: int = 0) -> st.SearchStrategy[int | str]:
    """Counts and percentages."""
    return st.integers(least, 50) | st.integers(least, 100).map(lambda percent: f"{percent}%")


def templates() -> st.SearchStrategy[AgentTemplate]:
    """Agents; about half ask for CPU and memory."""
    return st.builds(
        AgentTemplate,
        command=st.lists(texts(), min_size=1, max_size=4).map(tuple),
        version=texts(),
        env=st.dictionaries(
            texts(8, without="="),
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
            max_size=3,
        ),
        cpu=st.none() | st.integers(1, 8000).map(lambda milli: milli / 1000),
        memory=st.none() | st.integers(1, 64).map(lambda count: count * 2**26),
        port=st.none() | st.integers(1, 65_535),
        drain=seconds(0, 120),
    )


def rules() -> st.SearchStrategy[ScalingRule]:
    """Scaling rules by count and by percent."""
    period = seconds(0.1, 1800)
    return st.builds(ScalingRule, count=st.integers(1, 100), period=period) | st.builds(
        ScalingRule, percent=st.integers(1, 200), period=period
    )


def behaviors() -> st.SearchStrategy[ScalingBehavior]:
    """How fast one direction may go."""
    return st.builds(
        ScalingBehavior,
        stabilization=seconds(0, 600),
        select=st.sampled_from(["max", "min", "disabled"]),
        rules=st.lists(rules(), min_size=1, max_size=3).map(tuple),
        tolerance=st.integers(0, 50).map(lambda percent: percent / 100),
    )


def targets(*, cpu: bool = True, memory: bool = True) -> st.SearchStrategy[Target]:
    """Scaling targets; `cpu` and `memory` say whether the template asks for them."""
    number = st.integers(1, 1000).map(lambda tenths: tenths / 10)
    choices: list[st.SearchStrategy[Target]] = [
        st.builds(QueueTarget, length=number, source=texts()),
        st.sampled_from(["average", "per_instance", "value"]).flatmap(
            lambda kind: st.builds(MetricTarget, metric=texts(), **{kind: number})
        ),
    ]
    if cpu:
        choices.append(st.builds(CpuTarget, utilization=st.integers(1, 200)))
    if memory:
        choices.append(st.builds(MemoryTarget, utilization=st.integers(1, 200)))
    return st.one_of(choices)


@st.composite
def scaling_policies(draw: st.DrawFn, *, cpu: bool = True, memory: bool = True) -> ScalingPolicy:
    """Scaling policies of up to 200 instances."""
    low, high = sorted((draw(st.integers(0, 200)), draw(st.integers(1, 200))))
    return ScalingPolicy(
        min_replicas=low,
        max_replicas=high,
        targets=tuple(draw(st.lists(targets(cpu=cpu, memory=memory), min_size=1, max_size=3))),
        period=draw(seconds(1, 60)),
        up=draw(behaviors()),
        down=draw(behaviors()),
        cpu_initialization=draw(seconds()),
        readiness_delay=draw(seconds(0, 60)),
        legacy_limits=draw(st.booleans()),
    )


def checks() -> st.SearchStrategy[Check]:
    """HTTP, TCP and heartbeat checks."""
    common: dict[str, Any] = {
        "period": seconds(0.5, 60),
        "timeout": st.none() | seconds(0.1, 10),
        "failures": st.integers(1, 5),
        "successes": st.integers(1, 3),
    }
    return st.one_of(
        st.builds(HttpCheck, path=st.sampled_from(["/health", "/ready", "/status", "/a/b?c=d"]), **common),
        st.builds(TcpCheck, **common),
        st.builds(
            HeartbeatCheck, interval=seconds(0.1, 30), phi=st.integers(1, 16).map(float), min_silence=seconds(0, 30)
        ),
    )


def health_policies() -> st.SearchStrategy[HealthPolicy]:
    """Health policies with up to three checks."""
    return st.builds(
        HealthPolicy,
        checks=st.lists(checks(), max_size=3).map(tuple),
        startup=seconds(0, 120),
        stuck_after=st.none() | seconds(1, 600),
        flap_window=seconds(),
        flap_limit=st.integers(1, 10),
    )


@st.composite
def backoffs(draw: st.DrawFn) -> Backoff:
    """Exponential waiting."""
    initial, limit = sorted((draw(seconds(0, 60)), draw(seconds(0, 600))))
    return Backoff(initial=initial, limit=limit, factor=draw(st.integers(10, 40)) / 10)


def recovery_policies() -> st.SearchStrategy[RecoveryPolicy]:
    """Recovery policies."""
    attempts = st.integers(0, 4)
    return st.builds(
        RecoveryPolicy,
        max_disrupted=shares(),
        freeze_below=st.integers(0, 100).map(lambda percent: percent / 100),
        cooldown=seconds(0, 120),
        restarts=attempts,
        replacements=attempts,
        elsewhere=attempts,
        rollback=st.booleans(),
        backoff=backoffs(),
        settle=seconds(1, 120),
        reset_after=seconds(),
    )


@st.composite
def rollout_policies(draw: st.DrawFn) -> RolloutPolicy:
    """Rollout policies under which something can move."""
    surge = draw(shares())
    min_ready = draw(seconds(0, 60))
    return RolloutPolicy(
        max_surge=surge,
        max_unavailable=draw(shares(1 if surge in (0, "0%") else 0)),
        min_ready=min_ready,
        progress_deadline=min_ready + draw(seconds(1, 600)),
        max_failed=draw(st.integers(1, 10)),
        auto_rollback=draw(st.booleans()),
        keep_revisions=draw(st.integers(1, 20)),
    )


@st.composite
def fleet_specs(draw: st.DrawFn, *, max_replicas: int = 50) -> FleetSpec:
    """Whole fleets of up to `max_replicas` instances (up to 200 where they scale by themselves)."""
    template = draw(templates())
    scaling = draw(st.none() | scaling_policies(cpu=bool(template.cpu), memory=bool(template.memory)))
    low, high = (scaling.min_replicas, scaling.max_replicas) if scaling is not None else (0, max_replicas)
    return FleetSpec(
        name=draw(names()),
        template=template,
        replicas=draw(st.integers(low, high)),
        scaling=scaling,
        health=draw(health_policies()),
        recovery=draw(recovery_policies()),
        rollout=draw(rollout_policies()),
    )


# ------------------------------------------------------------------------------------------------ what exists


@st.composite
def instances(draw: st.DrawFn, *, fleet: str = "fleet", id: str | None = None) -> Instance:
    """Instances whose fields agree: only who was started has a start, only who runs is ready."""
    phase = draw(st.sampled_from(Phase))
    created = EPOCH - draw(seconds(0, 86_400))
    restarts = draw(st.integers(0, 5))
    started = None
    if phase is not Phase.PENDING or restarts > 0:
        started = min(EPOCH, created + draw(seconds(0, 600)))
    ready = phase is Phase.RUNNING and draw(st.booleans())
    was_ready = started is not None and (ready or draw(st.booleans()))
    exited = phase is Phase.EXITED or restarts > 0
    return Instance(
        id=id if id is not None else f"{fleet}-{draw(st.integers(0, 10**9)):x}",
        fleet=fleet,
        slot=draw(st.integers(0, 200)),
        revision=draw(st.integers(1, 5)),
        version=draw(st.sampled_from(["1", "2", "3-bad"])),
        phase=phase,
        created_at=created,
        started_at=started,
        ready=ready,
        ready_at=started if was_ready else None,
        node=None if phase is Phase.PENDING else f"node-{draw(st.integers(1, 5))}",
        address=None if started is None else f"10.0.0.{draw(st.integers(1, 250))}:8080",
        restarts=restarts,
        exit_code=draw(st.none() | st.sampled_from([0, 1, 137, -9, -15])) if exited else None,
    )


def instance_sets(*, fleet: str = "fleet", max_size: int = 20) -> st.SearchStrategy[tuple[Instance, ...]]:
    """Instances of one fleet with distinct ids; slots may clash, as they do while one replaces another."""
    return st.lists(instances(fleet=fleet), max_size=max_size, unique_by=lambda i: i.id).map(tuple)


def nodes() -> st.SearchStrategy[tuple[Node, ...]]:
    """Up to five nodes."""
    node = st.builds(
        Node,
        name=st.integers(1, 5).map("node-{}".format),
        ready=st.booleans(),
        schedulable=st.booleans(),
        zone=st.none() | st.sampled_from(["zone-a", "zone-b"]),
    )
    return st.lists(node, max_size=5, unique_by=lambda n: n.name).map(tuple)


def usages() -> st.SearchStrategy[Usage]:
    """Measurements of one instance."""
    return st.builds(
        Usage,
        at=seconds(0, 86_400).map(lambda age: EPOCH - age),
        cpu=st.integers(0, 16_000).map(lambda milli: milli / 1000),
        memory=st.integers(0, 2**36),
        window=seconds(0, 60),
    )


def statuses() -> st.SearchStrategy[AgentStatus]:
    """What agents say of themselves."""
    return st.builds(
        AgentStatus,
        state=st.sampled_from(["idle", "busy", "draining"]),
        in_flight=st.integers(0, 20),
        queue_length=st.integers(0, 100),
        last_progress=st.none() | seconds(0, 3600),
        completed=st.integers(0, 1000),
        failed=st.integers(0, 1000),
        cause=st.none() | st.sampled_from(["provider", "tool"]),
        task=st.none() | texts(),
        config_revision=st.none() | st.integers(1, 100),
        version=st.none() | st.sampled_from(["1", "2"]),
    )


# ------------------------------------------------------------------------------------------------ what goes wrong

KINDS: tuple[FaultKind, ...] = (
    *("crash", "hang", "slow", "unhealthy", "stall"),
    *("partition", "node_down"),
    *("unavailable", "lag", "slow_actions", "gap"),
    *("lose_events", "double_events", "reorder_events"),
    *("conflict", "refuse", "lose_reply"),
)


def faults(*, kinds: tuple[FaultKind, ...] = KINDS, within: float = 300.0) -> st.SearchStrategy[Fault]:
    """Single faults that begin within `within` seconds."""
    return st.builds(
        Fault,
        at=seconds(0, within),
        kind=st.sampled_from(kinds),
        target=st.integers(0, 100),
        count=st.integers(1, 10),
        seconds=seconds(0.1, 60),
    )


def fault_plans(
    *, kinds: tuple[FaultKind, ...] = KINDS, within: float = 300.0, max_size: int = 10
) -> st.SearchStrategy[FaultPlan]:
    """Plans of up to `max_size` faults."""
    return st.lists(faults(kinds=kinds, within=within), max_size=max_size).map(lambda found: FaultPlan(tuple(found)))
