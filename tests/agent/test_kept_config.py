"""The last good configuration on the agent's disk: found whole or not at all, and used when nobody answers."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.agent.helpers import ask, until

from agentfleet.agent import Agent
from agentfleet.agent.kept import KeptConfig
from agentfleet.agent.settings import Settings

pytestmark = pytest.mark.integration


def test_what_was_written_is_read_back_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "kept.json"
    kept = KeptConfig(str(path), "a-1")
    assert kept.read() is None
    assert kept.trouble is None, "that there is none yet is no trouble"
    assert kept.write(7, {"model": "ключ ☃"})
    assert kept.read() == (7, {"model": "ключ ☃"})
    assert KeptConfig(str(path), "a-2").read() is None, "another instance may have had it on trial"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1, "instance": "a-1", "revision": 0, "document": {}}',
        b'{"format": 1, "instance": "a-1", "revision": true, "document": {}}',
        b'{"format": 1, "instance": "a-1", "revision": 3, "document": []}',
        b'{"format": 2, "instance": "a-1", "revision": 3, "document": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_used_is_not(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_bytes(data)
    kept = KeptConfig(str(path), "a-1")
    assert kept.read() is None
    assert kept.write(4, {}), "and it is written over"
    assert kept.read() == (4, {})


def test_where_nothing_can_be_written_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    kept = KeptConfig(str(path), "a-1")
    assert kept.write(1, {})
    blocked = KeptConfig(str(path / "below" / "a" / "file"), "a-1")
    assert not blocked.write(2, {})
    assert blocked.trouble is not None
    assert "cannot be written" in blocked.trouble
    assert kept.read() == (1, {})


def _write_on(path: str) -> None:
    kept = KeptConfig(path, "a-1")
    for revision in range(1, 1_000_000):
        kept.write(revision, {"revision": revision, "filling": "x" * 50_000})


def test_whoever_is_killed_while_it_writes_leaves_it_whole(tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"kept-{attempt}.json"
        writer = multiprocessing.get_context("fork").Process(target=_write_on, args=(str(path),))
        writer.start()
        until(lambda path=path, attempt=attempt: _revision(path) > attempt, "some are written")  # type: ignore[misc]
        end = time.monotonic() + 0.002 * attempt
        while time.monotonic() < end:
            os.sched_yield()
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        writer.close()
        found = KeptConfig(str(path), "a-1").read()
        assert found is not None
        assert found[0] == found[1]["revision"] > attempt


def _revision(path: Path) -> int:
    found = KeptConfig(str(path), "a-1").read() if path.exists() else None
    return 0 if found is None else found[0]


# ------------------------------------------------------------------------------------------------ in an agent


def settings(path: Path, **more: Any) -> Settings:
    """An agent that keeps its configuration, and whose manager is out of reach."""
    given: dict[str, Any] = {"instance": "a-1", "config_file": str(path), "config_patience": 0.05} | more
    return Settings(port=0, linger=0, **given)


async def running(agent: Agent, revision: int) -> None:
    async with asyncio.timeout(20):
        while agent.config_revision != revision:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "more", [{}, {"config_url": "http://127.0.0.1:1/api/v1/clusters/a"}], ids=["pushed", "fetched"]
)
def test_an_agent_begins_with_what_it_has_accepted_last(more: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    seen: list[Mapping[str, Any]] = []

    async def test() -> None:
        for turn in range(2):
            agent = Agent(lambda _task, _agent: 1, settings=settings(path, **more))
            agent.on_config(seen.append)
            async with agent:
                if turn == 0:
                    told = {"revision": 7, "document": {"model": "large"}}
                    assert (await asyncio.to_thread(ask, agent.address, "PUT", "/config", told)).status == 200
                    assert json.loads(path.read_text())["revision"] == 7, "kept before it was acknowledged"
                else:
                    await running(agent, 7)
                    assert dict(agent.config) == {"model": "large"}
                    older = {"revision": 6, "document": {}}
                    assert (await asyncio.to_thread(ask, agent.address, "PUT", "/config", older)).status == 409
        assert [dict(each) for each in seen] == [{"model": "large"}] * 2, "on_config judges what was kept, too"

    asyncio.run(test())


def test_what_it_kept_and_refuses_now_is_not_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "kept.json", tmp_path / "stderr"
    # a file, because what pytest captures is lost if the agent's thread says it between the reading and the truncating
    stderr = said.open("w")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert KeptConfig(str(path), "a-1").write(7, {"model": "old"})

    async def test() -> None:
        agent = Agent(lambda _task, _agent: 1, settings=settings(path))
        judged = asyncio.Event()

        @agent.on_config
        def judge(document: Mapping[str, Any]) -> None:
            judged.set()
            raise ValueError("this model is gone")

        async with agent:
            await judged.wait()
            await asyncio.to_thread(until, lambda: "revision 7, is refused" in said.read_text(), "said")
            assert agent.config_revision == 0

    with stderr:
        asyncio.run(test())


def test_where_it_cannot_be_kept_it_is_in_force_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    async def test() -> None:
        agent = Agent(lambda _task, _agent: 1, settings=settings(tmp_path / "file" / "kept.json"))
        async with agent:
            told = {"revision": 1, "document": {"model": "large"}}
            assert (await asyncio.to_thread(ask, agent.address, "PUT", "/config", told)).status == 200
            assert dict(agent.config) == {"model": "large"}
        assert "cannot be written" in capfd.readouterr().err

    asyncio.run(test())


def test_one_path_serves_all_instances_of_a_template() -> None:
    env = {"AGENTFLEET_INSTANCE": "a-1", "AGENTFLEET_CONFIG_FILE": "/var/lib/agents/{instance}.json"}
    assert Settings.from_env(env).config_file == "/var/lib/agents/a-1.json"
    assert Settings.from_env({}).config_file is None
