"""The seven routes of the story, by its own examples (F17)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.asking import Reply
from tests.server.world import world

pytestmark = pytest.mark.anyio

CLUSTER = {
    "cluster_name": "ai-agent-cluster",
    "namespace": "ai-agents",
    "min_replicas": 1,
    "max_replicas": 10,
    "target_cpu_percent": 70,
    "target_memory_percent": 80,
    "health_check_config": {"checks": [{"kind": "http", "path": "/health"}]},
}
"""The story's `ClusterConfig`, in the columns and with the defaults of its table."""


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
async def test_the_seven_routes(tmp_path: Path, database_url: str) -> None:
    async with world(tmp_path, database=database_url) as here:
        ask = here.ask
        made = await ask("POST", "/api/v1/clusters", CLUSTER)
        assert made.status == 202
        assert {"cluster_id": made.json["cluster_id"], "status": "creating"}.items() <= made.json.items()
        assert made.headers["location"] == f"/api/v1/operations/{made.json['operation_id']}"
        assert (await here.finished(made)).status == "succeeded"

        id = made.json["cluster_id"]
        listed = await ask("GET", "/api/v1/clusters")
        assert [(each["id"], each["cluster_name"], each["namespace"]) for each in listed.json["items"]] == [
            (id, "ai-agent-cluster", "ai-agents")
        ]
        seen = await here.until(id, lambda seen: seen["status"] == "running")
        assert seen["spec"]["scaling"]["min_replicas"] == 1
        assert seen["spec"]["scaling"]["max_replicas"] == 10
        assert [(each["kind"], each["utilization"]) for each in seen["spec"]["scaling"]["targets"]] == [
            ("cpu", 70),
            ("memory", 80),
        ]
        assert seen["spec"]["health"]["checks"][0]["path"] == "/health"

        scaled = await ask("PUT", f"/api/v1/clusters/{id}/scale", {"replicas": 5})
        assert scaled.status == 202
        assert {"status": "scaling", "target_replicas": 5}.items() <= scaled.json.items()
        assert (await here.finished(scaled)).outcome["replicas"] == 5

        deployed = await ask("POST", f"/api/v1/clusters/{id}/deploy", {"version": "2"})
        assert (deployed.json["status"], (await here.finished(deployed)).outcome["version"]) == ("deploying", "2")

        back = await ask("POST", f"/api/v1/clusters/{id}/rollback")
        assert (back.json["status"], (await here.finished(back)).outcome["version"]) == ("rolling_back", "1")

        healthy = await _healthy(here, id)
        assert (healthy["status"], healthy["desired"], healthy["ready"]) == ("healthy", 5, 5)
        assert healthy["reasons"] == []


async def _healthy(here: Any, id: str) -> dict[str, Any]:
    await here.until(id, lambda seen: seen["status"] == "running" and seen["ready"] == 5)
    reply: Reply = await here.ask("GET", f"/api/v1/clusters/{id}/health")
    found: dict[str, Any] = reply.json
    return found


async def test_without_a_template_it_is_said_that_one_is_needed(tmp_path: Path) -> None:
    from agentfleet.server import Admission  # noqa: PLC0415

    async with world(tmp_path, admission=Admission(engine="memory")) as here:
        refused = await here.ask("POST", "/api/v1/clusters", CLUSTER)
        assert (refused.status, refused.kind, refused.fields()) == (422, "invalid", ["template"])
        assert (await here.ask("GET", "/api/v1/clusters")).json["items"] == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cluster_name": "Big"}, "cluster_name"),
        ({"cluster_name": "0b54a6b4-0bde-4de2-a154-c21bafd3b8cd"}, "cluster_name"),
        ({"min_replicas": 11}, "min_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"target_cpu_percent": "many"}, "target_cpu_percent"),
        ({"health_check_config": {"checks": [{"kind": "custom", "call": "os:abort"}]}}, "health_check_config.checks.0"),
        ({"replicas": 99}, "replicas"),
        ({"template": {"command": []}}, "template.command"),
        ({"template": {"command": ["x"]}, "target_cpu_percent": 50}, "target_cpu_percent"),
        ({"colour": "blue"}, "colour"),
        ({"recovery": {"max_disrupted": "200%"}}, "recovery.max_disrupted"),
    ],
)
async def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    async with world(tmp_path) as here:
        refused = await here.ask("POST", "/api/v1/clusters", CLUSTER | changes)
        assert (refused.status, refused.kind) == (422, "invalid"), refused.body
        assert field in refused.fields(), refused.json
        assert (await here.ask("GET", "/api/v1/clusters")).json["items"] == []


async def test_whole_policies_go_before_the_few_words(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        asked = CLUSTER | {
            "scaling": {"min_replicas": 2, "max_replicas": 4, "targets": [{"kind": "cpu", "utilization": 33}]},
            "health": {"startup": "10s"},
            "recovery": {"restarts": 7},
            "rollout": {"max_surge": 1},
        }
        await here.finished(await here.ask("POST", "/api/v1/clusters", asked))
        spec = (await here.ask("GET", "/api/v1/clusters/ai-agent-cluster")).json["spec"]
        assert (spec["scaling"]["min_replicas"], spec["replicas"]) == (2, 2)
        assert (spec["health"]["checks"], spec["health"]["startup"]) == ([], "10s")
        assert (spec["recovery"]["restarts"], spec["rollout"]["max_surge"]) == (7, 1)


async def test_a_whole_spec_may_be_posted(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        spec = {"name": "whole", "template": {"command": ["agent"]}, "replicas": 1}
        made = await here.ask("POST", "/api/v1/clusters", {"spec": spec, "namespace": "labs"})
        assert (await here.finished(made)).status == "succeeded"
        seen = (await here.ask("GET", "/api/v1/clusters/whole")).json
        assert (seen["namespace"], seen["spec"]["template"]["command"]) == ("labs", ["agent"])
