"""Stand-ins as they are made, and whom a ReplicaSet would end: pure functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("kubernetes_asyncio")

from hypothesis import given
from hypothesis import strategies as st

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.affinity import away_from
from agentfleet.backends.kubernetes.objects import Annotations, Condition, Meta, Owner, Pod, PodSpec, PodStatus
from agentfleet.backends.kubernetes.pods import instance_of
from agentfleet.backends.kubernetes.standins import manifest, stands_in, would_go
from agentfleet.errors import BackendRefused, InstanceGone

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
NAMES = ("n1", "n2", "n3")
VALUES = ("a", "b")

# ------------------------------------------------------------------------------------------------ affinity

values = st.lists(st.sampled_from(VALUES), min_size=1, max_size=2, unique=True)
expressions = st.builds(
    lambda key, operator, listed: {
        "key": key,
        "operator": operator,
        **({"values": listed} if "In" in operator else {}),
    },
    st.sampled_from(("zone", "disk")),
    st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")),
    values,
)
fields = st.builds(
    lambda operator, name: {"key": "metadata.name", "operator": operator, "values": [name]},
    st.sampled_from(("In", "NotIn")),
    st.sampled_from(NAMES),
)
terms = st.fixed_dictionaries(
    {},
    optional={
        "matchExpressions": st.lists(expressions, max_size=2) | st.none(),
        "matchFields": st.lists(fields, max_size=2) | st.none(),
    },
)
affinities: st.SearchStrategy[dict[str, Any] | None] = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "nodeAffinity": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                REQUIRED: st.none() | st.fixed_dictionaries({"nodeSelectorTerms": st.lists(terms, max_size=3)}),
                "preferredDuringSchedulingIgnoredDuringExecution": st.just([{"weight": 1, "preference": {}}]),
            },
        ),
        "podAntiAffinity": st.just({"requiredDuringSchedulingIgnoredDuringExecution": []}),
    },
)
labels = st.dictionaries(st.sampled_from(("zone", "disk")), st.sampled_from(VALUES))


def holds(said: dict[str, Any], found: str | None) -> bool:
    """One requirement, as Kubernetes documents it."""
    match said["operator"]:
        case "In":
            return found in said["values"]
        case "NotIn":
            return found not in said["values"]
        case "Exists":
            return found is not None
        case _:
            return found is None


def allows(affinity: dict[str, Any] | None, name: str, labels: dict[str, str]) -> bool:
    """Whether a scheduler may put a pod of this affinity on a node."""
    required = ((affinity or {}).get("nodeAffinity") or {}).get(REQUIRED)
    if required is None:
        return True
    for term in required["nodeSelectorTerms"]:
        by_label, by_name = term.get("matchExpressions") or [], term.get("matchFields") or []
        fits = all(holds(each, labels.get(each["key"])) for each in by_label)
        if (by_label or by_name) and fits and all(holds(each, name) for each in by_name):
            return True
    return False


@given(affinity=affinities, avoided=st.sampled_from(NAMES), name=st.sampled_from(NAMES), labels=labels)
def test_the_node_is_excluded_and_nothing_else_changes(
    affinity: dict[str, Any] | None, avoided: str, name: str, labels: dict[str, str]
) -> None:
    before = copy.deepcopy(affinity)
    after = away_from(affinity, avoided)
    assert affinity == before
    assert allows(after, name, labels) == (allows(affinity, name, labels) and name != avoided)
    for key, value in (affinity or {}).items():
        assert key == "nodeAffinity" or after[key] == value
    for key, value in ((affinity or {}).get("nodeAffinity") or {}).items():
        assert key == REQUIRED or after["nodeAffinity"][key] == value


def test_each_of_several_terms_is_told() -> None:
    field = {"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}
    ssd = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}
    zone = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]}
    found = away_from({"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [ssd, zone, {}]}}}, "n1")
    assert found["nodeAffinity"][REQUIRED]["nodeSelectorTerms"] == [
        {**ssd, "matchFields": [field]},
        {"matchFields": [*zone["matchFields"], field]},
        {},
    ]


# ------------------------------------------------------------------------------------------------ what is made

SELECTOR = {"app.kubernetes.io/name": "agents", naming.INSTANCE: "agents"}
SET = Owner(uid="set-uid", kind="ReplicaSet", name="agents-5d", controller=True)
DEPLOYMENT = Meta(uid="deployment-uid", name="agents")


def pod(name: str = "agents-5d-x", *, owners: tuple[Owner, ...] = (SET,), **status: Any) -> Pod:
    ready = Condition("Ready", "True" if status.pop("ready", True) else "False")
    node = status.pop("node", "n1")
    return Pod(
        metadata=Meta(
            uid=f"uid of {name}",
            name=name,
            namespace="space",
            labels={**SELECTOR, naming.FLEET: "agents"},
            annotations=Annotations(),
            owner_references=owners,
        ),
        spec=PodSpec(node_name=node),
        status=PodStatus(phase=status.pop("phase", "Running"), conditions=(ready,)),
    )


def template(**spec: Any) -> dict[str, Any]:
    labels = {**SELECTOR, naming.FLEET: "agents", naming.REVISION: "3", "pod-template-hash": "5d"}
    return {
        "metadata": {"labels": labels, "annotations": {naming.VERSION: "1"}, "creationTimestamp": None},
        "spec": {"containers": [{"name": "agent"}], **spec},
    }


def test_a_stand_in_is_of_the_template_and_selected_by_nobody() -> None:
    made = manifest(pod(), template(), SELECTOR, DEPLOYMENT, node="n1")
    metadata = made["metadata"]
    assert metadata["name"].startswith("agents-5d-")
    assert len(metadata["name"]) == len("agents-5d-") + 5
    assert metadata["labels"][naming.INSTANCE] == "stand-in-agents"
    assert metadata["labels"]["app.kubernetes.io/name"] == "agents", "policies that select by it hold"
    assert metadata["labels"]["pod-template-hash"] == "5d"
    assert metadata["annotations"][naming.VERSION] == "1"
    assert metadata["ownerReferences"] == [
        {"apiVersion": "apps/v1", "kind": "Deployment", "name": "agents", "uid": "deployment-uid"}
    ]
    assert made["spec"]["containers"] == [{"name": "agent"}]
    assert not allows(made["spec"]["affinity"], "n1", {})
    seen = Meta(
        uid="u", labels=metadata["labels"], annotations=Annotations(stands_in_uid=pod().metadata.uid, stands_in_for="x")
    )
    assert stands_in(Pod(metadata=seen), pod())
    assert not stands_in(Pod(metadata=seen), pod("another"))
    assert not stands_in(pod(), pod())
    assert instance_of(Pod(metadata=seen), "agents").stands_in_for == "x"


def test_a_selector_of_its_own_and_a_long_name() -> None:
    owner = Owner(uid="u", kind="ReplicaSet", name="a" * 70, controller=True)
    own = {"app": "x", "tier": "y"}
    made = manifest(pod(owners=(owner,)), {"metadata": {"labels": own}}, own, DEPLOYMENT, node="n1")
    assert len(made["metadata"]["name"]) == 63
    assert {key: made["metadata"]["labels"][key] for key in own} == {"app": "stand-in-x", "tier": "stand-in-y"}


def test_what_cannot_be_made() -> None:
    with pytest.raises(BackendRefused, match="nodeName"):
        manifest(pod(), template(nodeName="n1"), SELECTOR, DEPLOYMENT, node="n1")
    with pytest.raises(InstanceGone, match="no ReplicaSet"):
        manifest(pod(owners=()), template(), SELECTOR, DEPLOYMENT, node="n1")


@pytest.mark.parametrize(
    ("labels", "notes", "expected"),
    [
        ({}, Annotations(stands_in_for="x"), None),
        ({naming.STAND_IN: "true"}, Annotations(stands_in_for="x"), "x"),
        ({naming.STAND_IN: "true"}, None, ""),
    ],
)
def test_it_is_read_from_a_pod(labels: dict[str, str], notes: Annotations | None, expected: str | None) -> None:
    assert instance_of(Pod(metadata=Meta(labels=labels, annotations=notes)), "agents").stands_in_for == expected


# ------------------------------------------------------------------------------------------------ who goes


@pytest.mark.parametrize(
    ("one", "other", "old", "new"),
    [
        ({}, {}, False, True),
        ({"ready": False}, {}, True, True),
        ({"ready": False}, {"ready": False}, False, True),
        ({}, {"ready": False}, False, False),
        ({"phase": "Pending", "ready": False}, {"ready": False}, True, True),
        ({"ready": False}, {"phase": "Pending", "ready": False}, False, False),
        ({"node": "", "phase": "Pending", "ready": False}, {"phase": "Pending", "ready": False}, True, True),
        ({"phase": "Pending", "ready": False}, {"node": "", "phase": "Pending", "ready": False}, False, False),
    ],
)
def test_whom_a_replica_set_would_end(one: dict[str, Any], other: dict[str, Any], old: bool, new: bool) -> None:
    """Before 1.21, and with the mark that is heeded since."""
    first, second = pod("first", **one), pod("second", **other)
    assert would_go(first, [first, second], minor=20) is old
    assert would_go(first, [first, second], minor=21) is new
    assert would_go(first, [first], minor=20)


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_replica_set_does_not_count_what_has_ended(phase: str) -> None:
    """An evicted pod lies about for days: that is no reason to end an instance before its successor is in its place."""
    ended = pod("agents-5d-ended", phase=phase, ready=False)
    assert would_go(pod(), [pod(), pod("agents-5d-y"), ended], minor=21)
    with pytest.raises(InstanceGone, match="in no ReplicaSet"):
        manifest(ended, template(), SELECTOR, DEPLOYMENT, node="n1")
