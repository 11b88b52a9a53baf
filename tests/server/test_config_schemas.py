"""What operators say that configuration must satisfy: read at the start, and held to by every route and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner
from tests.server.asking import ADMIN
from tests.server.conftest import Serve
from tests.server.world import audited_in

from agentfleet.cli import main
from agentfleet.client import ClusterConfig, FleetClient
from agentfleet.errors import BackendUnavailable, SpecError
from agentfleet.server.schemas import schemas_in
from agentfleet.specs import AgentTemplate
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.sql import SqlAudit

pytestmark = [pytest.mark.anyio, pytest.mark.integration]
BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
TEMPLATE = AgentTemplate(command=["agent"], cpu="250m", memory="512Mi")


def schema(field: str, **said: Any) -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {field: said},
        "required": [field],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Kubernetes mounts a ConfigMap, with names of its own beside."""
    made = tmp_path / "schemas"
    (made / "..2026_01_01").mkdir(parents=True)
    (made / "..data").symlink_to("..2026_01_01")
    (made / "a.json").write_text(json.dumps(schema("temperature", type="number", maximum=2)))
    (made / "default.json").write_text(json.dumps(schema("model", enum=["small", "large"])))
    return made


@BOTH
async def test_the_served_api_takes_what_the_schemas_allow(serve: Serve, database_url: str, folder: Path) -> None:
    served = serve(database_url, config_schemas=str(folder))
    async with FleetClient(served.address, token=ADMIN) as client:
        for name in ("a", "b"):
            made = await client.create(ClusterConfig(cluster_name=name, template=TEMPLATE, min_replicas=1))
            await client.finished(made.operation_id, timeout=60)
        good: dict[str, dict[str, Any]] = {"a": {"temperature": 0.5}, "b": {"model": "small"}}
        bad: dict[str, dict[str, Any]] = {"a": {"temperature": 9}, "b": {"model": "tiny"}}
        for name, field in (("a", "temperature"), ("b", "model")):
            with pytest.raises(SpecError, match=field):
                await client.configuration.publish(name, bad[name], reason="too much")
            check = await client.configuration.check(name, bad[name])
            assert (check.ok, [each.field for each in check.problems]) == (False, [field])
            assert (await client.configuration.check(name, good[name])).ok
            assert (await client.configuration.publish(name, good[name], reason="right")).revision == 1
            with pytest.raises(SpecError, match=field):  # another fleet's schema is not enough
                await client.configuration.publish(name, good["b" if name == "a" else "a"], reason="mixed up")
    assert served.end() == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no JSON"),
        ("a.json", "[]", "must be a JSON object"),
        ("a.json", '{"type": "objekt"}', "not a JSON schema"),
        ("a.yaml", "{}", "NAME.json"),
        ("Not A Name.json", "{}", "NAME.json"),
        ("default.json", "\udcff", "no JSON"),
    ],
)
def test_a_file_that_is_none_is_named_before_anything_is_served(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / "schemas").mkdir()
    file = tmp_path / "schemas" / name
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    command = ["serve", "--backend", "memory", "--database", f"sqlite:///{tmp_path / 'f.db'}", "--port", "0"]
    for options, env in (
        (["--config-schemas", str(file.parent)], {}),
        ([], {"AGENTFLEET_CONFIG_SCHEMAS": str(file.parent)}),
    ):
        answer = CliRunner().invoke(main, [*command, *options], env=env)
        assert answer.exit_code == 1
        assert str(file) in answer.output
        assert message in answer.output
    assert not (tmp_path / "f.db").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere: cannot be read"):
        schemas_in(tmp_path / "nowhere")
    assert schemas_in(tmp_path) == {}, "an optional ConfigMap that is not there is an empty folder"


def run(*words: str) -> tuple[int, str]:
    answer = CliRunner().invoke(main, ["config", *words])
    return answer.exit_code, answer.output


@BOTH
def test_configuration_is_written_out_and_read_in(database_url: str, folder: Path, tmp_path: Path) -> None:
    into, other = ("--database", database_url), ("--database", f"sqlite:///{tmp_path / 'other.db'}")
    kept = {"revision": 7, "at": 1.5, "author": "ann", "reason": "first"}
    documents = {
        "a": kept | {"digest": "", "document": {"temperature": 1}},
        "b": kept | {"digest": "", "document": {"model": "small"}},
    }
    file = tmp_path / "archive.json"
    for each in documents.values():
        written = json.dumps(each["document"], separators=(",", ":"))
        each["digest"] = ConfigRevision("x", 1, written, 0.0, "", "").digest
    file.write_text(json.dumps({"format": "agentfleet-config/1", "documents": documents}))

    asked = ("import", str(file), "--reason", "move", "--config-schemas", str(folder))
    assert run(*into, *asked, "--dry-run") == (0, "a: 1 change\nb: 1 change\n")
    assert run(*into, *asked) == (0, "a: revision 1, 1 change\nb: revision 1, 1 change\n")
    assert run(*into, *asked) == (0, "a: as it is\nb: as it is\n")
    code, text = run(*into, "export")
    assert code == 0
    found = json.loads(text)["documents"]
    assert {name: each["document"] for name, each in found.items()} == {
        "a": {"temperature": 1},
        "b": {"model": "small"},
    }
    assert found["a"]["author"].startswith("cli/")
    assert list(json.loads(run(*into, "export", "--fleet", "b")[1])["documents"]) == ["b"]

    file.write_text(text)
    (folder / "a.json").write_text(json.dumps(schema("temperature", maximum=0)))
    code, said = run(*other, "import", str(file), "--reason", "move", "--config-schemas", str(folder))
    assert (code, "a: temperature" in said) == (1, True)
    assert run(*other, "export") == (0, '{\n  "format": "agentfleet-config/1",\n  "documents": {}\n}\n')
    assert run(*other, "export", "--fleet", "nobody")[0] == 1
    file.write_text(text.replace("small", "large"))
    code, said = run(*other, "import", str(file), "--reason", "move")
    assert (code, "digest differs" in said) == (1, True)
    told = anyio.run(audited_in, database_url)
    assert [(each.method, each.path, each.fleet, each.status, each.detail) for each in told] == [
        ("CLI", "agentfleet config import", "a", 202, "configuration revision 1"),
        ("CLI", "agentfleet config import", "b", 202, "configuration revision 1"),
    ], "what was published, and nothing else"
    assert anyio.run(audited_in, other[1]) == []


def test_what_cannot_be_audited_is_not_read_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into, file = ("--database", f"sqlite:///{tmp_path / 'f.db'}"), tmp_path / "archive.json"
    digest = ConfigRevision("a", 1, "{}", 0.0, "", "").digest
    kept = {"revision": 7, "at": 1.5, "author": "ann", "reason": "first", "digest": digest, "document": {}}
    file.write_text(json.dumps({"format": "agentfleet-config/1", "documents": {"a": kept}}))

    async def down(*_: Any) -> None:
        raise BackendUnavailable("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(SqlAudit, "append", down)
        code, said = run(*into, "import", str(file), "--reason", "move")
    assert (code, "nothing was changed, because it cannot be audited: the database is away" in said) == (1, True)
    assert json.loads(run(*into, "export")[1])["documents"] == {}
    assert run(*into, "import", str(file), "--reason", "move")[0] == 0
