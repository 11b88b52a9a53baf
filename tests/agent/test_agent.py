"""The agent inside an event loop: tasks, joining, limits, configuration, probes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import pytest
from tests.agent.helpers import DEADLINE, Reply, ask

from agentfleet.agent import Agent, Settings, Task
from agentfleet.agent.ledger import KEPT, KEPT_BYTES, Ledger, Outcome, Refused, Run
from agentfleet.errors import DeadlineExceeded, OperationRefused, SpecError

pytestmark = pytest.mark.integration
LOCAL = Settings(port=0, linger=0.0)


async def call(agent: Agent, method: str, path: str, data: object = None, **more: Any) -> Reply:
    return await asyncio.to_thread(partial(ask, agent.address, method, path, data, **more))


async def task(agent: Agent, id: str, payload: object = None, **more: object) -> Reply:
    return await call(agent, "POST", "/tasks", {"id": id, "payload": payload, **more})


async def status(agent: Agent) -> dict[str, Any]:
    found: dict[str, Any] = (await call(agent, "GET", "/status")).json
    return found


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(bounded())


class Gate:
    """Work that waits until it is let through; counts its runs."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = asyncio.Event()
        self.runs: list[str] = []

    async def __call__(self, task: Task, agent: Agent) -> object:
        self.runs.append(task.id)
        self.entered.set()
        await self.open.wait()
        return task.payload


def test_probes_tell_what_happens() -> None:
    async def test() -> None:
        gate = Gate()
        async with Agent(gate, settings=Settings(port=0, linger=0.0, version="7")) as agent:
            before = await status(agent)
            assert before.items() >= {"state": "idle", "in_flight": 0, "completed": 0, "version": "7"}.items()
            sent = asyncio.create_task(task(agent, "t-1", {"a": [1]}))
            await gate.entered.wait()
            agent.progress("half way")
            agent.gauge("tokens_total", 12)
            busy = await status(agent)
            assert busy.items() >= {"state": "busy", "in_flight": 1, "task": "t-1", "step": "half way"}.items()
            metrics = (await call(agent, "GET", "/metrics")).body.decode()
            assert "\nagentfleet_agent_tasks_in_flight 1.0\n" in metrics
            assert "\ntokens_total 12.0\n" in metrics
            assert 'agentfleet_agent_info{version="7"} 1' in metrics
            gate.open.set()
            reply = await sent
            assert reply.json == {"id": "t-1", "ok": True, "attempt": 1, "result": {"a": [1]}}
            assert (await status(agent)).items() >= {"state": "idle", "completed": 1, "failed": 0}.items()

    run(test)


def test_an_agent_may_declare_itself_unhealthy() -> None:
    async def test() -> None:
        async with Agent(Gate(), settings=LOCAL) as agent:
            assert (await call(agent, "GET", "/health")).status == 200
            agent.unhealthy("the model provider refuses our key")
            for path in ("/health", "/ready"):
                sick = await call(agent, "GET", path)
                assert (sick.status, sick.json["error"]) == (503, "the model provider refuses our key")
            assert (await status(agent))["cause"] == "the model provider refuses our key"
            agent.healthy()
            assert (await call(agent, "GET", "/ready")).status == 200

    run(test)


async def _raises(task: Task, agent: Agent) -> None:
    match task.payload:
        case "fail":
            agent.fail("provider:acme:529", "overloaded")
        case "group":
            async with asyncio.TaskGroup():
                agent.fail("grouped")
        case "key":
            raise KeyError("x")
        case "cancel":
            raise asyncio.CancelledError
        case "self-cancel":
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
            await asyncio.Event().wait()
        case "unprintable":
            raise _Unprintable


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("fail", "provider:acme:529"),
        ("group", "grouped"),
        ("key", "KeyError"),
        ("cancel", "cancelled"),
        ("self-cancel", "cancelled"),
        ("unprintable", f"{__name__}._Unprintable"),
    ],
)
def test_a_failed_task_names_its_cause(how: str, cause: str) -> None:
    async def test() -> None:
        async with Agent(_raises, settings=LOCAL) as agent:
            reply = await task(agent, "t", how)
            assert reply.status == 200
            assert reply.json.items() >= {"ok": False, "cause": cause}.items()
            assert (await status(agent)).items() >= {"failed": 1, "cause": cause, "in_flight": 0}.items()
            await task(agent, "u", "well")
            assert (await status(agent)).items() >= {"completed": 1, "cause": None}.items()

    run(test)


