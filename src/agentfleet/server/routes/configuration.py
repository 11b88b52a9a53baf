"""Configuration: the documents that a cluster's agents are told, with their history."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from agentfleet.errors import ConfigConflict, ConfigError, ConfigInvalid, ConfigNotFound, DeadlineExceeded
from agentfleet.operations import reused
from agentfleet.rest.settings import (
    ChangeAnswer,
    CheckAnswer,
    CheckRequest,
    Configuration,
    ConfigurationDiff,
    ConfigurationHead,
    ConfigurationHistory,
    ConfigurationStatus,
    PublishRequest,
    RestoreRequest,
    Verified,
)
from agentfleet.server.answering import (
    API,
    AskedToChange,
    Limit,
    OperatesCluster,
    PageCursor,
    ReadsCluster,
    StrictRoute,
    done,
    expected,
    page_size,
    reply,
)
from agentfleet.server.cursors import cursor, number_after
from agentfleet.server.describing import problems
from agentfleet.server.problems import Refusal
from agentfleet.stores.config import ConfigRevision

router = APIRouter(prefix=API, tags=["configuration"], route_class=StrictRoute)
_ALL = "configuration"
_PATH = "/clusters/{id}/configuration"
Number = Annotated[int, Path(ge=1, le=2**53, description="A revision's number.")]
Of = Annotated[int, Query(ge=1, le=2**53, description="A revision's number.")]


@router.get(_PATH, response_model=Configuration, summary="The newest configuration", responses=problems(404, etag=True))
async def get_configuration(asked: ReadsCluster) -> Response:
    """The newest revision. Its ETag is its number, which a PUT is based on."""
    found = await asked.api.manager.config.get(asked.record.name)
    return reply(asked, Configuration.of(found), etag=str(found.revision))


@router.put(
    _PATH,
    response_model=ConfigurationHead,
    summary="Publish a configuration",
    responses=problems(404, 409, 412, 422, key=True, match=True),
)
async def publish_configuration(asked: OperatesCluster, body: PublishRequest) -> Response:
    """Publish a document as the newest revision; it is validated first, and pushed to every agent."""
    request = _request(asked)
    expect = await _expected(asked, body.expect)
    stored = await asked.api.manager.config.put(
        asked.record.name,
        body.document,
        author=asked.principal.name[:253],
        reason=body.reason,
        expect=expect,
        origin=asked.exchange.origin,
        rollout=body.rollout,
        request=request,
    )
    return _published(asked, stored)


@router.get(
    _PATH + "/status",
    response_model=ConfigurationStatus,
    summary="Who runs which configuration",
    responses=problems(404, etag=True),
)
async def get_configuration_status(asked: ReadsCluster) -> Response:
    """Which revision each instance runs, by its own word, and how far a rollout in rings has come."""
    found = await asked.api.manager.config_status(asked.record.id)
    return reply(asked, ConfigurationStatus.of(found))


@router.post(
    _PATH + "/check", response_model=CheckAnswer, summary="Check a configuration", responses=problems(404, 422)
)
async def check_configuration(asked: ReadsCluster, body: CheckRequest) -> Response:
    """What would be refused, and what would change, if this document were published. Nothing is stored."""
    asked.exchange.counts = False
    found = await asked.api.manager.config.dry_run(asked.record.name, body.document, expect=body.expect)
    return done(CheckAnswer.of(found))


@router.post(
    _PATH + "/rollback",
    response_model=ConfigurationHead,
    summary="Publish an earlier revision again",
    responses=problems(404, 409, 412, 422, key=True, match=True),
)
async def restore_configuration(asked: OperatesCluster, body: RestoreRequest) -> Response:
    """Publish the content of an earlier revision under a new number."""
    request = _request(asked)
    expect = await _expected(asked, body.expect)
    stored = await asked.api.manager.config.rollback(
        asked.record.name,
        body.revision,
        author=asked.principal.name[:253],
        reason=body.reason,
        expect=expect,
        origin=asked.exchange.origin,
        request=request,
    )
    return _published(asked, stored)


@router.get(
    _PATH + "/revisions",
    response_model=ConfigurationHistory,
    summary="The history of the configuration",
    responses=problems(404, 422, etag=True),
)
async def list_configuration_revisions(
    asked: ReadsCluster,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """Kept revisions without their documents, oldest first."""
    size, after = page_size(asked, limit), number_after(_ALL, cursor_) or 0
    found = await asked.api.manager.config.history(asked.record.name, after=after, limit=size + 1)
    items = tuple(map(ConfigurationHead.of, found[:size]))
    more = cursor(_ALL, found[size - 1].revision) if len(found) > size else None
    return reply(asked, ConfigurationHistory.made(items=items, next=more))


@router.get(
    _PATH + "/revisions/{revision}",
    response_model=Configuration,
    summary="One revision of the configuration",
    responses=problems(404, etag=True),
)
async def get_configuration_revision(asked: ReadsCluster, revision: Number) -> Response:
    """One revision, which never changes."""
    found = await asked.api.manager.config.get(asked.record.name, revision)
    return reply(asked, Configuration.of(found), etag=str(found.revision))


@router.get(
    _PATH + "/diff",
    response_model=ConfigurationDiff,
    summary="What changed between two revisions",
    responses=problems(404, 422, etag=True),
)
async def diff_configuration(asked: ReadsCluster, before: Of, after: Of) -> Response:
    """What changed from one revision to another."""
    found = await asked.api.manager.config.diff(asked.record.name, before, after)
    changes = tuple(map(ChangeAnswer.of, found))
    return reply(asked, ConfigurationDiff.made(before=before, after=after, changes=changes))


@router.get(
    _PATH + "/verification",
    response_model=Verified,
    summary="Whether the history is unaltered",
    responses=problems(404, etag=True),
)
async def verify_configuration(asked: ReadsCluster) -> Response:
    """Whether every kept revision is as it was published: each holds the hash of the one before."""
    try:
        checked = await asked.api.manager.config.verify(asked.record.name)
    except (ConfigConflict, ConfigInvalid, ConfigNotFound, DeadlineExceeded):
        raise
    except ConfigError as error:
        return reply(asked, Verified(ok=False, checked=0, detail=str(error)))
    return reply(asked, Verified(ok=True, checked=checked))


def _request(asked: AskedToChange) -> str:
    """What tells this request from all others: who asks, and the key that was sent; empty without a key."""
    by = asked.exchange.caller
    if asked.earlier is not None:
        raise reused(by)
    return "" if by.key is None else hashlib.sha256(f"{by.actor}\0{by.key}".encode()).hexdigest()


async def _expected(asked: AskedToChange, given: int | None) -> int | None:
    """As `expected`; where any revision is taken, there must be one."""
    if asked.exchange.headers.get("if-match", "").strip() == "*":
        try:
            await asked.api.manager.config.get(asked.record.name)
        except ConfigNotFound as error:
            raise Refusal(412, "precondition-failed", f"If-Match: {error}") from error
    return expected(asked, given)


def _published(asked: AskedToChange, stored: ConfigRevision) -> Response:
    asked.exchange.note(detail=f"configuration revision {stored.revision}")
    return done(ConfigurationHead.of(stored), headers={"ETag": f'"{stored.revision}"'})
