"""Managers as real processes, killed in the middle of their work; `benchmarks/bench_managers.py` has the long run."""

from __future__ import annotations

import math
import os

import anyio
import pytest

from agentfleet.testing.kube import AssetsMissing
from agentfleet.testing.postgres import PostgresMissing

manager_kills = pytest.importorskip("benchmarks.manager_kills", reason="the benchmarks are not part of the wheel")
bench_managers = pytest.importorskip("benchmarks.bench_managers", reason="the benchmarks are not part of the wheel")

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_what_a_manager_acknowledged_survives_its_death() -> None:
    """One manager of real processes on SQLite, killed at random instants under load."""
    found = anyio.run(manager_kills.kills, 5)
    assert found.lost == []
    assert len(found.starts) == 5, "it came back each time"
    assert found.phase in ("running", "scaling"), "its fleet lives"
    assert found.operations > 0
    assert found.revisions > 0


@pytest.mark.xdist_group("dying managers")  # each with a control plane of its own, one after the other
@pytest.mark.parametrize("leases", ["kubernetes", "database"])
def test_two_managers_that_die_in_turn_lose_nothing(leases: str) -> None:
    """PostgreSQL and a real API server: a kill, a pause that outlasts the lease, a good-bye, under operations."""
    try:
        found = anyio.run(bench_managers.chaos, 1.0, 15.0, 12.0, leases)
    except (AssetsMissing, PostgresMissing) as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must provide what this needs: {error}")
        pytest.skip(str(error))
    assert not found.asked.failed, "each request was answered, by one or the other"
    assert sum(found.ends.values()) == len(found.asked.operations) > 0, "what was accepted has ended"
    assert all(found.leaderless.values()), "each kind of blow has hit a leader"
    spans = [span for each in found.leaderless.values() for span in each]
    assert max(spans) < math.inf, "after each blow each fleet of the victim's had another leader"
    assert (found.stale, found.went_back) == (0, 0), "nothing of an older epoch was written"
    assert found.strange == [], "no size has moved that nobody had asked for"


def told(*sizes: int) -> list[object]:
    """A Deployment that is told a size each second."""
    return [bench_managers.Told(float(second), size, 1) for second, size in enumerate(sizes)]


def test_sizes_on_the_way_down_are_no_strange_ones() -> None:
    decided = [(0.5, 4), (3.5, 10), (4.5, 4)]
    assert bench_managers.unasked(told(8, 7, 5, 4, 10, 6, 4), [8, 4, 10], decided) == []


def test_a_size_may_be_seen_later_than_what_overtook_it() -> None:
    """10 is told on the way from 12 to 4 at 1.1, then 12 is decided on at 1.3, and both are seen at 1.4."""
    story = [bench_managers.Told(at, size, 1) for at, size in ((0.0, 12), (1.4, 11), (1.45, 10), (1.5, 12))]
    assert bench_managers.unasked(story, [12, 4], [(1.0, 4), (1.3, 12)]) == []
    late = [told._replace(at=told.at + 10) for told in story]
    assert bench_managers.unasked(late, [12, 4], [(1.0, 4), (1.3, 12)]) == [11, 10], "not ten seconds later"


def test_a_size_that_nobody_decided_on_is_a_strange_one() -> None:
    asked = [8, 4, 10]
    assert bench_managers.unasked(told(8, 9), asked, []) == [9], "nobody grows by steps"
    assert bench_managers.unasked(told(8, 4, 3), asked, [(0.5, 4)]) == [3], "nobody falls below"
    assert bench_managers.unasked(told(8, 10, 7, 10), asked, [(0.5, 10)]) == [7], "a dip is none on the way to 10"
