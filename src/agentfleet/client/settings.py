"""The client's part for configuration documents."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from agentfleet.client.transport import Transport, compact
from agentfleet.configspec import ConfigRollout
from agentfleet.errors import BackendUnavailable
from agentfleet.rest.base import Answer
from agentfleet.rest.settings import (
    ChangeAnswer,
    CheckAnswer,
    Configuration,
    ConfigurationDiff,
    ConfigurationHead,
    ConfigurationHistory,
    ConfigurationStatus,
    Verified,
)

_A = TypeVar("_A", bound=Answer)


class Settings:
    """Configuration of clusters.

    Args:
        transport: How managers are asked.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def get(self, id: str, revision: int | None = None) -> Configuration:
        """One revision; the newest when no number is given. Raises `NotFound`."""
        return await self._ask("GET", id, "" if revision is None else f"/revisions/{revision}", Configuration)

    async def publish(
        self,
        id: str,
        document: Mapping[str, Any],
        *,
        reason: str,
        expect: int | None = None,
        rollout: ConfigRollout | None = None,
        key: str | None = None,
    ) -> ConfigurationHead:
        """Publish a document as the newest revision.

        Args:
            id: The cluster's id or name.
            document: Any JSON object.
            reason: Why.
            expect: The revision that it is based on, 0 for none; None publishes whatever came before.
            rollout: In which rings it reaches the agents; None is to all at once.
            key: Idempotency key, for who asks again in another process.

        Raises:
            SpecError: It fails validation; the message names each field.
            Conflict: `expect` is not the newest revision.
        """
        body: dict[str, Any] = {"document": dict(document), "reason": reason, "expect": expect}
        if rollout is not None:
            body["rollout"] = rollout.to_dict()
        return await self._ask("PUT", id, "", ConfigurationHead, body, key=key)

    async def status(self, id: str) -> ConfigurationStatus:
        """Which revision each instance runs, and how far a rollout in rings has come."""
        return await self._ask("GET", id, "/status", ConfigurationStatus)

    async def check(self, id: str, document: Mapping[str, Any]) -> CheckAnswer:
        """What a publication would do; nothing is stored."""
        return await self._ask("POST", id, "/check", CheckAnswer, {"document": dict(document)})

    async def rollback(
        self, id: str, revision: int, *, reason: str, expect: int | None = None, key: str | None = None
    ) -> ConfigurationHead:
        """Publish an earlier revision's content again, under a new number."""
        body = {"revision": revision, "reason": reason, "expect": expect}
        return await self._ask("POST", id, "/rollback", ConfigurationHead, body, key=key)

    async def history(self, id: str) -> AsyncIterator[ConfigurationHead]:
        """Kept revisions, oldest first."""
        cursor: str | None = None
        while True:
            page = await self._ask("GET", id, "/revisions", ConfigurationHistory, query=compact({"cursor": cursor}))
            for each in page.items:
                yield each
            cursor = page.next
            if cursor is None:
                return

    async def diff(self, id: str, before: int, after: int) -> Sequence[ChangeAnswer]:
        """What changed from one revision to another."""
        query = {"before": str(before), "after": str(after)}
        return (await self._ask("GET", id, "/diff", ConfigurationDiff, query=query)).changes

    async def verify(self, id: str) -> Verified:
        """Whether what was published is as it was."""
        return await self._ask("GET", id, "/verification", Verified)

    async def _ask(
        self,
        method: str,
        id: str,
        path: str,
        model: type[_A],
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> _A:
        data = None if body is None else json.dumps(body).encode()
        where = f"/api/v1/clusters/{quote(id, safe='')}/configuration{path}"
        answered = await self._transport.ask(method, where, body=data, query=query, key=key)
        try:
            return model.model_validate_json(answered.body)
        except ValueError as error:
            raise BackendUnavailable(f"the answer is no {model.__name__}: {str(error)[:500]}") from error
