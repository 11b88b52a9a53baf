"""Importing agentfleet is light, and what modules say they export exists."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import agentfleet

HEAVY = [
    "prometheus_client", "psutil", "tenacity", "trio", "click", "rich", "jsonschema", "hypothesis", "pytest",
    "kubernetes_asyncio", "kubernetes", "aiohttp", "msgspec", "sqlalchemy", "fastapi", "starlette", "uvicorn", "redis",
    "numpy", "pandas", "IPython",
]  # fmt: skip

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(agentfleet.__path__, "agentfleet.")
    if not module.name.endswith(("__main__", ".migrations.env"))  # to import it is to run it
)


def loaded_after(statement: str) -> set[str]:
    """Names of modules loaded by a statement in an interpreter of its own."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_plain_import_is_light() -> None:
    assert not loaded_after("import agentfleet") & set(HEAVY)


@pytest.mark.parametrize("module", ["specs", "events", "stores.jsonl_journal", "configstore", "telemetry", "clock"])
def test_a_part_alone_is_light(module: str) -> None:
    assert not loaded_after(f"import agentfleet.{module}") & set(HEAVY)


def test_a_whole_fleet_is_made_without_what_its_first_use_needs() -> None:
    """What takes long to import is imported when it is needed, and no spec is built before one is made."""
    code = """
from agentfleet import Fleet, FleetSpec, ProcessBackend
assert not FleetSpec.__pydantic_complete__
"""
    assert not loaded_after(code) & {*HEAVY, "yaml", "importlib.metadata"}


def test_the_agents_side_needs_the_standard_library_alone() -> None:
    ours = {"anyio", "pydantic", "yaml", *HEAVY}
    assert not loaded_after("from agentfleet.agent import Agent") & ours


@pytest.mark.parametrize("name", ["agentfleet", *MODULES])
def test_what_a_module_exports_exists(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for public in exported:
        assert getattr(module, public) is not None, public
    assert set(exported) <= set(dir(module))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        agentfleet.no_such_name  # noqa: B018
