"""A control plane comes up, is hurt, and goes away without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest

from agentfleet.errors import AgentFleetError, BackendUnavailable, DeadlineExceeded, OperationRefused
from agentfleet.testing.kube import Access, ApiRefused, AssetsMissing, Client, ControlPlane, PlaneOptions, find_assets
from agentfleet.testing.kube.programs import Program
from agentfleet.testing.kube.scratch import Scratch

pytestmark = [pytest.mark.anyio, pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def configmap(name: str) -> dict[str, object]:
    return {"metadata": {"name": name}}


# ------------------------------------------------------------------------------------------------ who may do what


async def test_the_admin_may_and_nobody_may_not(plane: ControlPlane) -> None:
    assert (await plane.api.get("/api/v1/namespaces"))["items"]
    with pytest.raises(ApiRefused, match="nobody") as refused:
        await Client(plane.nobody).get("/api/v1/pods")
    assert refused.value.status == 403
    assert refused.value.reason == "Forbidden"


async def test_a_wrong_token_is_refused(plane: ControlPlane) -> None:
    with pytest.raises(ApiRefused) as refused:
        await Client(plane.access.with_token("wrong")).get("/api/v1/pods")
    assert refused.value.status == 401


async def test_a_service_account_acts_by_its_own_token(plane: ControlPlane) -> None:
    namespace = await plane.namespace()
    access = await plane.service_account(namespace, "default")
    with pytest.raises(ApiRefused, match=f"system:serviceaccount:{namespace}:default"):
        await Client(access).get(f"/api/v1/namespaces/{namespace}/pods")


async def test_a_client_certificate_opens_the_door(plane: ControlPlane) -> None:
    made = plane.authority.client("carol", "system:masters")
    pem = made.certificate.read_text() + made.key.read_text()
    access = Access(plane.access.server, plane.access.ca, certificate=pem)
    assert (await Client(access).get("/api/v1/namespaces"))["items"]


async def test_a_kubeconfig_says_the_same_again(plane: ControlPlane) -> None:
    assert Access.read(plane.kubeconfig()) == plane.access
    async with ControlPlane(kubeconfig=plane.kubeconfig()) as same:
        assert same.version == plane.version
        namespace = await same.namespace()
        with pytest.raises(OperationRefused, match="was not started here"):
            same.kill_apiserver()
    assert await plane.api.get(f"/api/v1/namespaces/{namespace}")


# ------------------------------------------------------------------------------------------------ faults


async def test_faults_of_a_plane_of_its_own(kube_assets: Path) -> None:
    begun = time.monotonic()
    async with ControlPlane(PlaneOptions(controllers=("serviceaccount", "serviceaccount-token"))) as plane:
        print(f"ready after {time.monotonic() - begun:.1f} s")
        pids = {program.pid for program in plane.programs.values()}
        folder = plane.folder
        path = f"/api/v1/namespaces/{await plane.namespace()}/configmaps"
        await _killed(plane, path)
        await _frozen(plane, path)
        await _compacted(plane, path)
        pids |= {program.pid for program in plane.programs.values()}
    assert not folder.exists()
    assert not [pid for pid in pids if pid is not None and psutil.pid_exists(pid)]


async def _killed(plane: ControlPlane, path: str) -> None:
    await plane.api.post(path, configmap("kept"))
    plane.kill_apiserver()
    with pytest.raises(BackendUnavailable):
        await plane.api.get(path)
    await plane.restart_apiserver()
    assert await plane.api.get(f"{path}/kept")


async def _frozen(plane: ControlPlane, path: str) -> None:
    plane.freeze_etcd()
    with pytest.raises(AgentFleetError):  # the API server's own deadline is later
        await plane.api.post(path, configmap("late"), timeout=1)
    plane.thaw_etcd()
    await plane.ready()
    await plane.api.wait(f"{path}/kept", bool)
    plane.freeze_apiserver()
    with pytest.raises(DeadlineExceeded):
        await plane.api.get(path, timeout=0.5)
    plane.thaw_apiserver()
    assert await plane.api.get(f"{path}/kept")


async def _compacted(plane: ControlPlane, path: str) -> None:
    for index in range(3):
        await plane.api.post(path, configmap(f"page-{index}"))
    page = await plane.api.get(f"{path}?limit=1")
    await plane.api.post(path, configmap("newer"))
    await plane.compact()
    with pytest.raises(ApiRefused) as refused:
        await plane.api.get(f"{path}?limit=1&continue={page['metadata']['continue']}")
    assert refused.value.status == 410
    old = page["metadata"]["resourceVersion"]
    await plane.compact(forget=True)
    assert await _code_of_watch(plane, f"{path}?watch=1&resourceVersion={old}&timeoutSeconds=1") == 410


async def _code_of_watch(plane: ControlPlane, path: str) -> int:
    """What an expired watch says: in its status, or in its only event."""
    try:
        said = await plane.api.get(path)
    except ApiRefused as error:
        return error.status
    return int(said["object"]["code"])


# ------------------------------------------------------------------------------------------------ the end

ABANDON = """
import anyio
from agentfleet.testing.kube import ControlPlane

async def main():
    plane = ControlPlane()
    await plane.start()
    print(plane.folder, *(program.pid for program in plane.programs.values()), flush=True)
    await anyio.sleep_forever()

anyio.run(main)
"""


def test_a_killed_owner_leaves_no_process(kube_assets: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", ABANDON], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, *pids = owner.stdout.readline().split()
    programs = [psutil.Process(int(pid)) for pid in pids]
    assert len(programs) == 4
    owner.kill()
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(programs, timeout=10)
    assert not alive
    Scratch().remove()  # whoever comes next clears up
    assert not Path(folder).exists()


async def test_a_program_that_fails_shows_its_log(kube_assets: Path) -> None:
    options = PlaneOptions(extra={"kube-apiserver": ["--no-such-flag"]})
    with pytest.raises(AgentFleetError, match="unknown flag: --no-such-flag"):
        async with ControlPlane(options):
            pass


async def test_a_start_that_is_cancelled_leaves_nothing(kube_assets: Path) -> None:
    plane = ControlPlane()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(plane.start)
        await _begun(plane)
        tasks.cancel_scope.cancel()
    assert not [name for name, program in plane.programs.items() if program.running]


async def _begun(plane: ControlPlane) -> None:
    while not plane.programs:  # noqa: ASYNC110 - it tells nobody
        await anyio.sleep(0.01)


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(AssetsMissing, match=f"no etcd, kube-apiserver.* in {tmp_path}.*KUBEBUILDER_ASSETS names it"):
        find_assets()
    monkeypatch.delenv("KUBEBUILDER_ASSETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(AssetsMissing, match="set KUBEBUILDER_ASSETS"):
        find_assets()


def test_a_log_is_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 33_000_000)
    program = Program(["/bin/sh", "-c", "echo said; kill -STOP $$"], log=log)
    program.start()
    try:
        os.waitid(os.P_PID, program.pid or 0, os.WSTOPPED | os.WNOWAIT)
        assert program.tail() == "said"
        program.signal(signal.SIGCONT)
    finally:
        program.kill()
    assert not program.running
