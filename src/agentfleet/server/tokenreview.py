"""Kubernetes' own tokens: the API server says whose one is (TokenReview), and rules say what they may.

https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import anyio
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from agentfleet.errors import BackendRefused, BackendUnavailable, SpecError
from agentfleet.server.principals import Principal, greatest
from agentfleet.specbase import Listed, Spec, Text
from agentfleet.stores.tokens import Scope, fleets_of, scopes_of

_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_JWT = re.compile(r"[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]*", re.ASCII)
_LONGEST = 8192
_KNOWN, _UNKNOWN = 30.0, 5.0
"""Seconds for which an answer of the API server is believed, by what it was."""
_MOST = 10_000


class Requests(Protocol):
    """What is needed of a connection to an API server (`agentfleet.backends.kubernetes.Connection`)."""

    async def request(
        self, method: str, path: str, *, body: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        """See `Connection.request`."""
        ...


class AccessRule(Spec):
    """What users of Kubernetes may do here, by `user` or `group`."""

    user: Text | None = None
    """Such as "system:serviceaccount:agents:console"."""
    group: Text | None = None
    """Such as "platform-admins"."""
    scopes: Annotated[Listed[Text], Field(min_length=1)]
    fleets: Annotated[Listed[Text], Field(min_length=1)]
    """Names, or "*" for all."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.user is None) == (self.group is None):
            raise PydanticCustomError("rule", "give exactly one of 'user' and 'group'")
        try:
            scopes_of(self.scopes)
            fleets_of(self.fleets)
        except SpecError as error:
            raise PydanticCustomError("rule", "{error}", {"error": str(error)}) from error
        return self


class AccessRules(Spec):
    """The rules of a file."""

    rules: Annotated[Listed[AccessRule], Field(min_length=1, max_length=1000)]
    audiences: Listed[Text] = ()
    """Audiences of which a token must be for one; the API server's own by default."""

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Rules from a YAML file; raises `SpecError`."""
        try:
            return cls.from_yaml(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"access rules {path}: cannot be read: {error}") from error


class TokenReviews:
    """Asks the API server whose token it is.

    Its own account needs the right to `create` `tokenreviews` (group authentication.k8s.io).

    Args:
        connection: The way to the API server.
        rules: What its users may do here; who is in none is not known.
        timeout: Seconds that it may take to answer.
    """

    def __init__(self, connection: Requests, rules: AccessRules, *, timeout: float = 5.0) -> None:
        self._connection = connection
        self._rules = rules
        self._timeout = timeout
        self._known: OrderedDict[str, tuple[Principal | None, float]] = OrderedDict()

    async def principal(self, token: str) -> Principal | None:
        """See `Source`."""
        if len(token) > _LONGEST or not _JWT.fullmatch(token):
            return None
        key, now = hashlib.sha256(token.encode()).hexdigest(), anyio.current_time()
        known = self._known.get(key)
        if known is not None and now - known[1] < (_UNKNOWN if known[0] is None else _KNOWN):
            return known[0]
        found = await self._ask(token)
        self._known[key] = (found, now)
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return found

    def remembers(self, token: str) -> bool:
        """See `Remembering`."""
        key = hashlib.sha256(token.encode()).hexdigest()
        return self._known.get(key, (None, 0.0))[0] is not None

    async def _ask(self, token: str) -> Principal | None:
        spec: dict[str, Any] = {"token": token}
        if self._rules.audiences:
            spec["audiences"] = list(self._rules.audiences)
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            answer = await self._connection.request(
                "POST", _PATH, body=json.dumps(review).encode(), timeout=self._timeout
            )
        except BackendRefused as error:
            raise BackendUnavailable(
                f"the API server reviews no tokens for this account: {_first_line(error)}"
            ) from None
        try:
            status = json.loads(answer)["status"]
            user = status.get("user") or {}
            if status.get("authenticated") is not True or not self._is_for_us(status):
                return None
            return principal_of(self._rules.rules, str(user["username"]), tuple(map(str, user.get("groups") or ())))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BackendUnavailable("the API server's answer is no TokenReview") from error

    def _is_for_us(self, status: dict[str, Any]) -> bool:
        """Whether the token is for an audience of ours; an API server too old to know audiences says none."""
        wanted = set(self._rules.audiences)
        return not wanted or bool(wanted & set(status.get("audiences") or ()))


def principal_of(rules: Sequence[AccessRule], user: str, groups: Sequence[str]) -> Principal | None:
    """What a user of Kubernetes is here: of the rules that fit, those of the greatest scope; None if none does.

    Rules do not add up across scopes, so that "read everywhere" and "operate one fleet" is not "operate everywhere".
    """
    fitting = [each for each in rules if each.user == user or (each.group is not None and each.group in groups)]
    if not fitting:
        return None
    scopes = [greatest(scopes_of(each.scopes)) for each in fitting]
    best: Scope = greatest(scopes)
    holding = [rule for rule, scope in zip(fitting, scopes, strict=True) if scope is best]
    fleets = {fleet for rule in holding for fleet in rule.fleets}
    agent = all(Scope.AGENT in scopes_of(rule.scopes) for rule in holding)
    return Principal(f"kubernetes/{user}", f"kubernetes:{user}", best, frozenset(fleets_of(fleets)), agent=agent)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
