"""Reads kubeconfig files: several are merged as kubectl does, and paths are relative to the file that names them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentfleet.errors import SpecError

__all__ = ["Settings", "load_settings"]

_HOME = " folder"
"""Key under which each entry remembers the folder of its file; no kubeconfig has a key with a space."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One context and what it points to."""

    context: str
    namespace: str
    cluster: Mapping[str, object]
    user: Mapping[str, object]
    source: Mapping[str, object]
    """The merged kubeconfig."""

    @staticmethod
    def folder_of(entry: Mapping[str, object]) -> Path:
        """The folder that relative paths in the entry start from."""
        return Path(str(entry[_HOME])) if _HOME in entry else Path()


def load_settings(paths: str, context: str | None) -> Settings:
    """Read the files and look up a context.

    Args:
        paths: One file or several, joined as in $KUBECONFIG; those that do not exist are left out, as kubectl does.
        context: Its name; the current one for None.

    Raises:
        SpecError: No file exists, one cannot be read, or the context is not there.
    """
    merged: dict[str, dict[str, dict[str, object]]] = {"clusters": {}, "contexts": {}, "users": {}}
    current = ""
    found = False
    for each in paths.split(os.pathsep):
        path = Path(each).expanduser()
        if not each or not path.exists():
            continue
        found = True
        content = _load(path)
        current = current or str(content.get("current-context") or "")
        for kind, entries in merged.items():
            for name, entry in _entries(content, kind, path):
                entries.setdefault(name, {**entry, _HOME: str(path.parent.absolute())})
    if not found:
        raise SpecError(f"no kubeconfig at {paths}; give its path, or set KUBECONFIG")
    name = context or current
    chosen = merged["contexts"].get(name)
    if chosen is None:
        known = ", ".join(sorted(merged["contexts"])) or "none"
        raise SpecError(f"{paths}: there is no context {name!r}; there are: {known}")
    cluster = merged["clusters"].get(str(chosen.get("cluster")))
    if cluster is None:
        raise SpecError(f"{paths}: context {name!r} names the cluster {chosen.get('cluster')!r}, which is not there")
    user = merged["users"].get(str(chosen.get("user", "")), {})
    namespace = str(chosen.get("namespace") or "default")
    return Settings(name, namespace, cluster, user, {"current-context": name, **merged})


def _load(path: Path) -> Mapping[str, object]:
    import yaml  # noqa: PLC0415 - only kubeconfigs need it here

    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} is no kubeconfig")
    return content


def _entries(content: Mapping[str, object], kind: str, path: Path) -> list[tuple[str, dict[str, object]]]:
    listed = content.get(kind) or []
    inner = kind.removesuffix("s")
    try:
        assert isinstance(listed, list)
        return [(str(each["name"]), dict(each.get(inner) or {})) for each in listed]
    except (AssertionError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path}: {kind} must be a list of entries with a name and a {inner}") from error
