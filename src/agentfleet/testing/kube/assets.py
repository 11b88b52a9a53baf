"""Finding etcd, kube-apiserver, kube-controller-manager and kube-scheduler on this machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from agentfleet.testing.kube.errors import AssetsMissing, PlaneFailed

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
CACHED = "agentfleet/kube-1.20.2"


def find_assets() -> Path:
    """The directory that holds the four programs.

    It is `KUBEBUILDER_ASSETS` if that is set, else `agentfleet/kube-1.20.2` in the user's cache directory.

    Raises:
        AssetsMissing: A program is not there.
    """
    named = os.environ.get("KUBEBUILDER_ASSETS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(named) if named else cache / CACHED
    missing = [program for program in PROGRAMS if not os.access(place / program, os.X_OK)]
    if not missing:
        return place
    why = "KUBEBUILDER_ASSETS names it" if named else "KUBEBUILDER_ASSETS is not set"
    raise AssetsMissing(
        f"no {', '.join(missing)} in {place} ({why}): set KUBEBUILDER_ASSETS to a directory that holds "
        f"{', '.join(PROGRAMS)}"
    )


def server_version(place: Path) -> tuple[int, int]:
    """The version of the API server in a directory, as (1, 20)."""
    said = subprocess.run(  # noqa: S603 - the program that is about to be started anyway
        [place / "kube-apiserver", "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    found = re.search(r"v(\d+)\.(\d+)", said.stdout)
    if found is None:
        raise PlaneFailed(
            f"{place / 'kube-apiserver'} --version says no version but {said.stdout + said.stderr!r}: "
            "is it built for this machine?"
        )
    return int(found[1]), int(found[2])
