"""Real processes: environment, ports, exits, draining, killing, output, usage and refusals."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from agentfleet.backends.base import Changed, Removed
from agentfleet.backends.process import ProcessBackend, handle, keeper, output, system
from agentfleet.backends.process.records import Record, StateDir, default_state_dir
from agentfleet.errors import BackendRefused, BackendUnavailable, Conflict
from agentfleet.instances import Phase
from agentfleet.specs import AgentTemplate

from .process_tools import (
    FLEET,
    Seen,
    alive,
    children,
    creation,
    dead,
    eventually,
    opened,
    process_of,
    shell,
    written,
)

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

STUBBORN = shell("trap '' TERM; echo up; while :; do sleep 600; done")


@pytest.fixture(params=["native", "portable"])
def system_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once as on this system, and once as where there is neither /proc nor a pidfd."""
    if request.param == "portable":
        monkeypatch.setattr(system, "LINUX", False)
        monkeypatch.setattr(handle, "_pidfd", lambda _: None)
    return str(request.param)


# ------------------------------------------------------------------------------------------------ what an agent gets


async def test_the_agents_environment(tmp_path: Path) -> None:
    template = shell(
        "env; echo args {version} {port} {other}; echo end",
        version="2.1{port}",
        env={"MINE": "yes", "PORT": "1", "AGENTFLEET_SLOT": "forged"},
        drain=7.5,
    )
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", template, slot=4))
        instance = await seen.phase("a", Phase.EXITED)
        lines = await written(backend, "a", "end")
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        assert instance.address is not None
        host, port = instance.address.split(":")
        assert (
            values.items()
            >= {
                "MINE": "yes",
                "PORT": port,
                "AGENTFLEET_PORT": port,
                "AGENTFLEET_HOST": host,
                "AGENTFLEET_FLEET": FLEET,
                "AGENTFLEET_INSTANCE": "a",
                "AGENTFLEET_SLOT": "4",
                "AGENTFLEET_REVISION": "2",
                "AGENTFLEET_VERSION": "2.1{port}",
                "AGENTFLEET_TOKEN": backend.credential(FLEET, "a"),
                "AGENTFLEET_DRAIN": "6.75",
                "PATH": os.environ["PATH"],
            }.items()
        )
        assert f"args 2.1{{port}} {port} {{other}}" in lines
        assert instance.node == socket.gethostname()


async def test_tokens_differ_and_stay(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, _):
        tokens = {backend.credential(fleet, id) for fleet in ("f", "g") for id in ("a", "b")}
        assert len(tokens) == 4
        first = backend.credential("f", "a")
    async with opened(tmp_path) as (backend, _):
        assert backend.credential("f", "a") == first
    async with opened(tmp_path / "other") as (backend, _):
        assert backend.credential("f", "a") != first


async def test_python_is_the_managers_own(tmp_path: Path) -> None:
    script = "import agentfleet.specs; print('imported')"
    async with opened(tmp_path) as (backend, _):
        await backend.create(creation("a", AgentTemplate(command=("python", "-c", script), env={"PATH": "/nowhere"})))
        await written(backend, "a", "imported")


