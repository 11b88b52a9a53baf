"""An agent as a process: signals, drain, a blocked event loop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.agent.helpers import Later, running, until

pytestmark = pytest.mark.integration
EXAMPLE = Path(__file__).parents[2] / "examples" / "echo_agent.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_agent_ends_cleanly(number: signal.Signals) -> None:
    with running(EXAMPLE) as agent:
        assert agent.ask("GET", "/ready").status == 200
        assert agent.task("a", {"x": [1, None]}).json == {
            "id": "a",
            "ok": True,
            "attempt": 1,
            "result": {"x": [1, None]},
        }
        agent.process.send_signal(number)
        assert agent.wait() == 0


def test_a_task_in_flight_finishes_before_the_exit(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running(RUN_LOG=str(tmp_path / "log")) as agent:
        first = Later(lambda: agent.task("slow", {"wait": str(gate)}))
        until(lambda: agent.status()["state"] == "busy", "busy")
        agent.process.terminate()
        until(lambda: agent.ask("GET", "/ready").status == 503, "not ready any more")
        assert agent.ask("GET", "/health").status == 200
        assert agent.status()["state"] == "draining"
        refused = agent.task("new", None)
        assert refused.status == 503
        assert refused.json == {"error": "draining"}
        assert "retry-after" in refused.headers
        joined = Later(lambda: agent.task("slow", {"wait": str(gate)}))
        waiting = b"agentfleet_agent_requests_waiting 2.0"
        until(lambda: waiting in agent.ask("GET", "/metrics").body, "the second request has joined")
        agent.process.terminate()  # a repeated stop changes nothing
        gate.touch()
        assert first.result().json["ok"] is True
        assert joined.result().json == first.result().json
        assert agent.wait() == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_the_drain_has_a_deadline(tmp_path: Path) -> None:
    with running(AGENTFLEET_DRAIN="0.2") as agent:
        waiting = Later(lambda: agent.task("endless", {"wait": str(tmp_path / "never")}))
        until(lambda: agent.status()["state"] == "busy", "busy")
        agent.process.terminate()
        assert waiting.result().status == 503
        assert agent.wait() == 1
    assert "1 unfinished task(s): endless" in agent.stderr


def test_a_second_interrupt_ends_the_drain(tmp_path: Path) -> None:
    with running() as agent:
        waiting = Later(lambda: agent.task("endless", {"wait": str(tmp_path / "never")}))
        until(lambda: agent.status()["state"] == "busy", "busy")
        agent.process.send_signal(signal.SIGINT)
        until(lambda: agent.status()["state"] == "draining", "draining")
        agent.process.send_signal(signal.SIGINT)
        assert agent.wait() == 1
        assert waiting.result().status == 503


def test_a_blocked_event_loop_shows_but_does_not_fail_the_probes(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running() as agent:
        blocked = Later(lambda: agent.task("blocked", {"block": str(gate)}))
        until(lambda: agent.status()["loop_lag"] > 0.2, "the lag shows")
        assert agent.ask("GET", "/health").status == 200
        status = agent.status()
        assert status["task"] == "blocked"
        assert status["last_progress"] > 0.2
        agent.process.terminate()
        until(lambda: agent.status()["state"] == "draining", "the drain begins although the loop is blocked")
        gate.touch()
        assert blocked.result().json["ok"] is True
        assert agent.wait() == 0


def test_a_loop_that_stays_blocked_is_ended_by_force(tmp_path: Path) -> None:
    with running(AGENTFLEET_DRAIN="0.1") as agent:
        blocked = Later(lambda: agent.task("blocked", {"block": str(tmp_path / "never")}))
        until(lambda: agent.status()["state"] == "busy", "busy")
        agent.process.terminate()
        assert agent.wait() == 1
        assert blocked.result().status == 503
    assert "unfinished task(s): blocked" in agent.stderr


def test_a_result_that_nobody_fetched_is_delivered_before_the_exit(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running(AGENTFLEET_LINGER="60", AGENTFLEET_DRAIN="60", RUN_LOG=str(tmp_path / "log")) as agent:
        host, port = agent.address.rsplit(":", 1)
        body = f'{{"id":"orphan","payload":{{"wait":"{gate}"}}}}'
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"POST /tasks HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: agent.status()["state"] == "busy", "busy")
        agent.process.terminate()
        until(lambda: agent.status()["state"] == "draining", "draining")
        gate.touch()
        until(lambda: agent.status()["completed"] == 1, "done")
        assert agent.process.poll() is None, "it waits for who sent the task"
        assert agent.task("orphan", None, resume=True).json["ok"] is True
        assert agent.wait() == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_importing_the_agent_needs_the_standard_library_only() -> None:
    code = (
        "import sys, agentfleet.agent\n"
        "outside = {n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - {'agentfleet', '__main__'}\n"
        "heavy = {'http', 'email', 'urllib', 'pathlib', 'xml', 'sqlite3', 'multiprocessing'} & set(sys.modules)\n"
        "print(sorted(n for n in outside if not n.startswith('_')), sorted(heavy))"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n" + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert out.stdout.strip() == "[] []"


def test_nonsense_in_the_environment_is_named() -> None:
    out = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env={"AGENTFLEET_PORT": "eighty"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert out.returncode == 1
    assert "AGENTFLEET_PORT is 'eighty'" in out.stderr
