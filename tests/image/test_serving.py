"""The manager in its image: without root, shell or writable root it keeps a fleet, leaves in order, and comes back."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.image.build import Image
from tests.image.container import Container, volume

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DATA = "/var/lib/agentfleet"
TOKENS = "/run/secrets/agentfleet/tokens"
TOKEN = "a-token-for-everything-of-these-tests-alone"
RULES = Path(__file__).parents[2] / "examples" / "kubernetes" / "monitoring" / "rules.yaml"
AGENT = "from agentfleet.agent import Agent\nAgent(lambda task, agent: {}).run()"
CLUSTER = {
    "spec": {
        "name": "researchers",
        "replicas": 2,
        "template": {"command": ["python", "-c", AGENT], "version": "1.4.0", "port": 8080, "drain": 1},
        "health": {"checks": [{"kind": "http", "path": "/status", "period": "500ms", "failures": 5}]},
    }
}


class Manager:
    """A manager that runs in its image, and the way to its API."""

    def __init__(self, image: Image, folder: Path, port: int, env: Mapping[str, str] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        tokens, data = folder / "tokens", folder / "data"
        tokens.write_text(f"tests admin * {TOKEN}\n")
        tokens.chmod(0o444)
        if not data.exists():
            volume(image, DATA, data)
        self.port = port
        self.began = datetime.now(UTC)
        self.container = Container(
            image,
            env={
                "AGENTFLEET_BACKEND": "process",
                "AGENTFLEET_HOST": "127.0.0.1",  # the network is this machine's
                "AGENTFLEET_PORT": str(port),
                "AGENTFLEET_TOKEN_FILE": TOKENS,
                **(env or {}),
            },
            volumes={DATA: data, TOKENS: tokens},
            log=folder / "log",
        )

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        with connection.getresponse() as answer:
            content = answer.read().decode()
        connection.close()
        is_json = "json" in (answer.getheader("Content-Type") or "")
        return answer.status, json.loads(content) if is_json else content

    def until(self, what: str, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is so."""
        due = time.monotonic() + seconds
        while not holds():
            assert self.container.running, self.container.output()
            assert time.monotonic() < due, f"not {what} within {seconds:g} s: {self.container.output()}"
            time.sleep(0.05)

    def ready(self) -> bool:
        """Whether it says so."""
        try:
            return self.ask("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def is_well(self) -> bool:
        """Whether the fleet has what it wants, as this very manager has seen."""
        status, found = self.ask("GET", "/api/v1/clusters/researchers")
        if status != 200 or found["seen_at"] is None or datetime.fromisoformat(found["seen_at"]) < self.began:
            return False
        return (found["status"], found["ready"]) == ("running", 2)

    def leave(self) -> int:
        """Ask it to leave; its exit code."""
        self.container.signal(signal.SIGTERM)
        return self.container.wait(30)


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
    return number


def test_a_manager_serves_keeps_a_fleet_leaves_and_comes_back(image: Image, port: int, tmp_path: Path) -> None:
    manager = Manager(image, tmp_path / "manager", port)
    with manager.container:
        manager.until("ready", manager.ready)
        judged = manager.container.run(image.health)
        assert (judged.returncode, judged.stdout) == (0, "200 OK\n")
        status, created = manager.ask("POST", "/api/v1/clusters", CLUSTER)
        assert (status, created["status"]) == (202, "creating"), created
        manager.until("well", manager.is_well)
        exported = set(re.findall(r"^# TYPE (\S+) ", manager.ask("GET", "/metrics")[1], re.MULTILINE))
        named = set(re.findall(r"agentfleet_\w+", yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"])))
        others = {name for name in named if name.startswith("agentfleet_kubernetes_")}  # its engine is another one
        assert named - others <= exported, "the alert rules are about what is really exported"
        assert manager.leave() == 0, manager.container.output()
    assert sorted(each.name for each in (tmp_path / "manager" / "data").iterdir() if each.suffix == ".db") == [
        "fleet-events.db",
        "fleet.db",
    ]

    again = Manager(image, tmp_path / "manager", port)
    with again.container:
        again.until("ready", again.ready)
        again.until("well, as before", again.is_well)
        assert again.ask("GET", "/api/v1/clusters/researchers")[1]["id"] == created["cluster_id"]
        assert again.leave() == 0, again.container.output()


def test_without_a_token_nobody_is_served(image: Image, port: int, tmp_path: Path) -> None:
    manager = Manager(image, tmp_path / "manager", port, {"AGENTFLEET_TOKEN_FILE": ""})
    with manager.container:
        assert manager.container.wait(60) == 1
    assert "nobody could be recognised" in manager.container.output()
