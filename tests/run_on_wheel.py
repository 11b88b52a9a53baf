"""Runs the fast tests on the wheel that users install, not on the source tree: what the wheel lacks shows here.

What only repeats behaviour at length is left out: that the wheel has the same code takes one example of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_LENGTH = ("tests/fleet/test_faults.py", "tests/fleet/test_restart.py", "tests/fleet/test_machine.py", "tests/kube")


def main() -> int:
    """Build the wheel, unpack it beside the tests, and run them there."""
    with tempfile.TemporaryDirectory(prefix="agentfleet-wheel-") as place:
        work = Path(place)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(work / "dist"), str(ROOT)], check=True)
        (wheel,) = (work / "dist").glob("*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True)
        for name in ("tests", "examples"):
            shutil.copytree(ROOT / name, work / name)
        shutil.copy(ROOT / "pyproject.toml", work)
        # PYTHONPATH comes before the editable install of the source tree, also in the processes that tests start
        env = {**os.environ, "PYTHONPATH": str(work / "site"), "AGENTFLEET_EXPECT_AT": str(work / "site")}
        env["HYPOTHESIS_PROFILE"] = "wheel"
        left_out = [f"--ignore={path}" for path in AT_LENGTH]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *left_out, *sys.argv[1:]]
        return subprocess.run(command, cwd=work, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