@pytest.mark.parametrize(
    ("result", "cause"),
    [(object(), "result-not-json"), (float("nan"), "result-not-json"), ("x" * 2000, "result-too-large")],
)
def test_a_result_must_be_json_and_fit(result: object, cause: str) -> None:
    async def test() -> None:
        async with Agent(lambda _task, _agent: result, settings=Settings(port=0, linger=0, max_body=1000)) as agent:
            assert (await task(agent, "t")).json["cause"] == cause

    run(test)


def test_a_sync_function_runs_in_a_thread_of_its_own() -> None:
    def work(task: Task, agent: Agent) -> object:
        if task.payload == "stop":
            raise StopIteration
        agent.progress()
        return threading.current_thread() is not threading.main_thread()

    async def test() -> None:
        async with Agent(work, settings=LOCAL) as agent:
            assert (await task(agent, "t")).json["result"] is True
            assert (await task(agent, "u", "stop")).json["ok"] is False

    run(test)


def test_what_is_beyond_the_limits_is_told_to_come_back() -> None:
    async def test() -> None:
        gate = Gate()
        async with Agent(gate, queue=1, settings=LOCAL) as agent:
            first = asyncio.create_task(task(agent, "1"))
            await gate.entered.wait()
            second = asyncio.create_task(task(agent, "2"))
            while (await status(agent))["queue_length"] != 1:
                assert not second.done()
            third = await task(agent, "3")
            assert (third.status, third.headers["retry-after"]) == (429, "1")
            gate.open.set()
            assert [(await sent).status for sent in (first, second)] == [200, 200]
            assert gate.runs == ["1", "2"]

    run(test)


def test_a_task_is_joined_while_it_runs_and_kept_when_done() -> None:
    async def test() -> None:
        gate = Gate()
        async with Agent(gate, settings=LOCAL) as agent:
            sent = [asyncio.create_task(task(agent, "same", 5)) for _ in range(4)]
            await gate.entered.wait()
            gate.open.set()
            assert len({(await each).body for each in sent}) == 1
            assert (await task(agent, "same", 5, attempt=3)).json["attempt"] == 1
            assert gate.runs == ["same"]

    run(test)


def test_a_failed_task_runs_again_as_a_further_attempt_only() -> None:
    attempts: list[int] = []

    async def work(task: Task, agent: Agent) -> None:
        attempts.append(task.attempt)
        agent.fail("no")

    async def test() -> None:
        async with Agent(work, settings=LOCAL) as agent:
            for attempt in (1, 1, 2, 1, 2):
                await task(agent, "t", attempt=attempt)
            assert attempts == [1, 2]

    run(test)


def test_only_so_many_results_are_kept() -> None:
    async def test() -> None:
        started: list[Run] = []
        ledger = Ledger(asyncio.get_running_loop(), 1, 0, started.append)
        for number in range(KEPT + 1):
            ran = ledger.submit(Task(str(number), None))
            assert isinstance(ran, Run)
            ledger.finish(ran, Outcome(ok=True, body=b"x"))
        assert ledger.submit(Task("1", None), resume=True) is started[1]
        assert ledger.submit(Task("0", None), resume=True) is Refused.UNKNOWN
        large = ledger.submit(Task("large", None))
        assert isinstance(large, Run)
        ledger.finish(large, Outcome(ok=True, body=b"x" * KEPT_BYTES))
        assert ledger.submit(Task("1", None), resume=True) is Refused.UNKNOWN
        assert ledger.submit(Task("large", None), resume=True) is large
        ledger.delivered(large)
        await ledger.fetched()  # what was dropped is waited for no longer

    run(test)


