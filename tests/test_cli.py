"""The command: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_schema_is_a_json_schema() -> None:
    """`schema` prints what `FleetSpec` publishes."""
    answer = CliRunner().invoke(main, ["schema"])
    assert json.loads(answer.output) == json.loads(json.dumps(FleetSpec.model_json_schema()))
