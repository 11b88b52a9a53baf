"""A manager that was killed at any instant leaves nothing that the next one does not find."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agentfleet.backends.process import ProcessBackend, system
from agentfleet.backends.process.records import Record, StateDir
from agentfleet.errors import BackendRefused
from agentfleet.instances import Phase
from agentfleet.specs import AgentTemplate

from .process_tools import FLEET, SLEEPER, alive, children, creation, dead, eventually, opened, process_of

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

MANAGER = """
import os, signal, sys
from pathlib import Path
import anyio
from agentfleet.backends.base import Creation
from agentfleet.backends.process import ProcessBackend, spawn
from agentfleet.specs import AgentTemplate

state, count, point, action = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(function):
    def call(*args, **options):
        function(*args, **options)
        die()
    return call

if point == "before-output":
    spawn.output.open_for_append = die
elif point == "before-spawn":
    spawn.subprocess.Popen = die
elif point == "after-spawn":
    spawn.subprocess.Popen = die_after(spawn.subprocess.Popen)

async def main():
    async with ProcessBackend(state_dir=state) as backend:
        for number in range(count):
            template = AgentTemplate(command=tuple(sys.argv[5:]), drain=60)
            await backend.create(Creation(id=f"i{number}", fleet="f", slot=number, revision=2, template=template))
        if action == "stop":
            await backend.stop("f", "i0", grace=600)
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def killed_manager(state: Path, *command: str, count: int = 1, point: str = "running", action: str = "none") -> None:
    """Run a manager in a process of its own until it has started its instances, and kill -9 it."""
    with subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(state), str(count), point, action, *command], stdout=subprocess.PIPE
    ) as manager:
        assert manager.stdout is not None
        line = manager.stdout.readline()
        if point == "running":
            assert line == b"ready\n"
        os.kill(manager.pid, signal.SIGKILL)
        assert manager.wait() == -signal.SIGKILL


def recorded(state: Path) -> dict[str, dict[str, object]]:
    found = [json.loads(path.read_text()) for path in (state / "instances").glob("*.json")]
    return {record["id"]: record for record in found}


