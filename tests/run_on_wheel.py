"""Runs tests on the wheel that users install, not on the source tree: what the wheel lacks shows here.

At first it is to hold what the tree holds, file by file. So the tests that run on it are those that meet what is not
code, or other processes: commands, servers, agents, databases, migrations, dashboards, examples.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "agentfleet"
LEFT_OUT = (
    "tests/core",
    "tests/fleet",
    "tests/image",
    "tests/kube",
    "tests/loops",
    "tests/server/test_config_processes.py",
    "tests/server/test_serving.py",
    "tests/signals",
    "tests/stores/test_config_machine.py",
    "tests/testing",
)


def compare(installed: Path) -> None:
    """Refuse a wheel that is not what the source tree is."""
    sides = [
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if _is_ours(path)}
        for top in (PACKAGE, installed)
    ]
    tree, wheel = sides
    wrong = sorted(name for name in tree.keys() | wheel.keys() if tree.get(name) != wheel.get(name))
    if wrong:
        sys.exit(f"the wheel is not what src/agentfleet is: {', '.join(wrong)}")


def _is_ours(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def main() -> int:
    """Build the wheel, compare it, unpack it beside the tests, and run them there."""
    with tempfile.TemporaryDirectory(prefix="agentfleet-wheel-") as place:
        work = Path(place)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(work / "dist"), str(ROOT)], check=True)
        (wheel,) = (work / "dist").glob("*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True)
        compare(work / "site" / "agentfleet")
        for name in ("tests", "examples"):
            shutil.copytree(ROOT / name, work / name)
        shutil.copy(ROOT / "pyproject.toml", work)
        # PYTHONPATH comes before the editable install of the source tree, also in the processes that tests start
        env = {**os.environ, "PYTHONPATH": str(work / "site"), "AGENTFLEET_EXPECT_AT": str(work / "site")}
        env["HYPOTHESIS_PROFILE"] = "wheel"
        left_out = [f"--ignore={path}" for path in LEFT_OUT]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadgroup",
            "-m",
            "not slow",
            *left_out,
            *sys.argv[1:],
        ]
        return subprocess.run(command, cwd=work, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
