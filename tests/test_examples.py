"""Every example runs to its end, says what it promises, and leaves nothing behind; so does the notebook."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE = 60.0  # seconds; each takes a few, on a machine that has nothing else to do

SAYS = {
    "quickstart": ("fleet echoes: 3 of 3 healthy, version 1.4.0", "rollout.completed", "version 1.5.0"),
    "scale_on_queue": ("24 -> 30", "30 ->  2", "60 min  backlog   4   2 instances"),
    "autoscaler_alone": ("4 -> 8", "scaling.stabilization", "the metrics server does not answer"),
    "health_monitor_alone": ("suspect   -> unhealthy", "unhealthy -> healthy", "2 instances, "),
    "config_store_alone": ("temperature: Input should be", "is at revision 2, not 1", "equal content: True"),
    "dispatch_tasks": ("60 tasks done by 3 agents, 0 open", "task-7 again: {'number': 7}"),
    "rolling_upgrade": ("revision 2 is rolled out", "revision 3 could not be rolled out", "{'2.0.0': 40}"),
    "fleet_tests": ("5 passed",),
    "two_managers": ("asked twice, it is one operation: True", "it succeeded: version 2.0, 4 of 4 good"),
    "rest_server": (
        "created: creating then succeeded",
        "asked twice, it is one operation: True",
        "event: rollout.completed 1.1",
        "audited: 6 changes, the last by token/ops",
        "refused: PUT /api/v1/clusters/researchers/scale: this needs the scope operate, and token/wall has read",
    ),
    "config_in_rings": (
        "large: config.rolled_out",
        "poison: config.halted  1 of 1 instances turned sick",
        "revision 4 by agentfleet restores 2: {'model': 'large'}",
        "how many run which: {'4': 4}",
    ),
    "week_of_fleet_life": ("instance.recovered", "availability "),
}

RUN_NOTEBOOK = """
import ast, asyncio, json, sys

async def main():
    names, shown = {}, []
    for cell in json.load(open(sys.argv[1]))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        async def run():
            for part in filter(None, (tree, last)):
                mode = "eval" if part is last else "exec"
                value = eval(compile(part, "cell", mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
                value = await value if asyncio.iscoroutine(value) else value
            return value if last else None
        value = await asyncio.create_task(run())  # a task for each cell, as in Jupyter
        print(getattr(value, "_repr_html_", value.__repr__)())

asyncio.run(main())
"""


def run(*command: str, folder: Path) -> str:
    """Run a program to its end; what it printed. Kills whatever it leaves behind, and fails if there was any."""
    mark = f"{os.getpid()}/{folder}"
    program = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "FLEET_TEST_RUN": mark, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = program.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        output, _ = program.communicate()
        pytest.fail(f"not over within {DEADLINE:g} s:\n{output}")
    finally:
        left = _marked(mark)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)
    assert program.returncode == 0, output
    assert not left, f"processes left behind: {left}"
    return output


def _marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited the mark, wherever they went."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLEET_TEST_RUN") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # another's, or gone by now
    return found


def test_every_example_is_run() -> None:
    known = {*SAYS, "echo_agent"}  # the last is the agent of the others
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= known, "add the new example to SAYS"


@pytest.mark.integration
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    output = run(str(EXAMPLES / f"{name}.py"), folder=tmp_path)
    for expected in SAYS[name]:
        assert expected in output, output


def test_the_notebook_is_valid() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", id) for id in ids)
    for cell in notebook["cells"]:
        wanted = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, []), "commit it without output"
        assert set(cell) == wanted
        assert all(isinstance(line, str) for line in cell["source"])


@pytest.mark.integration
def test_notebook(tmp_path: Path) -> None:
    (tmp_path / "echo_agent.py").symlink_to(EXAMPLES / "echo_agent.py")
    output = run("-c", RUN_NOTEBOOK, str(EXAMPLES / "quickstart.ipynb"), folder=tmp_path)
    assert "<caption>fleet notebook: 3 of 3 healthy, version 1.0.0</caption>" in output
    assert "task-4 4 notebook-" in output
    assert "version 1.1.0</caption>" in output
    assert output.count("rollout.completed") == 2
