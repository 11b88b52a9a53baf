"""What configuration must satisfy, from a folder that an operator mounts: `<fleet>.json` and `default.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentfleet.configchecks import Checks
from agentfleet.configstore import ConfigStore
from agentfleet.errors import SpecError
from agentfleet.specbase import is_name

OTHERS = "default"
"""Name of the file that is for all fleets without one of their own."""

Schemas = Mapping[str | None, Mapping[str, Any]]
"""JSON schemas by the fleet's name; that under None is for all others."""


def schemas_in(folder: Path) -> Schemas:
    """Read all schemas of a folder.

    Names that begin with a dot are left out: Kubernetes keeps such ones where it mounts a ConfigMap.

    Raises:
        SpecError: The folder or a file cannot be read, or is not what it should be; the message names it.
        MissingExtra: `agentfleet[jsonschema]` is not installed.
    """
    try:
        files = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise SpecError(f"config schemas {folder}: cannot be read: {error}") from error
    return {_key(each): _schema(each) for each in files}


def register(store: ConfigStore, schemas: Schemas) -> None:
    """Have a store hold documents to them."""
    for key, schema in schemas.items():
        if key is None:
            store.register_others(schema)
        else:
            store.register(key, schema=schema)


def _key(file: Path) -> str | None:
    if file.suffix != ".json" or not is_name(file.stem):
        raise SpecError(f"config schema {file}: must be named after a fleet, NAME.json, or be {OTHERS}.json")
    return None if file.stem == OTHERS else file.stem


def _schema(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"config schema {file}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"config schema {file}: is no JSON: {str(error)[:300]}") from error
    if not isinstance(found, dict):
        raise SpecError(f"config schema {file}: must be a JSON object")
    try:
        Checks(found)
    except SpecError as error:
        raise SpecError(f"config schema {file}: {error}") from error
    return found
