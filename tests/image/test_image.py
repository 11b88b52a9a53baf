"""The image, made by the Dockerfile's own steps in a fresh Debian; its programs run without root, shell or writing."""

from __future__ import annotations

import http.server
import stat
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.image.build import Image
from tests.image.container import SHELLS, Container, volume

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
DATA = "/var/lib/agentfleet"
PYTHON = "/opt/agentfleet/bin/python"

IMPORT_ALL = """
import importlib, pkgutil, agentfleet
# not what tests need besides, not what alembic and python -m run
alone = ("agentfleet.testing", "agentfleet.stores.sql.migrations.env")
for each in pkgutil.walk_packages(agentfleet.__path__, "agentfleet."):
    if not each.name.startswith(alone) and not each.name.endswith("__main__"):
        importlib.import_module(each.name)
print(agentfleet.__file__)
"""
TRY_TO_WRITE = """
import errno, os, pathlib, sys
for place in map(pathlib.Path, sys.argv[1:]):
    try:
        (place / "probe").write_text("x")
    except OSError as error:
        print(place, errno.errorcode[error.errno])
    else:
        print(place, "written")
print(os.getuid(), os.getgid(), os.getgroups(), os.getpid())
"""


def run(image: Image, tmp_path: Path, *program: str) -> str:
    """Run a program of the image to its end, with a fresh volume."""
    tmp_path.mkdir(exist_ok=True)
    shown = {DATA: volume(image, DATA, tmp_path / "data")}
    done = Container(image, volumes=shown, log=tmp_path / "log").run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_says_what_it_is(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image."
    assert image.labels[f"{prefix}version"] == project["version"], "the Dockerfile's ARG VERSION"
    assert image.labels[f"{prefix}licenses"] == project["license"]
    assert {f"{prefix}title", f"{prefix}description"} <= set(image.labels)
    assert (image.uid, image.gid) == (10001, 10001)
    assert (image.ports, image.volumes, image.folder) == (["8080"], [DATA], DATA)


def test_no_shell_is_needed_to_start_and_to_judge_it(image: Image) -> None:
    for program in (image.entrypoint, image.health):
        assert program[0] == "/opt/agentfleet/bin/agentfleet"
    assert image.command == ("serve",)
    first = image.place(image.entrypoint[0]).read_text().splitlines()[0]
    assert first == f"#!{PYTHON}", "the script's interpreter is no shell"


def test_it_holds_what_runs_and_no_more(image: Image) -> None:
    packages = image.root / "opt/agentfleet/lib"
    assert list(packages.glob("python3.*/site-packages/agentfleet-*.dist-info/WHEEL")), "installed from a wheel"
    assert not list(packages.glob("python3.*/site-packages/pip")), "nothing is installed into it any more"
    for place in ("src", "build", "wheels"):
        assert not (image.root / place).exists(), place
    modules = list(packages.glob("python3.*/site-packages/agentfleet/**/*.py"))
    compiled = [each for each in modules if list((each.parent / "__pycache__").glob(f"{each.stem}.*.pyc"))]
    assert modules
    assert compiled == modules, "bytecode cannot be written later"


def test_its_user_may_change_nothing_but_the_volume(image: Image) -> None:
    """Also where the root file system is writable."""
    common = {"tmp", "var/tmp", "run/lock", "dev/shm"}  # anybody's, in every Debian
    found = set()
    for place in image.root.rglob("*"):
        seen = place.lstat()
        own = seen.st_uid == image.uid and seen.st_mode & stat.S_IWUSR
        if not stat.S_ISLNK(seen.st_mode) and (own or seen.st_mode & stat.S_IWOTH):
            found.add(str(place.relative_to(image.root)))
    assert found - common == {DATA.strip("/")}


def test_it_is_complete(image: Image, tmp_path: Path) -> None:
    """Every module can be imported, as that user, from a read-only root."""
    where = run(image, tmp_path, PYTHON, "-c", IMPORT_ALL)
    assert where.startswith("/opt/agentfleet/lib/")
    spec = run(image, tmp_path / "again", "/opt/agentfleet/bin/agentfleet", "schema")
    assert '"title": "FleetSpec"' in spec


def test_it_writes_where_it_may_and_nowhere_else(image: Image, tmp_path: Path) -> None:
    """The sandbox is what it claims to be: else the tests here would prove nothing."""
    told = run(image, tmp_path, PYTHON, "-c", TRY_TO_WRITE, "/", "/opt/agentfleet", "/etc", DATA, "/tmp")
    *places, who = told.splitlines()
    assert places == ["/ EROFS", "/opt/agentfleet EROFS", "/etc EROFS", f"{DATA} written", "/tmp written"]
    assert who == "10001 10001 [] 1"
    for shell in SHELLS:
        done = Container(image, log=tmp_path / "log").run([shell, "-c", "true"])
        assert done.returncode != 0, shell


class Answers(http.server.BaseHTTPRequestHandler):
    """A manager that lives, and one that does not, by path."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 503)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def answering() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_its_health_check_tells_living_from_dead(image: Image, tmp_path: Path) -> None:
    container = Container(image, log=tmp_path / "log")
    with answering() as port:
        env = {"AGENTFLEET_PORT": str(port)}
        alive = container.run(image.health, env)
        unready = container.run([*image.health, "--path", "/readyz"], env)
    dead = container.run(image.health, env)
    assert (alive.returncode, alive.stdout) == (0, "200 OK\n")
    assert (unready.returncode, "503 Service Unavailable" in unready.stderr) == (1, True)
    assert (dead.returncode, "refused" in dead.stderr) == (1, True)
