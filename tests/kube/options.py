"""Hypothesis strategies for fleets on Kubernetes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.kubespec import (
    ClusterAutoscaler,
    ConfigFiles,
    DisruptionBudget,
    EmptyDir,
    EnvFrom,
    EnvSource,
    KubernetesOptions,
    PreStop,
    Probe,
    Security,
    ServiceOptions,
    Spread,
    Toleration,
    Volume,
)
from agentfleet.specs import AgentTemplate, FleetSpec, ScalingPolicy
from agentfleet.testing.strategies import (
    health_policies,
    recovery_policies,
    rollout_policies,
    scaling_policies,
    seconds,
    shares,
)

# drawn from a few that lie at the borders: a pattern would draw them a letter at a time, forty fields long
WORDS = st.sampled_from(["a", "b2", "pool-1", "x" * 63, "z-9-y"])
VARIABLES = st.sampled_from(["A", "_B", "C_9", "LANG", "PATH"])
VALUES = st.sampled_from(["", "1", "a.b_c-D", "Z" * 63])
TEXTS = st.sampled_from(["", "plain", "$(A) $$ $x", "two\nlines", "ü\U0001f642", "null", "'\"{}: #&*!|>%@`"])
KEYS = st.builds("{}{}".format, st.sampled_from(["", "example.com/"]), WORDS)
LABELS = st.dictionaries(KEYS, VALUES, max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def probes() -> st.SearchStrategy[Probe]:
    return st.builds(
        Probe,
        path=st.none() | st.just("/alive"),
        port=st.none() | st.just(9090),
        period=st.none() | seconds(0.1, 60),
        timeout=st.none() | seconds(0.1, 10),
        failures=st.none() | st.integers(1, 9),
    )


def sources() -> st.SearchStrategy[EnvSource]:
    return st.one_of(
        st.builds(EnvSource, secret=WORDS, key=WORDS, optional=st.booleans()),
        st.builds(EnvSource, config_map=WORDS, key=WORDS),
        st.builds(EnvSource, field=st.just("spec.nodeName")),
        st.builds(EnvSource, resource=st.just("limits.memory")),
        st.builds(EnvSource, value=st.sampled_from(["plain", "$(OTHER)/x", "$"])),
    )


@st.composite
def volumes(draw: st.DrawFn) -> tuple[Volume, ...]:
    made = []
    for name in draw(st.lists(WORDS, max_size=3, unique=True)):
        kind: dict[str, Any] = draw(
            st.one_of(
                st.fixed_dictionaries({"secret": WORDS}),
                st.fixed_dictionaries({"config_map": WORDS}),
                st.fixed_dictionaries({"claim": WORDS}),
                st.fixed_dictionaries({"empty": st.builds(EmptyDir, size=st.none() | st.just(2**20))}),
                st.just({"source": {"downwardAPI": {"items": []}}}),
            )
        )
        made.append(Volume(name=name, path=f"/data/{name}", read_only=draw(st.none() | st.booleans()), **kind))
    return tuple(made)


def options() -> st.SearchStrategy[KubernetesOptions]:
    return st.builds(
        KubernetesOptions,
        image=st.sampled_from(["agent:1", "agent", "team/agent:v1@sha256:0123"]),
        pull=st.none() | st.just("Always"),
        pull_secrets=st.lists(WORDS, max_size=2),
        command=st.none() | st.lists(st.sampled_from(["run", "{port}", "{version}", "$(PORT)"]), max_size=3),
        args=st.lists(WORDS, max_size=2),
        env=st.dictionaries(VARIABLES.map("REF_{}".format), sources(), max_size=4),
        env_from=st.lists(st.builds(EnvFrom, secret=WORDS, optional=st.booleans()), max_size=2),
        token=st.none() | st.builds(EnvSource, secret=WORDS, key=WORDS),
        describe_instance=st.booleans(),
        requests=st.just({}) | st.just({"ephemeral-storage": "1Gi"}),
        limits=st.just({}) | st.just({"cpu": "100", "memory": "1Ti", "nvidia.com/gpu": "1"}),
        volumes=volumes(),
        readiness=st.booleans() | probes(),
        liveness=st.just(False) | probes(),
        startup=st.none() | st.just(False) | probes(),
        pre_stop=st.none()
        | st.builds(PreStop, sleep=seconds(0.1, 60))
        | st.builds(PreStop, path=st.just("/bye"), allow=seconds(0, 9)),
        namespace=st.none() | WORDS,
        component=VALUES,
        part_of=st.none() | VALUES,
        labels=LABELS,
        annotations=st.dictionaries(KEYS, TEXTS, max_size=2),
        pod_annotations=st.dictionaries(KEYS, TEXTS, max_size=2),
        selector=st.none() | st.dictionaries(KEYS, VALUES, min_size=1, max_size=2),
        service_account=st.none() | WORDS,
        mount_token=st.booleans(),
        priority_class=st.none() | WORDS,
        node_selector=LABELS,
        tolerations=st.lists(st.builds(Toleration, key=KEYS, value=st.none() | VALUES), max_size=2),
        spread=st.sampled_from([(), (Spread(),), (Spread(strict=True), Spread(over="topology.kubernetes.io/zone"))]),
        affinity=st.none() | st.just({"nodeAffinity": {}}),
        security=st.builds(
            Security,
            user=st.none() | st.integers(1, 9999),
            writable_root=st.booleans(),
            volume_group=st.none() | st.just(1),
        ),
        service=st.builds(
            ServiceOptions,
            name=st.none() | WORDS,
            kind=st.sampled_from(["ClusterIP", "Headless", "NodePort", "LoadBalancer"]),
            port=st.none() | st.just(80),
        ),
        disruption_budget=st.builds(DisruptionBudget, enabled=st.booleans(), max_unavailable=st.none() | shares()),
        config=st.none()
        | st.builds(ConfigFiles, files=st.dictionaries(WORDS, TEXTS, max_size=2), path=st.just("/etc/agent")),
        autoscaler=st.builds(ClusterAutoscaler, enabled=st.booleans(), name=st.none() | WORDS),
    )


def templates(
    *, environment: st.SearchStrategy[str], port: st.SearchStrategy[int | None]
) -> st.SearchStrategy[AgentTemplate]:
    return st.builds(
        AgentTemplate,
        command=st.lists(TEXTS.filter(bool), min_size=1, max_size=3),
        version=st.sampled_from(["1", "1.4.0", "v2+build 7", "ü", "x" * 90]),
        env=st.dictionaries(environment, TEXTS, max_size=3),
        cpu=st.sampled_from([0.0001, 0.25, 3.0]),
        memory=st.sampled_from([1, 2**29, 10**9]),
        port=port,
        drain=seconds(0, 120),
        kubernetes=options(),
    )


@st.composite
def any_fleets(draw: st.DrawFn) -> FleetSpec:
    """Valid fleets, some of which cannot be said in Kubernetes' words."""
    template = draw(templates(environment=VARIABLES | st.just("no variable"), port=st.none() | st.just(8080)))
    return _fleet(draw, draw(WORDS | st.just("9-lives")), template, draw(st.none() | scaling_policies()))