def test_resuming_never_begins_a_task() -> None:
    async def test() -> None:
        gate = Gate()
        async with Agent(gate, settings=LOCAL) as agent:
            assert (await task(agent, "t", resume=True)).status == 404
            assert gate.runs == []

    run(test)


def test_a_client_that_leaves_does_not_stop_its_task() -> None:
    async def test() -> None:
        gate = Gate()
        async with Agent(gate, settings=LOCAL) as agent:
            host, port = agent.address.rsplit(":", 1)
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b'POST /tasks HTTP/1.1\r\nContent-Length: 22\r\n\r\n{"id":"t","payload":1}')
            await gate.entered.wait()
            writer.close()
            await writer.wait_closed()
            gate.open.set()
            assert (await task(agent, "t", 1)).json["result"] == 1
            assert gate.runs == ["t"]

    run(test)


def test_work_and_configuration_need_the_token_and_probes_do_not() -> None:
    async def test() -> None:
        async with Agent(lambda _task, _agent: 1, settings=Settings(port=0, linger=0, token="sesame")) as agent:
            body = {"id": "t"}
            for token in (None, "", "sesam", "sesame2", "sésame"):
                headers = {} if token is None else {"Authorization": f"Bearer {token}".encode().decode("latin-1")}
                assert (await call(agent, "POST", "/tasks", body, **headers)).status == 401
                assert (await call(agent, "GET", "/config", **headers)).status == 401
                assert (await call(agent, "PUT", "/config", {}, **headers)).status == 401
            assert (await call(agent, "POST", "/tasks", body, token="sesame")).status == 200
            assert [
                (await call(agent, "GET", path)).status for path in ("/health", "/ready", "/metrics", "/status")
            ] == [200] * 4

    run(test)


def test_web_pages_may_not_give_work() -> None:
    async def test() -> None:
        async with Agent(lambda _task, _agent: 1, settings=LOCAL) as agent:
            assert (await call(agent, "POST", "/tasks", {"id": "t"}, Origin="http://evil.example")).status == 403

    run(test)


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/tasks", None, 405),
        ("POST", "/health", b"", 405),
        ("BREW", "/health", None, 405),
        ("POST", "/tasks", b"{", 422),
        ("POST", "/tasks", b"[]", 422),
        ("POST", "/tasks", b"[" * 900, 422),
        ("POST", "/tasks", b'{"id":""}', 422),
        ("POST", "/tasks", b'{"id":"a\\nb"}', 422),
        ("POST", "/tasks", b'{"id":"a","payload":NaN}', 422),
        ("POST", "/tasks", b'{"id":"a","attempt":true}', 422),
        ("POST", "/tasks", b'{"id":"a","resume":1}', 422),
        ("POST", "/tasks", b" " * 1001, 413),
        ("PUT", "/config", b'{"revision":0,"document":{}}', 422),
        ("PUT", "/config", b'{"revision":1,"document":[]}', 422),
    ],
)
def test_requests_that_make_no_sense_are_refused(method: str, path: str, body: bytes | None, expected: int) -> None:
    async def test() -> None:
        async with Agent(lambda _task, _agent: 1, settings=Settings(port=0, linger=0, max_body=1000)) as agent:
            reply = await call(agent, method, path, body)
            assert reply.status == expected
            assert reply.json["error"]

    run(test)


# ------------------------------------------------------------------------------------------------ configuration


async def push(agent: Agent, revision: int, document: object) -> Reply:
    return await call(agent, "PUT", "/config", {"revision": revision, "document": document})


