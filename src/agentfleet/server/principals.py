"""Who asks, and what they may: the one thing that every source of credentials gives, and every route looks at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agentfleet.errors import NotFound
from agentfleet.server.problems import Refusal
from agentfleet.stores.tokens import ALL, Scope


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who was recognised.

    Attributes:
        name: For the audit and for idempotency keys: where the credential is from, and whose it is.
        credential: Which credential it was, in a form that may be written down.
        scope: The greatest that it has.
        fleets: Names of the fleets that it reaches, or `ALL`.
        expires_at: When it ends, in seconds since the epoch.
        agent: Whether the scope `agent` was given to it by name, beside a greater one perhaps.
    """

    name: str
    credential: str
    scope: Scope
    fleets: frozenset[str]
    expires_at: float | None = None
    agent: bool = False

    @property
    def is_agent(self) -> bool:
        """Whether it is meant for agents."""
        return self.agent or self.scope is Scope.AGENT

    @property
    def speaks(self) -> bool:
        """Whether it may say what agents run and refuse: who only looks on must not, as rollouts are judged by it."""
        return self.is_agent or self.may(Scope.OPERATE)

    @property
    def everywhere(self) -> bool:
        """Whether it reaches every fleet, those to come included."""
        return ALL in self.fleets

    def reaches(self, fleet: str) -> bool:
        """Whether it reaches the fleet of this name."""
        return self.everywhere or fleet in self.fleets

    def may(self, scope: Scope) -> bool:
        """Whether its scope includes this one."""
        return self.scope.rank >= scope.rank

    def require(self, scope: Scope, *, everywhere: bool = False) -> None:
        """Raise a 403 unless it has the scope, and reaches every fleet if that is needed."""
        if not self.may(scope):
            raise Refusal(
                403, "forbidden", f"this needs the scope {scope}, and {self.name} has {self.scope}; use another token"
            )
        if everywhere and not self.everywhere:
            raise Refusal(
                403, "forbidden", f"this needs a token for every cluster ('{ALL}'), and {self.name} has one for some"
            )

    def require_reach(self, fleet: str, asked: str) -> None:
        """Raise what a fleet that does not exist would, unless it reaches this one."""
        if not self.reaches(fleet):
            raise NotFound(f"there is no fleet {asked!r:.300}")


class Source(Protocol):
    """Where credentials are known."""

    async def principal(self, token: str) -> Principal | None:
        """Whose token this is; None if this source does not know it.

        Raises:
            BackendUnavailable: It cannot be asked now; `DeadlineExceeded`: it did not answer in time.
        """
        ...


@runtime_checkable
class Remembering(Source, Protocol):
    """A source that knows some tokens without asking anybody."""

    def remembers(self, token: str) -> bool:
        """Whether it has known this token lately, or asks nobody about any. Never waits."""
        ...


def greatest(scopes: Iterable[Scope]) -> Scope:
    """The scope that includes the others."""
    return max(scopes, key=lambda each: each.rank)


LOOPBACK = Principal("loopback", "none", Scope.ADMIN, frozenset({ALL}), agent=True)
"""Whoever asks from this machine, where the server was told to ask nobody for a token: agents, too."""
