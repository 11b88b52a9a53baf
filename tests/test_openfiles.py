"""The limit of open files is raised as far as the system lets us, and never lowered."""

from __future__ import annotations

import resource

import pytest

from agentfleet.openfiles import raise_file_limit

INFINITE = resource.RLIM_INFINITY


class System:
    """Stands for the system's limits of this process."""

    def __init__(self, soft: int, hard: int, *, refuses: bool = False) -> None:
        self.limits = soft, hard
        self.refuses = refuses

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.limits

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        if self.refuses:
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "then"),
    [
        (1024, 524_288, 30_000, 30_000),
        (1024, INFINITE, 30_000, 30_000),
        (1024, 4096, 4096, 4096),
        (4096, 4096, 4096, 4096),
        (100_000, 524_288, 30_000, 100_000),
        (INFINITE, INFINITE, 30_000, INFINITE),
    ],
)
def test_the_limit_is_raised_as_far_as_the_system_lets_us(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int, then: int
) -> None:
    system = System(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    assert raise_file_limit(30_000) == allowed
    assert system.limits == (then, hard)


def test_a_system_that_allows_less_than_it_says_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(256, INFINITE, refuses=True)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    assert raise_file_limit(30_000) == 256
    assert system.limits == (256, INFINITE)
