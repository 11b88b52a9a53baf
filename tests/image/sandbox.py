"""Runs a program in another root directory, as the container engine that is not here would.

It has mounts, a process table (where it is process 1) and a user of its own; the network is shared, so that loopback
reaches it. It takes Linux, root, and `unshare`, `mount` and `setpriv` of util-linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("unshare", "mount", "setpriv")
DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a program finds around it.

    Attributes:
        root: Its root directory.
        uid: Its user, who gets neither privileges nor further groups unless it is 0.
        gid: Its group.
        folder: Where it begins.
        writable: Whether it may write to its root; /tmp, and what is mounted for writing, it always may.
        mounts: Folders and files of this machine that it sees, and where.
        masked: Files of its root that it shall not be able to use.
    """

    root: Path
    uid: int = 0
    gid: int = 0
    folder: str = "/"
    writable: bool = False
    mounts: Mapping[str, Path] = field(default_factory=dict)
    masked: Sequence[str] = ()

    def command(self, program: Sequence[str]) -> list[str]:
        """The command that runs `program` there; its environment is that of whoever runs this."""
        script = "\n".join(("set -eu", *self._preparation(), f"exec {shlex.join([*self._entering(), *program])}"))
        outer = [_find("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        return [*outer, "--", "/bin/sh", "-c", script]

    def _preparation(self) -> list[str]:
        """Mounts, in an order in which the root can be made read-only and what lies upon it stays writable."""
        mount, root = _find("mount"), str(self.root)
        steps = [
            [mount, "--bind", root, root],
            [mount, "-t", "proc", "proc", f"{root}/proc"],
            [mount, "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/tmp"],
            [mount, "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/run"],
            [mount, "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev"],
        ]
        for name in DEVICES:
            steps += _bound(mount, Path("/dev") / name, f"{root}/dev/{name}")
        for inside, outside in self.mounts.items():
            steps += _bound(mount, outside, root + inside)
        for inside in self.masked:
            steps.append([mount, "--bind", "/dev/null", root + inside])
        if not self.writable:
            steps.append([mount, "-o", "remount,bind,ro", root])
        return [shlex.join(step) for step in steps]

    def _entering(self) -> list[str]:
        rights = ["--no-new-privs", "--clear-groups"] if self.uid else ["--clear-groups"]
        who = ["--setgid", str(self.gid), "--setuid", str(self.uid)] if self.uid or self.gid else []
        return [_find("setpriv"), *rights, _find("unshare"), "--root", str(self.root), "--wd", self.folder, *who, "--"]


def missing() -> str | None:
    """Why programs cannot be run in another root here; None if they can."""
    if os.geteuid() != 0:
        return "only root may change the root directory of a program"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PLACES) is None]
    if lacking:
        return f"{', '.join(lacking)}: not installed (Debian's package util-linux)"
    tried = [_find("unshare"), "--mount", "--pid", "--fork", "--", _find("mount"), "-t", "tmpfs", "tmpfs", "/tmp"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return f"root may not mount here, as in a container: {done.stderr.strip()}" if done.returncode else None


_PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"


def _find(name: str) -> str:
    """The machine's own program: the PATH may be that of the root to be entered."""
    found = shutil.which(name, path=_PLACES)
    assert found is not None, name
    return found


def _bound(mount: str, outside: Path, inside: str) -> list[list[str]]:
    """Steps that show a file or folder at another place, which is made if it is on a file system made just now."""
    make = ["mkdir", "-p", inside] if outside.is_dir() else ["touch", inside]
    place = ["mkdir", "-p", str(Path(inside).parent)]
    return [place, make, [mount, "--bind", str(outside), inside]]
