"""One request on its way through the server: what is known of it, and what the audit will say of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.types import Scope as AsgiScope

from agentfleet.operations import Caller
from agentfleet.rest.base import FieldError
from agentfleet.server.principals import Principal
from agentfleet.server.problems import Refusal

KEY = "agentfleet.exchange"
"""Where an ASGI scope has it."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_IDEMPOTENCY = re.compile(r"[!-~]{1,200}", re.ASCII)


@dataclass(slots=True)
class Exchange:
    """One request.

    Attributes:
        id: A UUID; the client's own, if it sent one.
        method: As it was sent.
        path: As it was sent, percent-encoded.
        origin: Address that it came from.
        headers: As they were sent.
        principal: Who asks, once that is known.
        fleet: Name of the fleet concerned, once that is known, for the audit.
        operation: Id of the operation that it became.
        detail: What the audit is to say besides.
        status: What was answered; 0 before.
        deadline: Ends what takes too long.
        counts: Whether a change that was asked for is audited: not where it was one too many and not looked at, and not
            where nothing changes.
        routine: Whether very many of its kind are expected; only a refusal is logged then.
        route: What was asked, as a template, where no route of the framework says it.
        give_back: Ends that it counts among the requests that are answered at once; may be called twice.
    """

    id: str
    method: str
    path: str
    origin: str
    headers: Headers
    principal: Principal | None = None
    fleet: str | None = None
    operation: str | None = None
    detail: str = ""
    status: int = 0
    deadline: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    counts: bool = True
    routine: bool = False
    route: str = ""
    give_back: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, scope: AsgiScope) -> Exchange:
        """From an ASGI scope."""
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "").lower()
        raw: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
        client = scope.get("client")
        return cls(
            asked if _REQUEST_ID.fullmatch(asked) else str(uuid.uuid4()),
            scope["method"],
            raw.decode("ascii", "replace")[:2000],
            "" if client is None else str(client[0]),
            headers,
        )

    @property
    def writes(self) -> bool:
        """Whether it asks for a change."""
        return self.method not in SAFE

    @property
    def caller(self) -> Caller:
        """Who asks, for the operation that it becomes. Raises a 422 for a key that is none."""
        assert self.principal is not None, "who asks was asked before"
        key = self.headers.get("idempotency-key")
        if key is not None and not _IDEMPOTENCY.fullmatch(key):
            message = "1 to 200 printable characters without blanks"
            raise Refusal(
                422,
                "invalid",
                f"Idempotency-Key: {message}",
                errors=[FieldError(field="Idempotency-Key", message=message)],
            )
        return Caller(self.principal.name, self.origin, key)

    def lasting(self, seconds: float) -> None:
        """The answer may take this much longer than others; it waits, and takes no place of those that are answered.

        Whoever calls this holds a bound of its own.
        """
        self.deadline.deadline += seconds
        self.give_back()

    def note(self, *, fleet: str | None = None, operation: str | None = None, detail: str = "") -> None:
        """What the audit is to say."""
        self.fleet = fleet if fleet is not None else self.fleet
        self.operation = operation if operation is not None else self.operation
        self.detail = detail or self.detail


def exchange_of(scope: AsgiScope) -> Exchange:
    """The exchange of a request that came through the gate."""
    found: Any = scope.get(KEY)
    assert isinstance(found, Exchange), "every request comes through the gate"
    return found
