"""This machine's own settings of pip, for a pip that runs in another root: as variables, and the files they name.

Nothing of them is written into the root, and none is written down in this repository.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_PLACE = "/run/pip"


@dataclass(frozen=True, slots=True)
class PipSettings:
    """Variables for pip, and what it must be shown for them: places inside, and their files and folders outside."""

    variables: dict[str, str]
    mounts: dict[str, Path]


def found() -> PipSettings:
    """The settings that hold for the Python that runs the tests, and a cache that outlives the root."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # those of the environment come first, and hold
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", ":env:") and value:
            settings.setdefault(f"PIP_{option.upper().replace('-', '_')}", str(ast.literal_eval(value)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentfleet" / "pip"
    cache.mkdir(parents=True, exist_ok=True)
    settings["PIP_CACHE_DIR"] = str(cache)
    mounts: dict[str, Path] = {}
    variables = {name: " ".join(_shown(word, mounts) for word in value.split()) for name, value in settings.items()}
    return PipSettings(variables, mounts)


def _shown(word: str, mounts: dict[str, Path]) -> str:
    """A word of a setting as it reads inside; whatever it names is mounted.

    An index in a folder refers to files beside it: the folder above is what must be seen.
    """
    url = urlsplit(word)
    path = Path(url.path if url.scheme == "file" else word)
    if not (path.is_absolute() and path.exists()):
        return word
    outside = path.parent if url.scheme == "file" else path
    inside = f"{_PLACE}/{len(mounts)}"
    mounts[inside] = outside
    return f"file://{inside}/{path.name}" if url.scheme == "file" else inside