async def test_each_has_a_port_of_its_own_that_nobody_uses(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = taken.getsockname()[1]
        async with opened(tmp_path, ports=range(used - 2, used + 3)) as (backend, seen):
            free = [port for port in range(used - 2, used + 3) if port != used and _bindable(port)]
            for number in range(len(free)):
                await backend.create(creation(f"i{number}", slot=number))
                await seen.ready(f"i{number}")
            assert {i.address for i in seen.instances.values()} == {f"127.0.0.1:{port}" for port in free}
            with pytest.raises(BackendRefused, match="no free port"):
                await backend.create(creation("more"))
            assert "more" not in {path.stem for path in (tmp_path / "instances").iterdir()}
            await backend.stop(FLEET, "i0", grace=0)
            await seen.gone("i0")
            await backend.create(creation("again"))  # on the port that was given back


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# ------------------------------------------------------------------------------------------------ exits


def own_children() -> set[int]:
    """The children of this program, zombies included; other tests keep some."""
    return {each.pid for each in psutil.Process().children()}


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 42", 42), ("kill -9 $$", -9), ("kill -15 $$", -15)])
async def test_exit_codes(tmp_path: Path, system_kind: str, script: str, code: int) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", shell(script)))
        exited = await seen.phase("a", Phase.EXITED)
        assert (exited.exit_code, exited.ready, exited.ready_at) == (code, False, None)
        assert exited.started_at is not None


async def test_no_zombies(tmp_path: Path) -> None:
    before = own_children()
    async with opened(tmp_path) as (backend, seen):
        for number in range(10):
            await backend.create(creation(f"i{number}", shell("exit 1")))
        await seen.until(lambda: [i.phase for i in seen.instances.values()] == [Phase.EXITED] * 10)
        assert own_children() <= before


async def test_what_a_dead_agent_leaves_behind_is_ended(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", shell("sleep 600 & echo child $!")))
        await seen.phase("a", Phase.EXITED)
        await dead(await children(tmp_path, "a"))


async def test_a_descendant_that_left_the_session_is_ended_too(tmp_path: Path) -> None:
    program = tmp_path / "agent.py"
    program.write_text(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    print('child', os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    template = AgentTemplate(command=("python", str(program)))
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("other"))
        await backend.create(creation("a", template))
        child = await children(tmp_path, "a")
        assert alive(child)
        await backend.restart(FLEET, "a", grace=0)
        await seen.ready("a", restarts=1)
        await dead(child)
        assert seen.instances["other"].phase is Phase.RUNNING
        await eventually(lambda: len((tmp_path / "output" / "a.log").read_text().splitlines()) == 2)
        second = await children(tmp_path, "a")
    await dead(second)


# ------------------------------------------------------------------------------------------------ stop and restart


async def test_stop_lets_the_agent_finish(tmp_path: Path, system_kind: str) -> None:
    done = tmp_path / "done"
    agent = shell(f"trap 'echo finished > {done}; exit 0' TERM; echo up; while :; do sleep 0.01; done")
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", agent))
        await written(backend, "a", "up")
        await backend.stop(FLEET, "a", grace=60)
        assert not (await seen.phase("a", Phase.DRAINING)).ready
        await seen.gone("a")
        assert done.read_text() == "finished\n"
        assert not list((tmp_path / "instances").iterdir())
        assert not list((tmp_path / "output").iterdir())


async def test_who_ignores_sigterm_is_killed_with_all_descendants(tmp_path: Path, system_kind: str) -> None:
    agent = shell("trap '' TERM; sleep 600 & echo child $!; while :; do sleep 600; done")
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", agent))
        child, leader = await children(tmp_path, "a"), process_of(backend, "a")
        started = time.monotonic()
        await backend.stop(FLEET, "a", grace=0.3)
        await seen.phase("a", Phase.DRAINING)
        await seen.gone("a")
        assert time.monotonic() - started >= 0.3
        await dead(leader)
        await dead(child)


async def test_a_second_stop_hastens_the_first(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", STUBBORN))
        await written(backend, "a", "up")
        await backend.stop(FLEET, "a", grace=3600)
        await eventually(lambda: "stop_by" in (tmp_path / "instances" / "a.json").read_text())
        with pytest.raises(Conflict):
            await backend.restart(FLEET, "a", grace=0)
        await backend.stop(FLEET, "a", grace=7200)
        assert alive(process_of(backend, "a"))
        await backend.stop(FLEET, "a", grace=0.1)
        await seen.gone("a")


async def test_the_frozen_are_killed_at_once(tmp_path: Path, system_kind: str) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a"))
        pid = process_of(backend, "a")
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: system.frozen(pid))
        await backend.stop(FLEET, "a", grace=3600)
        await seen.gone("a")
        await dead(pid)


async def test_restart_keeps_identity_and_output(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a", shell("echo run $AGENTFLEET_PORT; exec sleep 600"), slot=3))
        before = await seen.ready("a")
        await eventually(lambda: (tmp_path / "output" / "a.log").stat().st_size > 0)
        pid = process_of(backend, "a")
        await backend.restart(FLEET, "a", grace=30)
        await seen.phase("a", Phase.DRAINING)
        await seen.phase("a", Phase.PENDING)
        after = await seen.ready("a", restarts=1)
        assert (after.id, after.slot, after.revision, after.created_at) == ("a", 3, 2, before.created_at)
        assert after.exit_code == -signal.SIGTERM
        assert process_of(backend, "a") != pid
        assert after.address is not None
        assert before.address is not None
        lines = await written(backend, "a", f"run {after.address.split(':')[1]}")
        assert lines == [f"run {before.address.split(':')[1]}", f"run {after.address.split(':')[1]}"]


async def test_a_restart_of_what_cannot_be_executed_any_more(tmp_path: Path) -> None:
    program = tmp_path / "agent"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    async with opened(tmp_path / "state") as (backend, seen):
        await backend.create(creation("a", AgentTemplate(command=(str(program),))))
        await seen.ready("a")
        program.unlink()
        await backend.restart(FLEET, "a", grace=30)
        exited = await seen.phase("a", Phase.EXITED)
        assert (exited.exit_code, exited.restarts) == (126, 1)
        assert "template.command" in (await backend.logs(FLEET, "a"))[-1]
        program.write_text("#!/bin/sh\nexec sleep 600\n")
        program.chmod(0o755)
        await backend.restart(FLEET, "a", grace=30)
        await seen.ready("a", restarts=2)


async def test_a_stop_outlives_a_restart_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the manager die just then, the next one must still know of the stop."""
    launching, stopped = threading.Event(), threading.Event()
    saved: list[Record] = []
    write = StateDir.write

    def refuse(*_: object) -> Record:
        launching.set()
        stopped.wait(60)
        raise BackendRefused("no room")

    def note(state: StateDir, record: Record) -> None:
        saved.append(record)
        write(state, record)

    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a"))
        await seen.ready("a")
        monkeypatch.setattr(keeper, "launch", refuse)
        await backend.restart(FLEET, "a", grace=30)
        await eventually(launching.is_set)
        await backend.stop(FLEET, "a", grace=30)
        monkeypatch.setattr(StateDir, "write", note)
        stopped.set()
        await seen.gone("a")
    assert saved
    assert all(record.stop_by is not None for record in saved)


# ------------------------------------------------------------------------------------------------ refusals


@contextmanager
def nothing_new(state: Path) -> Iterator[None]:
    yield
    assert not list((state / "instances").iterdir())
    assert not list((state / "output").iterdir())


@pytest.mark.parametrize(
    ("content", "mode", "fix"), [(None, 0, "install it"), ("x", 0o644, r"mode \+x"), ("x", 0o755, "is no program")]
)
async def test_a_command_that_cannot_be_executed(tmp_path: Path, content: str | None, mode: int, fix: str) -> None:
    program = tmp_path / "agent"
    if content is not None:
        program.write_text(content)
        program.chmod(mode)
    state = tmp_path / "state"
    async with opened(state) as (backend, seen):
        with nothing_new(state), pytest.raises(BackendRefused, match=rf"template\.command .*{fix}"):
            await backend.create(creation("a", AgentTemplate(command=(str(program),))))
        await seen.until(lambda: Removed("a") in seen.history)
        await backend.create(creation("a"))  # the id was never used
        await seen.ready("a")


async def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own_children()
    async with opened(tmp_path) as (backend, seen):
        assert backend._house is not None
        state = backend._house.state
        write, calls = state.write, 0

        def failing(record: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:  # the process runs already
                raise OSError(28, "No space left on device")
            write(record)  # type: ignore[arg-type]

        monkeypatch.setattr(state, "write", failing)
        with nothing_new(tmp_path), pytest.raises(BackendRefused, match="no room"):
            await backend.create(creation("a"))
        assert own_children() <= before
        assert seen.instances == {}


async def test_an_id_of_another_fleet(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, _):
        await backend.create(creation("a"))
        with pytest.raises(BackendRefused, match="taken by fleet 'f'"):
            await backend.create(creation("a", fleet="g"))
        await backend.stop("g", "a", grace=0)
        assert alive(process_of(backend, "a"))


async def test_any_text_is_an_id(tmp_path: Path) -> None:
    ids = ["../../etc/x", "Ä b", ".", "a" * 600, "A", "a"]
    async with opened(tmp_path) as (backend, seen):
        for id in ids:
            await backend.create(creation(id))
            await seen.ready(id)
        assert len(list((tmp_path / "instances").iterdir())) == len(ids)
    assert not list((tmp_path / "instances").iterdir())


async def test_a_closed_backend_says_so(tmp_path: Path) -> None:
    backend = ProcessBackend(state_dir=tmp_path)
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            await backend.create(creation("a"))
        with pytest.raises(BackendUnavailable):
            backend.credential(FLEET, "a")
        with pytest.raises(BackendUnavailable):
            backend.watch(FLEET)
        async with backend:
            await backend.create(creation("a"))


async def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="ports"):
        ProcessBackend(ports=range(0))
    with pytest.raises(ValueError, match="max_output"):
        ProcessBackend(max_output=10)
    with pytest.raises(ValueError, match="on_close"):
        ProcessBackend(on_close="later")  # type: ignore[arg-type]


async def test_the_default_state_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "agentfleet" / "process"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / ".local" / "state" / "agentfleet" / "process"


# ------------------------------------------------------------------------------------------------ output and usage


async def test_output_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    # The last line is repeated: one that comes in the very instant of the cut may be lost.
    agent = shell("seq 1 20000 | sed 's/^/line /'; while :; do echo end; sleep 0.05; done")
    async with opened(tmp_path, max_output=4096) as (backend, _):
        await backend.create(creation("a", agent))
        lines = await written(backend, "a", "end")
        assert all(line == "end" or line.startswith("line ") for line in lines)
        assert sum(len(line) + 1 for line in lines) <= 4096
        assert await backend.logs(FLEET, "a", lines=1) == ["end"]
        assert await backend.logs(FLEET, "a", lines=0) == []


async def test_output_is_bounded_though_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "output" / "a.log"
    async with opened(tmp_path, max_output=4096) as (backend, _):
        await backend.create(creation("a"))
        with path.open("ab") as file:
            file.write(b"x" * 10_000)
        await eventually(lambda: path.stat().st_size <= 4096)


def test_a_cut_keeps_whole_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    assert output.trim(path, 1000)
    assert not output.trim(path, 1000)
    kept = path.read_text().splitlines()
    assert kept == [f"line {number}" for number in range(1000 - len(kept), 1000)]
    assert 490 < path.stat().st_size <= 500
    path.write_text("x" * 3000)  # one endless line
    assert output.tail(path, 5, 1000) == ["x" * 500]
    assert output.trim_all([path, tmp_path / "gone"], 100) == 1
    assert output.tail(tmp_path / "gone", 5, 100) == []


async def test_output_and_errors_come_as_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, _):
        await backend.create(creation("a", shell(r"echo out; echo err >&2; printf 'bad \377\r\n\nlast'; sleep 600")))
        assert await written(backend, "a", "last") == ["out", "err", "bad \ufffd", "", "last"]


async def test_usage_counts_the_children(tmp_path: Path, system_kind: str) -> None:
    agent = shell("(while :; do :; done) & wait")
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("busy", agent))
        await backend.create(creation("idle"))
        await backend.create(creation("foreign", fleet="g"))
        await backend.create(creation("done", shell("exit 0")))
        await seen.phase("done", Phase.EXITED)
        with anyio.fail_after(60):
            while True:
                used = await backend.usage(FLEET)
                if used["busy"].cpu > 0.05 and used["busy"].window >= 0.5:
                    break
                await anyio.sleep(0.05)
        assert set(used) == {"busy", "idle"}
        assert used["idle"].cpu < used["busy"].cpu
        assert used["busy"].memory > used["idle"].memory > 100_000
        assert abs(used["busy"].at - time.time()) < 60


# ------------------------------------------------------------------------------------------------ watching and leaving


async def test_a_slow_reader_gets_the_last_word_of_each(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        await backend.create(creation("a"))
        await backend.create(creation("b"))
        await seen.ready("b")
        assert backend._house is not None
        for _ in range(5000):
            backend._house.changed(backend._house.keepers["a"])
        backend._house.changed(backend._house.keepers["b"])
        assert len(seen._watcher._buffer) < 2000
        await backend.stop(FLEET, "a", grace=0)
        await seen.gone("a")
        last = [o.instance.id for o in seen.history if isinstance(o, Changed)]
        assert "b" in last[-5:]


async def test_the_end_of_the_stream_comes_after_all_that_was_seen(tmp_path: Path) -> None:
    async with ProcessBackend(state_dir=tmp_path) as backend:
        seen = Seen(backend.watch(FLEET))
        await seen.next()
        await backend.create(creation("a"))
    rest = [observation async for observation in seen._watcher]
    assert rest[-1] == Removed("a")


async def test_leaving_drains_all_at_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    ids = [f"i{number}" for number in range(5)]
    agent = shell(  # finishes only when every other one has been told to
        f"trap 'touch {marks}/told.$AGENTFLEET_INSTANCE; "
        f"while [ $(ls {marks} | grep -c told) -lt {len(ids)} ]; do sleep 0.02; done; "
        f"touch {marks}/done.$AGENTFLEET_INSTANCE; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    )
    async with ProcessBackend(state_dir=tmp_path / "state", close_grace=60.0) as backend:
        for id in ids:
            await backend.create(creation(id, agent))
            await written(backend, id, "up")
        pids = [process_of(backend, id) for id in ids]
    assert {path.name for path in marks.glob("done.*")} == {f"done.{id}" for id in ids}
    assert not any(alive(pid) for pid in pids)


async def test_a_cancelled_create_leaves_a_whole_instance_or_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, seen):
        for number in range(20):
            async with anyio.create_task_group() as group:
                group.start_soon(backend.create, creation(f"i{number}"))
                for _ in range(number // 4):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        await backend.create(creation("last"))
        await seen.ready("last")
        await eventually(lambda: all(i.process for i in backend._house.keepers.values()))  # type: ignore[union-attr]
        files = {path.stem for path in (tmp_path / "instances").iterdir()}
        assert backend._house is not None
        assert files == set(backend._house.keepers)
    assert not list((tmp_path / "instances").iterdir())


async def test_a_failing_keeper_ends_the_backend_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: keeper.Keeper) -> bool:
        raise LookupError("a bug")

    def caused(group: BaseExceptionGroup[BaseException]) -> bool:
        return group.subgroup(LookupError) is not None

    async def manage() -> None:
        async with ProcessBackend(state_dir=tmp_path) as backend:
            monkeypatch.setattr(keeper.Keeper, "_turn", broken)
            await backend.create(creation("a"))

    with pytest.raises(BaseExceptionGroup, check=caused):
        await manage()
    monkeypatch.undo()
    async with opened(tmp_path) as (_, seen):
        assert seen.instances == {}
