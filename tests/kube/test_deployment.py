"""The manifests that run the managers: a real server takes them, they fit together, and their account may do its work.

They are written for today's clusters. This server is 1.20: it calls policy/v1 policy/v1beta1 (`manifests.OLDER`), gives
namespaces no label kubernetes.io/metadata.name, and enforces neither Pod Security nor network policies; what a policy
selects by and what the restricted profile asks for are checked here without it.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import click
import pytest
import yaml

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("fastapi")

from tests.kube.manifests import Manifest, define, dry_run, everything, moved, one
from tests.kube.permissions import ACCOUNT, NAMESPACE, grant
from tests.kube.story import EXAMPLES

from agentfleet import AgentTemplate, FleetSpec
from agentfleet.backends.kubernetes.manifests import render
from agentfleet.cli import main
from agentfleet.kubespec import KubernetesOptions
from agentfleet.server.tokenreview import AccessRules
from agentfleet.testing.kube import ApiRefused, ControlPlane
from agentfleet.testing.kube.client import Client
from agentfleet.waiting import seconds_of

if not EXAMPLES.exists():
    pytest.skip("no examples here: these are the tests of a wheel", allow_module_level=True)

ROOT = Path(__file__).parents[2]
server = pytest.mark.integration


def container() -> Manifest:
    """The managers' only container."""
    (found,) = pod()["spec"]["containers"]
    return dict(found)


def pod() -> Manifest:
    """What the managers' pods are made from."""
    template: Manifest = one("Deployment")["spec"]["template"]
    return template


# ------------------------------------------------------------------------------------------------ a real server


@server
@pytest.mark.slow
def test_the_server_takes_all_of_it_as_it_is(plane: ControlPlane) -> None:
    """Not a field is unknown to it, or left out, or has a wrong value."""

    async def test() -> None:
        namespace = await plane.namespace()
        await define(plane)
        for manifest in everything():
            kept = await dry_run(plane, moved(manifest, namespace))
            assert kept["kind"] == manifest["kind"]
        listed = await plane.api.get(f"/apis/apps/v1/namespaces/{namespace}/deployments")
        assert not listed["items"], "a dry run"

    anyio.run(test)