def test_configuration_is_taken_over_live() -> None:
    async def test() -> None:
        agent = Agent(lambda _task, _agent: 1, settings=LOCAL)
        seen: list[Mapping[str, Any]] = []

        @agent.on_config
        async def accept(document: Mapping[str, Any]) -> None:
            await asyncio.sleep(0)
            if document.get("model") == "bad":
                raise ValueError("no such model")
            seen.append(document)

        async with agent:
            assert (agent.config_revision, dict(agent.config)) == (0, {})
            accepted = await push(agent, 2, {"model": "a"})
            assert (accepted.status, accepted.json) == (200, {"revision": 2})
            assert (agent.config_revision, dict(agent.config)) == (2, {"model": "a"})
            with pytest.raises(TypeError):
                agent.config["model"] = "b"  # type: ignore[index]
            assert (await push(agent, 2, {"model": "a"})).status == 200, "a repeated push is harmless"
            assert (await push(agent, 2, {"model": "other"})).status == 409
            assert (await push(agent, 1, {"model": "older"})).status == 409
            refused = await push(agent, 3, {"model": "bad"})
            assert refused.status == 422
            assert refused.json == {"error": "ValueError: no such model", "revision": 2}
            assert (await call(agent, "GET", "/config")).json == {"revision": 2, "document": {"model": "a"}}
            assert (await status(agent))["config_revision"] == 2
            assert len(seen) == 1

    run(test)


def test_a_callback_that_does_not_return_changes_nothing() -> None:
    async def test() -> None:
        agent = Agent(lambda _task, _agent: 1, settings=Settings(port=0, linger=0, config_timeout=0.05))
        cancelled = asyncio.Event()

        @agent.on_config
        async def never(document: Mapping[str, Any]) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with agent:
            assert (await push(agent, 1, {})).status == 504
            await cancelled.wait()
            assert agent.config_revision == 0

    run(test)


# ------------------------------------------------------------------------------------------------ life


def test_leaving_waits_for_tasks_up_to_the_deadline() -> None:
    async def test() -> None:
        gate = Gate()
        with pytest.raises(DeadlineExceeded, match="endless"):
            async with Agent(gate, settings=Settings(port=0, linger=0, drain=0.05)) as agent:
                sent = asyncio.create_task(task(agent, "endless"))
                await gate.entered.wait()
        assert (await sent).status == 503
        assert not [each for each in threading.enumerate() if each.name == "agentfleet-agent"]

    run(test)


def test_an_error_inside_leaves_at_once_and_passes_as_it_is() -> None:
    async def test() -> None:
        gate = Gate()
        with pytest.raises(KeyError):
            async with Agent(gate, settings=Settings(port=0, drain=3600)) as agent:
                sent = asyncio.create_task(task(agent, "endless"))
                await gate.entered.wait()
                raise KeyError
        assert (await sent).status == 503

    run(test)


def test_an_agent_is_for_one_run_at_an_address_of_its_own() -> None:
    async def test() -> None:
        async with Agent(Gate(), settings=LOCAL) as agent:
            with pytest.raises(OperationRefused, match="one run"):
                await agent.__aenter__()
            taken = Settings(port=int(agent.address.rsplit(":", 1)[1]))
            with pytest.raises(OperationRefused, match="cannot listen"):
                await Agent(Gate(), settings=taken).__aenter__()
        with pytest.raises(OperationRefused, match="not run yet"):
            _ = Agent(Gate()).address

    run(test)


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_env({}) == Settings()
    env = {"PORT": "9", "AGENTFLEET_HOST": "::1", "AGENTFLEET_DRAIN": "1.5", "AGENTFLEET_TOKEN": "t"}
    assert Settings.from_env(env) == Settings(host="::1", port=9, drain=1.5, token="t")
    assert Settings.from_env(env | {"AGENTFLEET_PORT": "10"}).port == 10
    for name, value in [("PORT", "65536"), ("PORT", "1.5"), ("AGENTFLEET_DRAIN", "-1"), ("AGENTFLEET_LINGER", "nan")]:
        with pytest.raises(SpecError, match=name):
            Settings.from_env({name: value})


@pytest.mark.parametrize("limits", [{"concurrency": 0}, {"queue": -1}])
def test_limits_must_make_sense(limits: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        Agent(Gate(), **limits)  # type: ignore[arg-type]
