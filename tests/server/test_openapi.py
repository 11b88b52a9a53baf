"""The OpenAPI document: complete, and true of the server, as requests that are made up from it find (G18)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.server.asking import ADMIN
from tests.server.conftest import Serve

from agentfleet.server.app import document

_HEADERS = {"Authorization": f"Bearer {ADMIN}"}
_LOOSE = (
    # what a schema cannot say of a request's parts together: cursors of this very list, bounds in their order, ...
    "POST /api/v1/clusters",
    "PUT /api/v1/clusters/{id}",
    "POST /api/v1/clusters/{id}/deploy",
    "PUT /api/v1/clusters/{id}/scale",
    "PUT /api/v1/clusters/{id}/configuration",
    "POST /api/v1/clusters/{id}/configuration/rollback",
    "POST /api/v1/clusters/{id}/configuration/check",
    "POST /api/v1/clusters/{id}/instances/{instance_id}/isolate",
    "GET /api/v1/clusters",
    "GET /api/v1/audit",
    "GET /api/v1/clusters/{id}/operations",
    "GET /api/v1/clusters/{id}/instances",
    "GET /api/v1/clusters/{id}/events",
    "GET /api/v1/clusters/{id}/decisions",
    "GET /api/v1/clusters/{id}/configuration/revisions",
    "GET /api/v1/clusters/{id}/config",
    "GET /api/v1/clusters/{id}/config/stream",
    "POST /api/v1/clusters/{id}/config/acks",
)
_LARGE = ("POST /api/v1/clusters", "PUT /api/v1/clusters/{id}")
_REJECTED = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
"""What a wrong request is answered with: schemathesis' own, and 413 where it is too large, too."""
_ACCEPTED = ["2xx", "3xx", "400", "401", "403", "404", "409", "412", "422", "428", "429", "5xx"]


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths: dict[str, Any] = document()["paths"]
    return [(path, method, each) for path, methods in paths.items() for method, each in methods.items()]


def test_every_route_says_all_it_answers() -> None:
    for path, method, operation in operations():
        said = operation["responses"]
        assert {"500", "503", "406"} <= set(said), path
        if path not in ("/livez", "/readyz"):
            assert {"401", "403", "429"} <= set(said), path
            assert operation["security"] == [{"token": []}], path
        if method in ("post", "put"):
            assert {"400", "413", "415", "422"} <= set(said), path
        for status, each in said.items():
            assert each["description"], (path, status)
            if int(status) >= 400:
                assert list(each["content"]) == ["application/problem+json"], (path, status)


def test_every_operation_has_a_name_of_its_own_and_a_summary() -> None:
    names = [each["operationId"] for _, _, each in operations()]
    assert len(names) == len(set(names)) == 44
    assert all(each["summary"] and each["description"] for _, _, each in operations())


def test_the_seven_routes_of_the_story_are_there() -> None:
    asked = {(method, path) for path, method, _ in operations()}
    assert {
        ("post", "/api/v1/clusters"),
        ("get", "/api/v1/clusters"),
        ("get", "/api/v1/clusters/{id}"),
        ("put", "/api/v1/clusters/{id}/scale"),
        ("post", "/api/v1/clusters/{id}/deploy"),
        ("post", "/api/v1/clusters/{id}/rollback"),
        ("get", "/api/v1/clusters/{id}/health"),
    } <= asked


def test_a_function_to_import_is_no_part_of_what_may_be_asked() -> None:
    remote = document()["components"]["schemas"]["RemoteHealth"]
    assert "CustomCheck" not in json.dumps(remote)


@pytest.mark.integration
@pytest.mark.slow
def test_requests_made_up_from_the_document_find_nothing(serve: Serve, tmp_path: Path) -> None:
    """All of schemathesis' checks: no 5xx, no answer but those that are documented, nothing wrong accepted, ..."""
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    limits = {"rate": 1e6, "burst": 1_000_000, "failures": 1_000_000, "stream": 0.1}
    address = serve(limits=limits).address
    known = _cluster(address)
    config = tmp_path / "schemathesis.toml"
    config.write_text(_config(known, thorough=thorough))
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        f"--config-file={config}",
        "run",
        f"{address}/api/v1/openapi.json",
        "--header",
        f"Authorization: Bearer {ADMIN}",
        "--checks=all",
        "--continue-on-failure",
        f"--phases={'examples,coverage,fuzzing,stateful' if thorough else 'examples,coverage,fuzzing'}",
        f"--max-examples={100 if thorough else 2}",
        f"--max-time={1800 if thorough else 60}",
        "--warnings=off",
        "--no-color",
        *(() if thorough else ("--seed=1",)),
    ]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=3600 if thorough else 500, check=False
    )
    assert found.returncode == 0, found.stdout[-12_000:] + found.stderr[-2000:]
    assert f"Tested: {len(operations())}" in found.stdout, "there was time for each operation"


def _cluster(address: str) -> dict[str, str]:
    """A cluster with instances, operations and configuration, for requests to hit upon."""
    session = requests.Session()
    session.headers.update(_HEADERS)
    with session:
        asked: Any = {"cluster_name": "a", "replicas": 3, "template": {"command": ["agent"]}}
        made = session.post(f"{address}/api/v1/clusters", json=asked, timeout=30).json()
        url = f"{address}/api/v1/operations/{made['operation_id']}"
        assert session.get(url, params={"wait": "30s"}, timeout=60).json()["status"] == "succeeded"
        told = session.put(
            f"{address}/api/v1/clusters/a/configuration", json={"document": {"a": 1}, "reason": "first"}, timeout=30
        )
        assert told.status_code == 200
        until = time.monotonic() + 30
        while not (found := session.get(f"{address}/api/v1/clusters/a/instances", timeout=30).json()["items"]):
            assert time.monotonic() < until
        return {"operation_id": made["operation_id"], "instance_id": found[0]["instance_id"]}


def _config(known: dict[str, str], *, thorough: bool) -> str:
    lines = [
        "[parameters]",
        '"path.id" = ["a", "nobody"]',
        f'"path.operation_id" = ["{known["operation_id"]}", "00000000-0000-0000-0000-000000000000"]',
        f'"path.instance_id" = ["{known["instance_id"]}", "nobody"]',
        "[checks.negative_data_rejection]",
        f"expected-statuses = {json.dumps(_REJECTED)}",
    ]
    accepted = json.dumps(_ACCEPTED)
    for name in _LOOSE:
        lines += ["[[operations]]", f'include-name = "{name}"']
        lines += [f"checks.positive_data_acceptance.expected-statuses = {accepted}"]
        if name in _LARGE and not thorough:  # hundreds of fields, of which this phase would try each by itself
            lines += ["phases.coverage.enabled = false"]
    lines += ["[[operations]]", 'include-name = "DELETE /api/v1/clusters/{id}"', 'parameters."path.id" = "nobody"']
    return "\n".join(lines) + "\n"
