"""The manager of one fleet in examples/kubernetes, as the example's account on a real API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("sqlalchemy")

from tests.kube.permissions import grant
from tests.kube.world import cluster, spec

from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.stores.sql import SqlJournal
from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"


def test_the_program_leads_deploys_and_hands_over(plane: ControlPlane, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(plane) as there:
            access = await grant(plane, there.namespace)
            config = access.write(tmp_path / "kubeconfig", namespace=there.namespace)
            (tmp_path / "fleet.yaml").write_text(spec(4).to_yaml())
            journal = f"sqlite:///{tmp_path / 'journal.db'}"
            environment = {
                **os.environ,
                "KUBECONFIG": str(config),
                "FLEET": str(tmp_path / "fleet.yaml"),
                "JOURNAL": journal,
            }
            command = [sys.executable, str(FOLDER / "one_fleet.py")]
            async with await anyio.open_process(command, env=environment, stderr=subprocess.PIPE) as process:
                assert process.stderr is not None
                said = ""
                try:
                    with anyio.move_on_after(60):
                        while "is as it should be" not in said:
                            said += (await process.stderr.receive()).decode()
                    assert "is as it should be" in said, said
                    found: dict[str, Any] = {"status": {}}
                    with anyio.fail_after(30):
                        while found["status"].get("readyReplicas") != 4:  # it follows the pods
                            await anyio.sleep(0.1)
                            found = await plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
                    process.send_signal(signal.SIGTERM)
                    with anyio.fail_after(30):
                        assert await process.wait() == 0
                finally:
                    if process.returncode is None:
                        process.kill()
            with SqlJournal(journal) as kept:
                assert [each.kind for each in kept.read()][-1] == "manager.left"
            after = await plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
            assert after["spec"]["replicas"] == 4, "the instances stay"

    anyio.run(test)
