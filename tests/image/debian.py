"""A fresh Debian root with Python, made by debootstrap: what stands in for the base image, which cannot be pulled here.

Made once and kept as an archive outside the checkout (`~/.cache/agentfleet`, or XDG_CACHE_HOME); a minute, and 130 MB.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
_RECIPE = 1
"""Goes up whenever the archive is to be made anew."""


def missing() -> str | None:
    """Why there can be no such root here; None if there can."""
    lacking = [name for name in ("debootstrap", "apt-get", "tar") if shutil.which(name) is None]
    return f"{', '.join(lacking)}: not installed; this needs Debian with its package debootstrap" if lacking else None


def unpack(root: Path) -> None:
    """Put the fresh root into an empty folder; bootstraps it first if that was never done on this machine."""
    subprocess.run(
        ["tar", "--extract", "--numeric-owner", "--file", str(_archive()), "--directory", str(root)], check=True
    )


def _archive() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentfleet"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"debian-{SUITE}-python-{_RECIPE}.tar"
    with (cache / "debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs on one machine bootstrap once
        if not archive.exists():
            with tempfile.TemporaryDirectory(prefix="agentfleet-debian-", dir="/var/tmp") as place:
                root = Path(place) / "root"
                _bootstrap(root)
                made = archive.with_suffix(".part")
                # devices are left out: whoever enters gets some of their own
                _tar("--create", "--exclude=./dev/*", archive=made, root=root, members=(".",))
                made.rename(archive)
    return archive


def _tar(*options: str, archive: Path, root: Path, members: Sequence[str] = ()) -> None:
    command = ["tar", *options, "--numeric-owner", "--file", str(archive), "--directory", str(root), *members]
    subprocess.run(command, check=True)


def _bootstrap(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), _mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log = root / "debootstrap" / "debootstrap.log"
        told = "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else done.stdout + done.stderr
        raise RuntimeError(f"debootstrap failed with {done.returncode}:\n{told}")
    for file in (root / "var/cache/apt/archives").glob("*.deb"):
        file.unlink()
    (root / "etc/hosts").touch()  # shown from the machine while programs run


def _mirror() -> str:
    """Where this machine's own packages come from."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    if not found:
        raise RuntimeError(f"this machine knows no source of packages of Debian {SUITE}; `apt-get update` first")
    return found[0]
