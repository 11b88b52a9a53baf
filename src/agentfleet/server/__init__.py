"""The REST API (extra `agentfleet[server]`): an application to serve or to mount, and what `agentfleet serve` runs."""

from __future__ import annotations

from agentfleet.errors import MissingExtra

try:
    import fastapi as _fastapi
except ImportError as error:
    raise MissingExtra("the REST API needs 'agentfleet[server]': pip install 'agentfleet[server]'") from error

from agentfleet.server.admission import Admission
from agentfleet.server.app import create_app
from agentfleet.server.credentials import FileTokens, StoredTokens
from agentfleet.server.leaving import Leaving
from agentfleet.server.limits import Limits
from agentfleet.server.principals import Principal, Source
from agentfleet.server.tokenreview import AccessRule, AccessRules, TokenReviews

del _fastapi

__all__ = [
    "AccessRule",
    "AccessRules",
    "Admission",
    "FileTokens",
    "Leaving",
    "Limits",
    "Principal",
    "Source",
    "StoredTokens",
    "TokenReviews",
    "create_app",
]