@st.composite
def fleets(draw: st.DrawFn) -> FleetSpec:
    """Fleets that can be said in Kubernetes' words."""
    template = draw(templates(environment=VARIABLES, port=st.just(8080)))
    options = template.kubernetes
    assert options is not None
    scaling = draw(st.none() | scaling_policies())
    if scaling is None:
        template = template.replace(kubernetes=options.replace(autoscaler=ClusterAutoscaler()))
    else:  # what an HPA's metrics may be called, and sizes it knows
        called = {"queue": "source", "metric": "metric"}
        targets = [
            each.replace(**{called[each.kind]: "metric"}) if each.kind in called else each for each in scaling.targets
        ]
        scaling = scaling.replace(targets=targets, min_replicas=max(1, scaling.min_replicas))
    return _fleet(draw, draw(WORDS), template, scaling)


def _fleet(draw: st.DrawFn, name: str, template: AgentTemplate, scaling: ScalingPolicy | None) -> FleetSpec:
    low, high = (scaling.min_replicas, scaling.max_replicas) if scaling is not None else (0, 50)
    return FleetSpec(
        name=name,
        template=template,
        replicas=draw(st.integers(low, high)),
        scaling=scaling,
        health=draw(health_policies()),
        recovery=draw(recovery_policies()),
        rollout=draw(rollout_policies()),
    )


def versions() -> st.SearchStrategy[ApiVersions]:
    return st.integers(20, 36).map(lambda minor: ApiVersions.of(f"1.{minor}"))