def _set(*path: Any, to: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        place: Any = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


WRONG: list[tuple[str, Callable[[Manifest], None]]] = [
    ("Deployment", _set("spec", "replica", to=2)),
    ("Deployment", _set("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "scheme", to="TLS")),
    ("Deployment", _set("spec", "template", "spec", "terminationGracePeriod", to=45)),
    ("Service", _set("spec", "ports", 0, "targetPort", to="no name at all")),
    ("NetworkPolicy", _set("spec", "egress", 1, "to", 0, "ipBlock", "cidr", to="everywhere")),
    ("PodDisruptionBudget", _set("spec", "minAvailable", to="one")),
    ("ServiceMonitor", _set("spec", "endpoints", 0, "intervall", to="15s")),
    ("ServiceMonitor", _set("spec", "endpoints", 0, "scheme", to="tls")),
    ("PrometheusRule", _set("spec", "groups", 0, "rules", 0, "for", to="a minute")),
    ("PrometheusRule", _set("spec", "groups", 0, "rules", 0, "summary", to="in the wrong place")),
]


@server
@pytest.mark.slow
def test_the_server_would_not_take_what_is_wrong(plane: ControlPlane) -> None:
    """Else the test above would prove nothing."""

    async def test() -> None:
        namespace = await plane.namespace()
        await define(plane)
        for kind, spoil in WRONG:
            manifest = moved(copy.deepcopy(one(kind)), namespace)
            spoil(manifest)
            with pytest.raises(ApiRefused):
                await dry_run(plane, manifest)

    anyio.run(test)


@server
@pytest.mark.slow
def test_its_account_may_have_tokens_reviewed_and_read_no_secret(plane: ControlPlane) -> None:
    async def test() -> None:
        namespace = await plane.namespace()
        access = await grant(plane, namespace)
        as_manager = Client(access)
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": access.token}}
        answer = await as_manager.post("/apis/authentication.k8s.io/v1/tokenreviews", review)
        assert answer["status"]["authenticated"] is True
        assert answer["status"]["user"]["username"] == f"system:serviceaccount:{namespace}:{ACCOUNT}"
        review["spec"] = {"token": "forged"}
        answer = await as_manager.post("/apis/authentication.k8s.io/v1/tokenreviews", review)
        assert not answer["status"].get("authenticated")
        for path in (f"/api/v1/namespaces/{namespace}/secrets", "/api/v1/secrets", "/api/v1/nodes/n/proxy"):
            with pytest.raises(ApiRefused) as refused:
                await as_manager.get(path)
            assert refused.value.status == 403, path

    anyio.run(test)


# ------------------------------------------------------------------------------------------------ what fits together


def test_every_file_is_applied() -> None:
    """None is forgotten in a kustomization, and all is in the one namespace."""
    named = [
        folder / name
        for folder in (EXAMPLES, EXAMPLES / "monitoring")
        for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    ]
    there = {*EXAMPLES.rglob("*.yaml")} - {*EXAMPLES.rglob("kustomization.yaml"), EXAMPLES / "fleet.yaml"}
    assert there == set(named)
    assert len(named) == len(set(named))
    elsewhere = {each["metadata"].get("namespace", NAMESPACE) for each in everything()} - {NAMESPACE}
    assert elsewhere == {"kube-node-lease"}


def test_the_image_is_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container()["image"] == f"agentfleet:{version}"


def test_what_selects_the_managers_finds_them() -> None:
    labels = pod()["metadata"]["labels"]
    deployment, monitor = one("Deployment")["spec"], one("ServiceMonitor")["spec"]
    spec = pod()["spec"]
    (apart,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (spread,) = spec["topologySpreadConstraints"]
    for selector in (
        deployment["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        apart["labelSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert selector == labels
    assert monitor["selector"]["matchLabels"] == one("Service")["metadata"]["labels"]
    assert spec["serviceAccountName"] == one("ServiceAccount")["metadata"]["name"] == ACCOUNT


def test_ports_are_called_alike() -> None:
    (port,) = container()["ports"]
    (service,) = one("Service")["spec"]["ports"]
    (endpoint,) = one("ServiceMonitor")["spec"]["endpoints"]
    (ingress,) = one("NetworkPolicy")["spec"]["ingress"]
    (opened,) = ingress["ports"]
    assert service["targetPort"] == port["name"]
    assert endpoint["port"] == service["name"]
    assert str(opened["port"]) == str(port["containerPort"]) == variables()["AGENTFLEET_PORT"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container()[probe]["httpGet"]["port"] == port["name"]
        assert container()[probe]["httpGet"]["scheme"] == "HTTPS"
    name = one("Service")["metadata"]["name"]
    assert endpoint["tlsConfig"]["serverName"] == f"{name}.{NAMESPACE}.svc"


def variables() -> dict[str, str]:
    """The container's literal variables."""
    return {each["name"]: each["value"] for each in container()["env"] if "value" in each}


def test_secrets_are_named_and_never_held() -> None:
    """Each is told of in the head of manager.yaml, and what is mounted is where the variables say."""
    assert not [each for each in everything() if each["kind"] == "Secret"]
    volumes = {each["name"]: each for each in pod()["spec"]["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in container()["volumeMounts"]}
    for variable in ("AGENTFLEET_TOKEN_FILE", "AGENTFLEET_TLS_CERT", "AGENTFLEET_TLS_KEY"):
        folder = str(Path(variables()[variable]).parent)
        assert "secret" in volumes[mounts[folder]], variable
    assert "AGENTFLEET_DATABASE" not in variables(), "its address holds a password"
    used = {each["secret"]["secretName"] for each in volumes.values() if "secret" in each}
    used |= {
        each["valueFrom"]["secretKeyRef"]["name"]
        for each in container()["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    assert used == told("manager.yaml")
    (endpoint,) = one("ServiceMonitor")["spec"]["endpoints"]
    read = {endpoint["tlsConfig"]["ca"]["secret"]["name"], endpoint["authorization"]["credentials"]["name"]}
    assert read <= used | told("monitoring/servicemonitor.yaml")


def test_schemas_of_configuration_are_mounted_where_they_are_read_if_there_are_any() -> None:
    (volume,) = (each for each in pod()["spec"]["volumes"] if each["name"] == "config-schemas")
    assert volume["configMap"]["optional"] is True
    mounts = {each["name"]: each["mountPath"] for each in container()["volumeMounts"]}
    assert variables()["AGENTFLEET_CONFIG_SCHEMAS"] == mounts["config-schemas"]
    made = re.findall(r"create configmap (\S+)", (EXAMPLES / "manager.yaml").read_text())
    assert made == [volume["configMap"]["name"]]


def told(file: str) -> set[str]:
    """Names of the Secrets that the head of a file has one make."""
    return set(re.findall(r"create secret generic (\S+)", (EXAMPLES / file).read_text()))


def test_the_command_knows_every_variable() -> None:
    """A name that nobody reads would be a setting that nobody keeps."""
    read = {parameter.envvar for parameter in main.commands["serve"].params if isinstance(parameter, click.Option)}
    assert {each["name"] for each in container()["env"]} <= read
    assert container()["args"] == ["serve"]


def test_the_access_rules_can_be_read(tmp_path: Path) -> None:
    mounts = {each["name"]: each["mountPath"] for each in container()["volumeMounts"]}
    (file,) = one("ConfigMap")["data"]
    assert variables()["AGENTFLEET_ACCESS_RULES"] == f"{mounts['access']}/{file}"
    (tmp_path / file).write_text(one("ConfigMap")["data"][file])
    assert AccessRules.from_file(tmp_path / file).rules


def test_the_pod_keeps_the_restricted_profile() -> None:
    """Of the Pod Security Standards, which the namespace enforces; and a root file system that nobody writes to."""
    assert one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    spec, inner = pod()["spec"], container()["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert all({*each} - {"name"} <= {"configMap", "emptyDir", "secret"} for each in spec["volumes"])


def test_a_leader_has_time_to_leave() -> None:
    """The 30 s that it takes at most, of which the wait for traffic to end is a part."""
    assert pod()["spec"]["terminationGracePeriodSeconds"] >= 30 + 5
    assert 0 < seconds_of(variables()["AGENTFLEET_LINGER"], "linger") < 15
    strategy = one("Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert one("Deployment")["spec"]["replicas"] - strategy["maxUnavailable"] >= 1


def test_the_network_policy_knows_the_agents() -> None:
    """The labels by which it lets managers reach agents are those that every agent's pod has."""
    template = AgentTemplate(command=["agent"], port=9000, kubernetes=KubernetesOptions(image="agent"))
    made = render(FleetSpec(name="a", template=template), namespace="x").get("Deployment")
    assert made is not None
    labels = made["spec"]["template"]["metadata"]["labels"]
    selectors = [
        each["podSelector"]["matchLabels"]
        for rule in one("NetworkPolicy")["spec"]["egress"]
        if "ports" not in rule
        for each in rule["to"]
    ]
    assert len(selectors) == 2
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert one("NetworkPolicy")["spec"]["policyTypes"] == ["Ingress", "Egress"], "what is not listed is denied"
