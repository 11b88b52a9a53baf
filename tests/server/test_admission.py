"""What of a spec may be said from afar, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.world import A_ADMIN, A_OPERATOR, OPERATOR, world

from agentfleet.errors import SpecError
from agentfleet.kubespec import KubernetesOptions
from agentfleet.rest.clusters import parse_request
from agentfleet.server.admission import Admission, EngineKind
from agentfleet.server.principals import Principal
from agentfleet.server.problems import Refusal
from agentfleet.specs import AgentTemplate
from agentfleet.stores.tokens import ALL, Scope

SPEC = {"template": {"command": ["agent"], "version": "1"}, "replicas": 1}
CLUSTERS = "/api/v1/clusters"


def who(scope: Scope, *fleets: str) -> Principal:
    return Principal(f"{scope}", f"{scope}", scope, frozenset(fleets or {ALL}))


OPERATES, OWNS_A, OWNS_ALL = who(Scope.OPERATE), who(Scope.ADMIN, "a"), who(Scope.ADMIN)
PLAIN = AgentTemplate(command=["agent"], version="1", kubernetes=KubernetesOptions(image="agent:{version}"))


def refused(
    admission: Admission, principal: Principal, after: AgentTemplate, before: AgentTemplate | None
) -> list[str]:
    try:
        admission.check(principal, after, before)
    except Refusal as refusal:
        return [each.field for each in refusal.errors]
    return []


def changed(**changes: Any) -> AgentTemplate:
    return AgentTemplate.parse({**PLAIN.to_dict(), **changes})


def on_kubernetes(**options: Any) -> AgentTemplate:
    return changed(kubernetes={"image": "agent:{version}", **options})


@pytest.mark.parametrize(
    "after",
    [
        changed(version="2"),
        changed(version="1.4.0-rc.1+b7"),
        changed(cpu="2", memory="1Gi"),
        changed(port=80, drain="5s"),
    ],
)
def test_operators_say_versions_and_sizes(after: AgentTemplate) -> None:
    for engine in ("kubernetes", "process", "memory", None):
        assert refused(Admission(engine=engine), OPERATES, after, PLAIN) == []


@pytest.mark.parametrize(
    ("after", "field"),
    [
        (changed(command=["other"]), "template.command"),
        (changed(command=["agent", "-x"]), "template.command"),
        (changed(env={"LD_PRELOAD": "/tmp/x.so"}), "template.env"),
        (changed(version="1; rm -rf /"), "template.version"),
        (changed(version="$(id)"), "template.version"),
        (changed(version="-flag"), "template.version"),
        (changed(version="x" * 200), "template.version"),
        (changed(version="1@sha256:0"), "template.version"),
        (on_kubernetes(image="evil:latest"), "template.kubernetes"),
    ],
)
def test_operators_do_not_say_what_runs(after: AgentTemplate, field: str) -> None:
    for engine in ("kubernetes", "process", "memory", None):
        assert refused(Admission(engine=engine), OPERATES, after, PLAIN)[0].startswith(field), engine


def test_an_operator_may_not_even_take_a_variable_away() -> None:
    before = changed(env={"GUARD": "on"})
    assert refused(Admission(engine="kubernetes"), OPERATES, PLAIN, before) == ["template.env"]
    assert refused(Admission(engine="kubernetes"), OPERATES, AgentTemplate(command=["agent"]), PLAIN) == [
        "template.kubernetes"
    ]


INSIDE = [
    on_kubernetes(image="agent2:1"),
    on_kubernetes(args=["-v"]),
    on_kubernetes(env={"A": {"value": "b"}}),
    on_kubernetes(env={"A": {"field": "spec.nodeName"}}),
    on_kubernetes(volumes=[{"name": "tmp2", "path": "/x", "empty": {}}]),
    on_kubernetes(limits={"cpu": "1"}),
    on_kubernetes(liveness=True),
    on_kubernetes(node_selector={"disk": "fast"}),
    on_kubernetes(security={"user": 1000}),
    on_kubernetes(service={"port": 90}),
    on_kubernetes(autoscaler={"enabled": False, "metrics": {"queue": {"name": "q"}}}),
    changed(command=["other"]),
    changed(env={"A": "b"}),
]
BEYOND = {
    "raw": on_kubernetes(raw={"spec": {"hostNetwork": True}}),
    "raw_objects": on_kubernetes(raw_objects={"Service": {"spec": {"externalIPs": ["10.0.0.1"]}}}),
    "namespace": on_kubernetes(namespace="kube-system"),
    "service_account": on_kubernetes(service_account="cluster-admin"),
    "mount_token": on_kubernetes(mount_token=True),
    "priority_class": on_kubernetes(priority_class="system-node-critical"),
    "selector": on_kubernetes(selector={"app": "others"}),
    "labels": on_kubernetes(labels={"app": "others"}),
    "annotations": on_kubernetes(annotations={"a": "b"}),
    "pod_annotations": on_kubernetes(
        pod_annotations={"container.apparmor.security.beta.kubernetes.io/agent": "unconfined"}
    ),
    "component": on_kubernetes(component="x"),
    "part_of": on_kubernetes(part_of="x"),
    "pull_secrets": on_kubernetes(pull_secrets=["others"]),
    "env": on_kubernetes(env={"A": {"secret": "others", "key": "k"}}),
    "env ": on_kubernetes(env={"A": {"config_map": "others", "key": "k"}}),
    "env_from": on_kubernetes(env_from=[{"secret": "others"}]),
    "token": on_kubernetes(token={"secret": "others", "key": "k"}),
    "volumes": on_kubernetes(volumes=[{"name": "h", "path": "/h", "source": {"hostPath": {"path": "/"}}}]),
    "volumes ": on_kubernetes(volumes=[{"name": "h", "path": "/h", "secret": "others"}]),
    "volumes  ": on_kubernetes(volumes=[{"name": "h", "path": "/h", "claim": "others"}]),
    "security": on_kubernetes(security={"profile": "none"}),
    "security ": on_kubernetes(security={"profile": "none", "user": 0}),
    "service": on_kubernetes(service={"kind": "LoadBalancer"}),
    "service ": on_kubernetes(service={"name": "others"}),
    "service  ": on_kubernetes(service={"kind": "NodePort"}),
    "autoscaler": on_kubernetes(autoscaler={"name": "others"}),
}


@pytest.mark.parametrize("after", INSIDE)
def test_a_fleets_admin_says_what_stays_within_it(after: AgentTemplate) -> None:
    admission = Admission(engine="kubernetes")
    assert refused(admission, OWNS_A, after, PLAIN) == []
    assert len(refused(admission, OPERATES, after, PLAIN)) == 1


@pytest.mark.parametrize("part", BEYOND)
def test_what_reaches_beyond_needs_the_admin_of_all(part: str) -> None:
    admission = Admission(engine="kubernetes")
    assert refused(admission, OWNS_A, BEYOND[part], PLAIN) == [f"template.kubernetes.{part.strip()}"]
    assert refused(admission, OWNS_ALL, BEYOND[part], PLAIN) == []
    assert f"template.kubernetes.{part.strip()}" in refused(admission, OWNS_A, BEYOND[part], None)


def test_every_field_of_the_options_has_a_level() -> None:
    """A field that is added later is beyond, until somebody says otherwise here and there."""
    inside = {"image", "pull", "command", "args", "working_dir", "describe_instance", "requests", "limits", "readiness"}
    inside |= {"liveness", "startup", "pre_stop", "node_selector", "tolerations", "spread", "affinity"}
    inside |= {"disruption_budget", "config"}
    assert set(KubernetesOptions.model_fields) == inside | {part.strip() for part in BEYOND}


@pytest.mark.parametrize("engine", ["process", None])
def test_a_program_on_the_managers_own_machine_needs_the_admin_of_all(engine: EngineKind | None) -> None:
    for after in (changed(command=["other"]), changed(env={"A": "b"}), changed(version="a b")):
        assert refused(Admission(engine=engine), OWNS_A, after, PLAIN) != []
        assert refused(Admission(engine=engine), OWNS_ALL, after, PLAIN) == []


def test_the_servers_own_template_is_anybodys() -> None:
    admission = Admission(engine="process", template=PLAIN)
    assert refused(admission, OPERATES, PLAIN, None) == []
    assert refused(admission, OPERATES, changed(version="7"), None) == []
    assert refused(Admission(engine="process"), OPERATES, PLAIN, None)[0] == "template.command"


def test_single_parts_may_be_lowered() -> None:
    admission = Admission(engine="kubernetes", lowered=frozenset({"kubernetes.image", "env"}))
    assert refused(admission, OPERATES, on_kubernetes(image="other:1"), PLAIN) == []
    assert refused(admission, OPERATES, changed(env={"A": "b"}), PLAIN) == []
    assert refused(admission, OPERATES, on_kubernetes(args=["x"]), PLAIN) == ["template.kubernetes.args"]
    with pytest.raises(SpecError, match="operators may"):
        Admission(lowered=frozenset({"everything"}))


def test_namespaces() -> None:
    admission = Admission(namespaces=("agents", "labs"))
    assert admission.namespace(OPERATES, None) == "agents"
    assert admission.namespace(OWNS_A, "labs") == "labs"
    assert admission.namespace(OWNS_ALL, "kube-system") == "kube-system"
    with pytest.raises(Refusal):
        admission.namespace(OWNS_A, "kube-system")


@pytest.mark.parametrize("place", ["health", "health_check_config"])
def test_a_function_to_import_is_refused_whoever_asks(place: str) -> None:
    for check in ({"kind": "custom", "call": "os:abort"}, {"call": "os:abort"}, {"kind": "http", "call": "os:abort"}):
        with pytest.raises(SpecError):
            parse_request({"cluster_name": "a", "template": {"command": ["x"]}, place: {"checks": [check]}})
        with pytest.raises(SpecError):
            parse_request({"spec": {"name": "a", "template": {"command": ["x"]}, "health": {"checks": [check]}}})


@pytest.mark.anyio
async def test_over_rest(tmp_path: Path) -> None:
    template = AgentTemplate(command=["agent"], cpu="1")
    async with world(tmp_path, admission=Admission(engine="process", template=template)) as here:
        await here.cluster("a")
        operator, owner = here.ask.by(A_OPERATOR), here.ask.by(A_ADMIN)
        for ask in (operator, owner):
            evil = await ask("POST", f"{CLUSTERS}/a/deploy", {"changes": {"command": ["sh", "-c", "id"]}})
            assert (evil.status, evil.kind, evil.fields()) == (403, "forbidden", ["template.command"])
            whole = await ask(
                "PUT",
                f"{CLUSTERS}/a",
                {"cluster_name": "a", "template": {"command": ["id"]}},
                headers={"If-Match": "*"},
            )
            assert (whole.status, whole.fields()) == (403, ["template.command"])
        assert (await operator("POST", f"{CLUSTERS}/a/deploy", {"version": "2"})).status == 202
        new = await here.ask.by(OPERATOR)("POST", CLUSTERS, {"cluster_name": "n", "template": {"command": ["id"]}})
        assert (new.status, new.fields()) == (403, ["template.command"])
        assert (await here.ask.by(OPERATOR)("POST", CLUSTERS, {"cluster_name": "n"})).status == 202
        deployed = await here.ask("POST", f"{CLUSTERS}/a/deploy", {"changes": {"command": ["id"]}})
        await here.finished(deployed)
        runs = (await operator("GET", f"{CLUSTERS}/a")).json["spec"]["template"]
        assert (runs["command"], runs["version"]) == (["id"], "2"), "the spec shows what was deployed"
        for said, status in ((runs, 202), ({**runs, "command": ["agent"]}, 403)):
            asked = {"cluster_name": "a", "template": said}
            reply = await operator("PUT", f"{CLUSTERS}/a", asked, headers={"If-Match": "*"})
            assert reply.status == status, "what may be said is measured by what runs"
        again = await here.ask("PUT", f"{CLUSTERS}/a", {"spec": {**SPEC, "name": "a"}}, headers={"If-Match": "*"})
        assert (await here.finished(again)).outcome["version"] == "1"
        runs = (await operator("GET", f"{CLUSTERS}/a")).json
        assert (runs["spec"]["template"]["command"], runs["spec"]["template"]["version"], runs["version"]) == (
            ["agent"],
            "1",
            "1",
        )
