"""The command: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from agentfleet import AgentTemplate, FleetSpec
from agentfleet.cli import main

SPEC = FleetSpec(name="researchers", template=AgentTemplate(command=["python", "-m", "my_agent"]))


def test_check_prints_the_whole_spec(tmp_path: Path) -> None:
    """What `check` prints is the same spec, in YAML and from JSON alike."""
    for name, text in (("spec.yaml", SPEC.to_yaml()), ("spec.json", SPEC.to_json())):
        file = tmp_path / name
        file.write_text(text)
        answer = CliRunner().invoke(main, ["check", str(file)])
        assert answer.exit_code == 0
        assert FleetSpec.from_yaml(answer.output) == SPEC


def test_check_names_the_field_and_the_fix(tmp_path: Path) -> None:
    """A wrong spec ends with an error, not with a traceback."""
    file = tmp_path / "spec.yaml"
    file.write_text("name: researchers\ntemplate: {command: [a], cpuu: 1}\n")
    answer = CliRunner().invoke(main, ["check", str(file)])
    assert answer.exit_code == 1
    assert "did you mean 'cpu'?" in answer.output


@pytest.mark.parametrize("command", ["check", "render"])
def test_a_size_of_a_billion_is_refused_by_name(tmp_path: Path, command: str) -> None:
    """Before anything is made of it."""
    file = tmp_path / "spec.yaml"
    file.write_text("name: researchers\ntemplate: {command: [a]}\nreplicas: 1000000000\n")
    answer = CliRunner().invoke(main, [command, str(file)])
    assert answer.exit_code == 1
    assert "replicas: Input should be less than or equal to 1000000" in answer.output


def test_schema_is_a_json_schema() -> None:
    """`schema` prints what `FleetSpec` publishes."""
    answer = CliRunner().invoke(main, ["schema"])
    assert json.loads(answer.output) == json.loads(json.dumps(FleetSpec.model_json_schema()))


def test_migrate_takes_a_database_forward_and_back(tmp_path: Path) -> None:
    """And says what is wrong with what it cannot do."""
    pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path / 'fleet.db'}"

    def run(*arguments: str, url: str = address) -> tuple[int, str]:
        answer = CliRunner(env={"AGENTFLEET_DATABASE": url}).invoke(main, ["migrate", *arguments])
        return answer.exit_code, answer.output

    def tables() -> int:
        with closing(sqlite3.connect(tmp_path / "fleet.db")) as connection:
            (count,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
        return int(count)

    assert run() == (0, "")
    newest = tables()
    code, said = run("--to", "0001")
    assert (code, "drops what later tables hold" in said) == (1, True)
    assert tables() == newest, "nobody has said yes"
    assert run("--to", "0001", "--yes") == (0, "")
    assert 1 < tables() < newest
    assert "DROPS" in CliRunner().invoke(main, ["migrate", "--help"]).output
    assert run("--to", "head") == (0, "")
    assert tables() == newest
    assert "there is no migration '7'" in run("--to", "7", "--yes")[1]
    assert "databases of the kind 'mysql' are not supported" in run(url="mysql://host/name")[1]
    code, said = run(url=f"sqlite:///{tmp_path}/missing/fleet.db")
    assert (code, "unable to open database file" in said) == (1, True)
