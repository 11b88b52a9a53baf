"""What every test shares: hypothesis profiles, both event loops, and the check that nothing is left behind."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import agentfleet

# tests import their helpers as `tests.…`, however pytest was started
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.leftovers import children, descriptors

expected = os.environ.get("AGENTFLEET_EXPECT_AT")
if expected is not None and not (agentfleet.__file__ or "").startswith(expected):
    raise RuntimeError(f"these tests are to run on the wheel in {expected}, not on {agentfleet.__file__}")

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("wheel", max_examples=5, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loops that `@pytest.mark.anyio` tests run on, in real time."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an integration test no child process, socket or file descriptor may be left."""
    if request.node.get_closest_marker("integration") is None:
        yield
        return
    before, open_before = children(), descriptors()
    yield
    gc.collect()
    left = children() - before
    assert not left, f"child processes left: {sorted(left)}"
    new = {fd: name for fd, name in descriptors().items() if open_before.get(fd) != name}
    assert not new, f"file descriptors left: {new}"
