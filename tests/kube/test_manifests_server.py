"""The manifests on a real API server: each is applied by server-side apply, as the manager's own account may."""

from __future__ import annotations

import json
import time
from typing import Any

import anyio
import pytest
from tests.kube.permissions import ACCOUNT, NAMESPACE, grant
from tests.kube.story import DEPLOYMENT, EXAMPLES, leaves, read

from agentfleet.backends.kubernetes import apply
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.manifests import Configuration, render
from agentfleet.specs import FleetSpec
from agentfleet.testing.kube import ApiRefused, Client, ControlPlane

if not EXAMPLES.exists():
    pytest.skip("no examples here: these are the tests of a wheel", allow_module_level=True)

pytestmark = [pytest.mark.integration, pytest.mark.slow]
EVERYTHING = """
name: everything
replicas: 2
template:
  command: [python, -m, my_agent, --port, "{port}"]
  version: 2.0.0+build 7
  env: {GREETING: costs $(NOTHING) $$, LANG: C}
  cpu: 250m
  memory: 512Mi
  port: 8080
  drain: 45s
  kubernetes:
    image: agent:1
    pull: IfNotPresent
    pull_secrets: [registry]
    args: [--node, $(NODE)]
    working_dir: /srv
    env:
      NODE: {field: spec.nodeName}
      KEY: {secret: provider, key: api-key, optional: true}
      MODE: {config_map: modes, key: mode}
      LIMIT: {resource: limits.memory}
      WHERE: {value: on $(NODE)}
    env_from: [{secret: more, prefix: MORE_, optional: true}, {config_map: settings}]
    token: {secret: token, key: token}
    requests: {ephemeral-storage: 1Gi}
    limits: {cpu: 500m, memory: 1Gi, example.com/gpu: "1"}
    volumes:
      - {name: credentials, path: /credentials, secret: provider}
      - {name: modes, path: /modes, config_map: modes}
      - {name: cache, path: /cache, empty: {size: 1Gi, in_memory: true}}
      - {name: data, path: /data, claim: data, sub_path: agents}
      - name: pod
        path: /pod
        source: {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
    liveness: {path: /health, period: 20s, failures: 6}
    pre_stop: {sleep: 5s}
    component: worker
    part_of: research
    labels: {team: blue}
    annotations: {example.com/owner: blue}
    pod_annotations: {example.com/scrape: "yes"}
    service_account: default
    priority_class: important
    node_selector: {kubernetes.io/os: linux}
    tolerations:
      - {key: agents, value: only, effect: NoSchedule}
      - {key: node.kubernetes.io/unreachable, effect: NoExecute, duration: 20s}
    spread: [{}, {over: topology.kubernetes.io/zone, max_skew: 5, strict: true}]
    affinity:
      podAntiAffinity:
        preferredDuringSchedulingIgnoredDuringExecution:
          - weight: 1
            podAffinityTerm: {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {team: red}}}
    security: {user: 1000, group: 1000, volume_group: 2000, tmp_size: 64Mi}
    service: {kind: Headless, port: 80, annotations: {example.com/route: agents}}
    config: {files: {prompt.txt: be kind}}
    autoscaler:
      enabled: true
      metrics:
        queue: {name: broker_queue_length, labels: {queue: tasks}}
        latency: {described: {apiVersion: v1, kind: Service, name: everything}}
    raw:
      spec:
        enableServiceLinks: false
        containers:
          - {name: agent, stdin: true, env: [{name: LANG, value: C.UTF-8}]}
          - {name: sidecar, image: "sidecar:1"}
    raw_objects:
      Service: {spec: {publishNotReadyAddresses: true}}
health:
  startup: 90s
  checks: [{kind: tcp, period: 5s, failures: 5, successes: 2}]
recovery: {max_disrupted: 2}
rollout: {max_surge: 10, max_unavailable: 5%, min_ready: 5s, progress_deadline: 5m, keep_revisions: 5}
scaling:
  min_replicas: 2
  max_replicas: 20
  targets:
    - {kind: cpu, utilization: 70}
    - {kind: queue, length: 2.5}
    - {kind: metric, metric: latency, value: 0.25}
    - {kind: metric, metric: tokens, per_instance: 1000}
    - {kind: metric, metric: requests, average: 50}
  up: {stabilization: 10s, select: min, rules: [{count: 10, period: 30s}, {percent: 50, period: 1m}]}
  down: {stabilization: 5m, select: disabled, rules: [{percent: 10, period: 1m}], tolerance: 0.2}
"""


@pytest.fixture(scope="module", name="plane")
def granted(plane: ControlPlane) -> ControlPlane:
    """The control plane with the examples' namespace, account and permissions, given to it by server-side apply."""
    anyio.run(grant, plane)
    return plane


async def _manager(plane: ControlPlane) -> Client:
    return Client(await plane.service_account(NAMESPACE, ACCOUNT))


async def _versions(client: Client) -> ApiVersions:
    return ApiVersions.discovered(await client.get("/version"), await client.get("/apis"))


async def _send(client: Client, request: apply.Request) -> dict[str, Any]:
    body = json.loads(request.body) if request.body else None
    kind = request.content_type or "application/json"
    answer: dict[str, Any] = await client.request(request.method, request.target, body, kind=kind)
    return answer


