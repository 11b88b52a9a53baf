"""Control planes for all tests of this directory, and a loud word where there is none to be had."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from tests.leftovers import children, descriptors

from agentfleet.testing.kube import AssetsMissing, ControlPlane, PlaneOptions, find_assets

OPTIONS = PlaneOptions(node_grace=12, eviction=3)
"""A node counts as lost after 12 s instead of 40, its pods are evicted 3 s later."""

_missing: list[str] = []
_lasting: set[ControlPlane] = set()


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all that share a control plane in one process when pytest runs in several: it is to be started once.

    Faults have one of their own: they take as long as all the others together.
    """
    for item in items:
        used = getattr(item, "fixturenames", ())
        if "mortal_plane" in used:
            item.add_marker(pytest.mark.xdist_group("mortal plane"))
        elif "plane" in used:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    if hasattr(getattr(item, "module", None), "plane"):
        return f"plane of {item.path.stem}"
    return "plane of faults" if item.path.stem.startswith("test_faults") else "plane"


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
    with _lasts(ControlPlane(OPTIONS, assets=kube_assets)) as made:
        yield made


@pytest.fixture(scope="session")
def mortal_plane(kube_assets: Path) -> Iterator[ControlPlane]:
    """Another one that may be hurt, if it is whole again afterwards; it waits for silent nodes as any other, 40 s."""
    with _lasts(ControlPlane(assets=kube_assets)) as made:
        yield made


@contextmanager
def _lasts(made: ControlPlane) -> Iterator[ControlPlane]:
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
    before, open_before = children(), descriptors()
    yield
    gc.collect()
    left = children() - before - {each.pid for plane in _lasting for each in plane.programs.values()}
    assert not left, f"child processes left: {sorted(left)}"
    new = {fd: name for fd, name in descriptors().items() if open_before.get(fd) != name}
    assert not new, f"file descriptors left: {new}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where nobody can overlook it."""
    if _missing:
        terminalreporter.section("NO KUBERNETES", red=True, bold=True)
        terminalreporter.line(f"The tests on a real control plane did NOT run: {_missing[0]}", red=True, bold=True)