async def test_the_next_manager_adopts_all_and_closing_leaves_nothing(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600", count=5)
    before = recorded(tmp_path)
    assert len(before) == 5
    async with opened(tmp_path) as (backend, seen):
        assert set(seen.instances) == set(before)
        for id, instance in seen.instances.items():
            record = before[id]
            assert (instance.phase, instance.ready, instance.revision) == (Phase.RUNNING, True, 2)
            assert instance.address == f"127.0.0.1:{record['port']}"
            assert instance.started_at == record["started_at"]
            assert process_of(backend, id) == record["pid"]
            environment = system.environment(process_of(backend, id))
            assert environment["AGENTFLEET_TOKEN"] == backend.credential(FLEET, id)
        await backend.restart(FLEET, "i0", grace=5)
        assert (await seen.ready("i0", restarts=1)).address != f"127.0.0.1:{before['i0']['port']}"
    for record in before.values():
        await dead(int(str(record["pid"])))
    assert recorded(tmp_path) == {}
    assert list((tmp_path / "output").iterdir()) == []


async def test_the_end_of_an_adopted_process_is_seen(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    async with opened(tmp_path) as (backend, seen):
        os.kill(process_of(backend, "i0"), signal.SIGKILL)
        exited = await seen.phase("i0", Phase.EXITED)
        assert exited.exit_code is None  # only its parent learns that


async def test_what_ended_meanwhile_is_reported_as_exited(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600", count=2)
    pid = int(str(recorded(tmp_path)["i1"]["pid"]))
    os.kill(pid, signal.SIGKILL)
    await dead(pid)
    async with opened(tmp_path) as (_, seen):
        assert seen.instances["i0"].phase is Phase.RUNNING
        assert seen.instances["i1"].phase is Phase.EXITED
        assert seen.instances["i1"].exit_code is None


async def test_killed_between_record_and_output_nothing_ran(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600", point="before-output")
    assert "pid" not in recorded(tmp_path)["i0"]
    async with opened(tmp_path) as (_, seen):
        assert seen.instances == {}
        assert recorded(tmp_path) == {}


async def test_killed_just_before_the_spawn_is_reported_as_exited(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600", point="before-spawn")
    async with opened(tmp_path) as (backend, seen):
        assert seen.instances["i0"].phase is Phase.EXITED
        await backend.restart(FLEET, "i0", grace=0)
        await seen.ready("i0", restarts=1)


async def test_killed_between_spawn_and_record_the_process_is_found(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600", point="after-spawn")
    assert "pid" not in recorded(tmp_path)["i0"]
    async with opened(tmp_path) as (backend, seen):
        assert seen.instances["i0"].phase is Phase.RUNNING
        pid = process_of(backend, "i0")
        assert recorded(tmp_path)["i0"]["pid"] == pid
        assert seen.instances["i0"].address == f"127.0.0.1:{recorded(tmp_path)['i0']['port']}"
    await dead(pid)


async def test_a_stop_under_way_goes_on(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 600; done", action="stop")
    async with opened(tmp_path) as (backend, seen):
        # The killed manager may or may not have come to record the stop; if it did, it is still in force.
        stopping = "stop_by" in recorded(tmp_path)["i0"]
        assert seen.instances["i0"].phase is (Phase.DRAINING if stopping else Phase.RUNNING)
        await backend.stop(FLEET, "i0", grace=0)
        await seen.gone("i0")


async def test_a_recorded_stop_is_finished_when_its_time_is_up(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    state = StateDir(tmp_path)
    record = next(iter(state.load()))
    state.write(replace(record, stop_by=0.0))
    state.close()
    assert record.pid is not None
    async with opened(tmp_path) as (_, seen):
        await seen.gone("i0")
        await dead(record.pid)


async def test_a_pid_that_now_belongs_to_another_is_never_touched(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:  # noqa: ASYNC220
        try:
            state = StateDir(tmp_path)
            record = Record(
                id="old", fleet=FLEET, slot=0, revision=1, template=SLEEPER, created_at=1.0, launch="x", port=20_001,
                pid=stranger.pid, identity="boot:12345", started_at=2.0,
            )  # fmt: skip
            state.write(record)
            state.write(replace(record, id="stopping", stop_by=0.0))
            state.close()
            async with opened(tmp_path) as (backend, seen):
                assert {i.id: i.phase for i in seen.instances.values()} == {"old": Phase.EXITED}
                await backend.stop(FLEET, "old", grace=0)
                await seen.gone("old")
            assert stranger.poll() is None
        finally:
            stranger.kill()


async def test_a_process_without_a_record_is_ended(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    pid = int(str(recorded(tmp_path)["i0"]["pid"]))
    (tmp_path / "instances" / "i0.json").unlink()
    async with opened(tmp_path) as (_, seen):
        assert seen.instances == {}
        await dead(pid)


async def test_a_damaged_record_is_set_aside_and_its_process_ended(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    pid = int(str(recorded(tmp_path)["i0"]["pid"]))
    (tmp_path / "instances" / "i0.json").write_text('{"format": 1, "id": ')
    async with opened(tmp_path) as (_, seen):
        assert seen.instances == {}
        await dead(pid)
        assert [path.name for path in (tmp_path / "instances").iterdir()] == ["i0.json.bad"]


async def test_another_format_is_refused_and_its_processes_left_alone(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    path = tmp_path / "instances" / "i0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(BackendRefused, match="another version"):
        async with ProcessBackend(state_dir=tmp_path):
            pass
    assert alive(record["pid"])
    path.write_text(json.dumps(record))
    async with opened(tmp_path) as (_, seen):  # the refused one has let go of the lock
        assert set(seen.instances) == {"i0"}


async def test_grandchildren_of_the_dead_are_ended_by_the_next_manager(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sh", "-c", "sleep 600 & echo child $!; wait")
    pid = int(str(recorded(tmp_path)["i0"]["pid"]))
    child = await children(tmp_path, "i0")
    os.kill(pid, signal.SIGKILL)
    await dead(pid)
    assert alive(child)
    async with opened(tmp_path) as (_, seen):
        assert seen.instances["i0"].phase is Phase.EXITED
        await dead(child)


async def test_kept_instances_are_found_again_by_the_same_program(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    agent = AgentTemplate(command=("sh", "-c", f"read line < {gate}; exit 7"))
    async with ProcessBackend(state_dir=tmp_path, on_close="keep") as backend:
        await backend.create(creation("a", agent))
        pid = process_of(backend, "a")
    assert alive(pid)
    async with opened(tmp_path) as (backend, seen):
        assert process_of(backend, "a") == pid
        with gate.open("w") as way:
            way.write("go\n")
        assert (await seen.phase("a", Phase.EXITED)).exit_code == 7  # our own child, whichever backend started it
    await eventually(lambda: not alive(pid))


async def test_the_exit_code_survives_the_manager(tmp_path: Path) -> None:
    async with opened(tmp_path, on_close="keep") as (backend, seen):
        await backend.create(creation("a", AgentTemplate(command=("sh", "-c", "exit 5"))))
        await seen.phase("a", Phase.EXITED)
        await eventually(lambda: recorded(tmp_path)["a"].get("exit_code") == 5)
    async with opened(tmp_path) as (_, seen):
        assert (seen.instances["a"].phase, seen.instances["a"].exit_code) == (Phase.EXITED, 5)


async def test_one_manager_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        with pytest.raises(BackendRefused, match=f"pid {os.getpid()}"):
            async with ProcessBackend(state_dir=tmp_path):
                pass
        async with backend:  # the same one again: it stays open for its first user
            pass
        await backend.create(creation("a"))
        await seen.ready("a")
    async with opened(tmp_path):
        pass


async def test_agents_do_not_inherit_the_lock(tmp_path: Path) -> None:
    killed_manager(tmp_path, "sleep", "600")
    with anyio.fail_after(30):
        async with opened(tmp_path) as (_, seen):
            assert set(seen.instances) == {"i0"}


async def test_only_this_user_may_read_the_state(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    async with opened(tmp_path / "state") as (backend, seen):
        await backend.create(creation("a"))
        await seen.ready("a")
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
        for path in (tmp_path / "state").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendRefused, match="state_dir"):
        async with ProcessBackend(state_dir=tmp_path / "file"):
            pass
