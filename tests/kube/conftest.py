"""A control plane for all tests of this directory, and a loud word where there is none to be had."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import psutil
import pytest

from agentfleet.testing.kube import AssetsMissing, ControlPlane, PlaneOptions, find_assets

OPTIONS = PlaneOptions(node_grace=12, eviction=3)
"""A node counts as lost after 12 s instead of 40, its pods are evicted 3 s later."""

_missing: list[str] = []
_lasting: set[ControlPlane] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all that share the control plane in one process when pytest runs in several: there is to be one plane."""
    for item in items:
        if "plane" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("plane"))


@pytest.fixture(scope="session")
def kube_assets() -> Path:
    """The directory of the control plane's programs. Without it tests skip here, and fail where CI=true."""
    try:
        return find_assets()
    except AssetsMissing as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must provide a control plane: {error}")
        _missing[:] = [str(error)]
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def plane(kube_assets: Path) -> Iterator[ControlPlane]:
    """One control plane for the whole session: use a namespace of your own, and leave its API server alone."""
    made = ControlPlane(OPTIONS, assets=kube_assets)
    anyio.run(made.start)
    _lasting.add(made)
    try:
        yield made
    finally:
        _lasting.discard(made)
        anyio.run(made.stop)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an integration test nothing may be left but the control plane that lasts for the session."""
    if request.node.get_closest_marker("integration") is None:
        yield
        return
    before, open_before = _children(), _descriptors()
    yield
    gc.collect()
    left = _children() - before - {each.pid for plane in _lasting for each in plane.programs.values()}
    assert not left, f"child processes left: {sorted(left)}"
    new = {fd: name for fd, name in _descriptors().items() if open_before.get(fd) != name}
    assert not new, f"file descriptors left: {new}"


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _descriptors() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of this very listing
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where nobody can overlook it."""
    if _missing:
        terminalreporter.section("NO KUBERNETES", red=True, bold=True)
        terminalreporter.line(f"The tests on a real control plane did NOT run: {_missing[0]}", red=True, bold=True)