def test_every_field_is_taken_and_kept(plane: ControlPlane) -> None:
    """A dry run of a fleet that uses every option: what comes back says what was said, so no field was dropped."""

    async def run() -> None:
        client = await _manager(plane)
        api = await _versions(client)
        assert (1, api.minor) == plane.version
        spec = FleetSpec.from_yaml(EVERYTHING)
        manifests = render(
            spec,
            api,
            namespace=NAMESPACE,
            revision=3,
            cause="upgrade",
            configuration=Configuration(7, {"model": "large"}),
        )
        assert len(manifests.objects) == 5
        for manifest in manifests.objects:
            stored = await _send(client, apply.apply(manifest, dry_run=True))
            for each in (manifest, stored):  # an HPA's metrics come back in an order of the server's own
                each["spec" if "spec" in each else "data"].get("metrics", []).sort(
                    key=lambda metric: json.dumps(metric, sort_keys=True)
                )
            said, kept = leaves(manifest), leaves(stored)
            said = {place: value for place, value in said.items() if place != "spec.paused"}  # false is left out
            assert {place: kept.get(place) for place in said} == said

    anyio.run(run)


def test_the_example_is_what_the_server_makes_of_the_one_written_by_hand(plane: ControlPlane) -> None:
    """With all defaults filled in by the server itself, every field of it is the same."""

    async def run() -> None:
        client = await _manager(plane)
        spec = FleetSpec.from_yaml((EXAMPLES / "fleet.yaml").read_text())
        ours = render(spec, await _versions(client)).get("Deployment")
        assert ours is not None
        specs = []
        for manifest in (read(DEPLOYMENT), ours):
            stored = await _send(client, apply.apply(manifest, dry_run=True))
            specs.append(stored["spec"])
        by_hand, from_spec = (leaves(each) for each in specs)
        by_hand = {place: value for place, value in by_hand.items() if value != {}}  # an empty security context
        assert {place: from_spec.get(place) for place in by_hand} == by_hand

    anyio.run(run)


def test_a_fleet_is_applied_again_without_a_change_and_deleted_whole(plane: ControlPlane) -> None:
    async def run() -> None:
        client = await _manager(plane)
        api = await _versions(client)
        spec = FleetSpec.from_yaml(EVERYTHING)
        first: list[tuple[str, str, int | None]] = []
        again: list[tuple[str, str, int | None]] = []
        for versions in (first, again):
            for manifest in render(spec, api, namespace=NAMESPACE).objects:
                stored = await _send(client, apply.apply(manifest))
                versions.append((stored["kind"], stored["metadata"]["uid"], stored["metadata"].get("generation")))
        assert again == first
        for kind, listing in apply.kept_collections(api, NAMESPACE, spec.name).items():
            found = (await _send(client, listing))["items"]
            assert len(found) == 1, kind
            item = {"kind": kind, "apiVersion": (await _send(client, listing))["apiVersion"], **found[0]}
            await _send(client, apply.deletion(item, uid=item["metadata"]["uid"]))
        deadline = time.monotonic() + 10
        left: dict[str, int] = {"": 1}
        while any(left.values()) and time.monotonic() < deadline:
            left = {
                kind: len((await _send(client, listing))["items"])
                for kind, listing in apply.kept_collections(api, NAMESPACE, spec.name).items()
            }
        assert not any(left.values()), left

    anyio.run(run)


@pytest.mark.parametrize(
    ("verb", "path", "may"),
    [
        ("list", ("", "pods"), True),
        ("create", ("", "pods/eviction"), True),
        ("patch", ("", "pods/status"), False),
        ("patch", ("apps", "deployments/scale"), True),
        ("list", ("metrics.k8s.io", "pods"), True),
        ("patch", ("coordination.k8s.io", "leases"), True),
        ("delete", ("coordination.k8s.io", "leases"), True),
        ("list", ("coordination.k8s.io", "leases"), False),
        ("list", ("apps", "replicasets"), False),
        ("create", ("", "events"), True),
        ("get", ("", "secrets"), False),
        ("create", ("", "pods/exec"), False),
        ("create", ("", "pods"), True),
        ("update", ("", "pods"), False),
        ("get", ("apps", "replicasets"), True),
        ("patch", ("apps", "replicasets"), False),
        ("create", ("rbac.authorization.k8s.io", "roles"), False),
    ],
)
def test_the_manager_may_what_it_needs_and_no_more(
    plane: ControlPlane, verb: str, path: tuple[str, str], may: bool
) -> None:
    async def run() -> None:
        client = await _manager(plane)
        assert await _may(client, verb, *path, namespace=NAMESPACE) is may
        assert await _may(client, verb, *path, namespace="default") is False

    anyio.run(run)


def test_the_manager_reads_nodes_and_their_leases_alone(plane: ControlPlane) -> None:
    async def run() -> None:
        client = await _manager(plane)
        assert await _may(client, "watch", "", "nodes")
        assert not await _may(client, "patch", "", "nodes")
        assert await _may(client, "list", "coordination.k8s.io", "leases", namespace="kube-node-lease")
        assert not await _may(client, "update", "coordination.k8s.io", "leases", namespace="kube-node-lease")
        with pytest.raises(ApiRefused, match="forbidden"):
            await client.get("/api/v1/namespaces/ai-agents/secrets")

    anyio.run(run)


async def _may(client: Client, verb: str, group: str, resource: str, *, namespace: str = "") -> bool:
    name, _, part = resource.partition("/")
    asked = {"namespace": namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
    review = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}
    answer = await client.post(
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {**review, "spec": {"resourceAttributes": asked}}
    )
    return bool(answer["status"]["allowed"])
