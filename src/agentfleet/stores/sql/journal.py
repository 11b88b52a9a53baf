"""A journal in a database, which several processes may write and read at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
from sqlalchemy import URL, Connection, Select, bindparam, delete, func, insert, or_, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from agentfleet.errors import JournalError, NotLeader, SpecError
from agentfleet.events import Event
from agentfleet.stores.following import Bell, Follower
from agentfleet.stores.lines import STATE, deposed, encode, numbered
from agentfleet.stores.pages import Page
from agentfleet.stores.sql.bounded import Bounded, Direct
from agentfleet.stores.sql.checkpoints import Checkpoints
from agentfleet.stores.sql.engines import engine, is_sqlite, url_of
from agentfleet.stores.sql.fences import latest_epoch, pass_fence
from agentfleet.stores.sql.migrating import migrate
from agentfleet.stores.sql.schema import JOURNAL, JOURNAL_HEAD, JOURNAL_STATES
from agentfleet.stores.sql.sessions import HeldConnections

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOOK = 0.25
"""Seconds after which who follows looks for what other processes have appended."""
_PAGE = 4096
"""Events that are read by one call."""
_SEQ = '{"seq":'
"""How each line begins."""
_APPEND = text(
    """
    WITH fence AS (
        INSERT INTO fences (fleet, epoch) SELECT :fleet, CAST(:epoch AS bigint) WHERE :epoch > 0
        ON CONFLICT (fleet) DO UPDATE SET epoch = excluded.epoch WHERE fences.epoch <= excluded.epoch
        RETURNING epoch
    ), head AS (
        UPDATE journal_head SET last = last + 1 WHERE :epoch = 0 OR EXISTS (SELECT FROM fence) RETURNING last
    ), new AS (
        SELECT last AS seq, CAST(:begin AS text) || last || CAST(:rest AS text) AS line FROM head
    ), kept AS (
        INSERT INTO journal (seq, fleet, kind, at, line) SELECT seq, :fleet, :kind, :at, line FROM new
    ), state AS (
        INSERT INTO journal_states (fleet, kind, seq, line) SELECT :fleet, :kind, seq, line FROM new WHERE :is_state
        ON CONFLICT (fleet, kind) DO UPDATE SET seq = excluded.seq, line = excluded.line
    )
    SELECT seq FROM new
    """
)
"""An append to PostgreSQL, in one statement: whoever is paused amid it holds no lock longer than the server needs."""
_ADVANCE = update(JOURNAL_HEAD).values(last=JOURNAL_HEAD.c.last + 1).returning(JOURNAL_HEAD.c.last)
_INSERT = insert(JOURNAL)
_TRIM = delete(JOURNAL).where(JOURNAL.c.seq <= bindparam("upto"))
_TRIMMED = update(JOURNAL_HEAD).where(JOURNAL_HEAD.c.trimmed < bindparam("upto")).values(trimmed=bindparam("upto"))
_TRIM_AT_ONCE = text(
    """
    WITH gone AS (DELETE FROM journal WHERE seq <= :upto)
    UPDATE journal_head SET trimmed = :upto WHERE trimmed < :upto
    """
)
_OFTEN = 1000
"""Events after which the oldest are dropped, at most: so few that whoever waits for that append does not notice."""
_TOGETHER = 4 * _OFTEN
"""Events that are dropped together, at most: one that gets a limit late catches up with it by and by."""


class SqlJournal:
    """A journal in SQLite or PostgreSQL. Open at once; close it, or use it as a context manager.

    An append waits for the database: about a tenth of a millisecond for SQLite on this machine, a round trip and a
    commit for PostgreSQL, which should be near. One that takes longer than `timeout` fails, and its effect is unknown;
    until the server answers again the next ones fail at once, so that the event loop they are made in is not held up.
    What follows the journal reads PostgreSQL in threads.

    Args:
        url: As `Database`. The tables are made, or brought up to date.
        limit: Events kept, besides the last of each state; None keeps all of them.
        fsync: Whether an append also survives the loss of power; without it, the death of the process only.
        timeout: Seconds that the database may take for a connection or a statement.

    Raises:
        SpecError: `url` or `limit` are not usable.
        JournalError: The database cannot be opened.
        OperationRefused: A newer version of this library has changed the tables.
    """

    def __init__(self, url: str | URL, *, limit: int | None = None, fsync: bool = False, timeout: float = 5.0) -> None:
        if limit is not None and limit < 1:
            raise SpecError(f"limit: must be a whole number of events from 1, or None for no limit; got {limit!r}")
        made = url_of(url)
        self._limit = limit
        self._at_once = not is_sqlite(made)
        self._upsert = sqlite.insert if is_sqlite(made) else postgresql.insert
        self._bell = Bell()
        self._closed = False
        with _failing("opened"):
            migrate(made, timeout=max(timeout, 60.0))
            self._engine = engine(made, timeout=timeout, fsync=fsync)
            hold = partial(HeldConnections, self._engine)
            self._caller: Direct[HeldConnections] | Bounded[HeldConnections]
            self._reader: Bounded[HeldConnections] | None = None
            if is_sqlite(made):
                self._caller = Direct(hold())
            else:
                self._caller = Bounded(hold, timeout=timeout)
                self._reader = Bounded(hold, timeout=timeout)
            self._newest, self._trimmed = self._call(_head)
        self._checkpoints = Checkpoints(str(made.database), timeout=timeout) if is_sqlite(made) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; may be repeated. What follows it ends."""
        self._closed = True
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._caller.close()
        if self._reader is not None:
            self._reader.close()
        self._engine.dispose()
        self._bell.ring()

    def append(self, event: Event) -> Event:
        """Record one event and return it with its `seq`.

        Raises:
            JournalError: It is not JSON-ready, the journal is closed, or the database did not take it in time.
            NotLeader: A later leader has recorded events of this fleet already.
        """
        rest = encode(event, 0).decode().rstrip("\n").removeprefix(_SEQ + "0")  # refused before anything is locked
        with _failing("appended to"):
            seq = self._call(partial(self._append_at_once if self._at_once else self._append, event, rest))
        self._newest = seq
        self._bell.ring()
        if self._limit is not None and seq > self._limit and seq % max(1, min(self._limit // 8, _OFTEN)) == 0:
            self._trim(seq - self._limit)
        return numbered(event, seq)

    def _append_at_once(self, event: Event, rest: str, held: HeldConnections) -> int:
        values = {"fleet": event.fleet, "kind": event.kind, "at": event.at, "epoch": event.epoch}
        values |= {"begin": _SEQ, "rest": rest, "is_state": event.kind.startswith(STATE)}
        with held.begin(at_once=True) as connection:
            seq: int | None = connection.execute(_APPEND, values).scalar()
            latest = None if seq is not None else connection.execute(latest_epoch(event.fleet)).scalar_one()
        if seq is None:
            raise NotLeader(deposed(event, latest or 0))
        return seq

    def _append(self, event: Event, rest: str, held: HeldConnections) -> int:
        with held.begin(writes=True) as connection:
            seq = int(connection.execute(_ADVANCE).scalar_one())
            if event.epoch and connection.execute(pass_fence(self._upsert, event.fleet, event.epoch)).scalar() is None:
                raise NotLeader(deposed(event, connection.execute(latest_epoch(event.fleet)).scalar_one()))
            line = f"{_SEQ}{seq}{rest}"
            row = {"seq": seq, "fleet": event.fleet, "kind": event.kind, "at": event.at, "line": line}
            connection.execute(_INSERT, row)
            if event.kind.startswith(STATE):
                self._keep_state(connection, event, seq, line)
        return seq

    def _keep_state(self, connection: Connection, event: Event, seq: int, line: str) -> None:
        said: Any = self._upsert(JOURNAL_STATES).values(fleet=event.fleet, kind=event.kind, seq=seq, line=line)
        connection.execute(
            said.on_conflict_do_update(index_elements=["fleet", "kind"], set_={"seq": seq, "line": line})
        )

    def _trim(self, upto: int) -> None:
        """Drop the oldest. What was appended is recorded whether that succeeds or not; the next one tries again."""
        upto = min(upto, self._trimmed + _TOGETHER)
        if upto <= self._trimmed:  # another process has
            return
        try:
            with _failing("trimmed"):
                self._call(partial(self._trim_at_once if self._at_once else self._trim_within, upto))
        except JournalError as error:
            log.warning("%s; the oldest events are kept for now", error)
            return
        self._trimmed = max(self._trimmed, upto)

    def _trim_at_once(self, upto: int, held: HeldConnections) -> None:
        with held.begin(at_once=True) as connection:
            connection.execute(_TRIM_AT_ONCE, {"upto": upto})

    def _trim_within(self, upto: int, held: HeldConnections) -> None:
        with held.begin(writes=True) as connection:
            connection.execute(_TRIM, {"upto": upto})
            connection.execute(_TRIMMED, {"upto": upto})

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """Kept events with `seq > after`, oldest first."""
        found: list[Event] = []
        with _failing("read"):
            while page := self._call(partial(_lines, after, _PAGE, fleet))[0]:  # a long history is no silent server
                found += page
                after = page[-1].seq
        return found

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """The newest event of a "state." kind, None if there never was one."""
        table = JOURNAL_STATES.c
        query = select(table.line).where(table.fleet == fleet, table.kind == kind)
        with _failing("read"):
            found = self._call(partial(_first, query))
        return None if found is None else Event.from_json(found)

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """The newest event of each "state." kind that begins so, by kind."""
        table = JOURNAL_STATES.c
        begin = func.substr(table.kind, 1, len(prefix))  # to LIKE, SQLite's capitals are small letters
        query = select(table.line).where(table.fleet == fleet, begin == prefix)
        with _failing("read"):
            return {event.kind: event for event in self._call(partial(_events, query))}

    def follow(self, *, fleet: str | None = None, after: int = 0) -> Follower:
        """Kept events after `after`, then new ones as they are appended, by whomever; see the port."""
        return Follower(self, fleet=fleet, after=after)

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._closed

    @property
    def trimmed(self) -> int:
        """Events up to this `seq` are gone, but for the last of each state; as of the last append, batch or look."""
        return self._trimmed

    @property
    def newest(self) -> int:
        """The `seq` of the newest event, by whomever; 0 if there is none. As of the last append, batch or look."""
        return self._newest

    def page(self, wanted: Page) -> list[Event]:
        """What a page is asked for; for threads that may wait."""
        table = JOURNAL.c
        query = select(table.line).where(table.seq > wanted.after)
        if wanted.fleet is not None:
            query = query.where(table.fleet == wanted.fleet)
        if wanted.before is not None:
            query = query.where(table.seq < wanted.before)
        if wanted.kinds:
            query = query.where(or_(*(table.kind.startswith(kind, autoescape=True) for kind in wanted.kinds)))
        if wanted.without:
            query = query.where(~table.kind.startswith(wanted.without, autoescape=True))
        query = query.order_by(table.seq.desc() if wanted.newest else table.seq).limit(wanted.limit)
        with _failing("read"):
            if self._reader is not None:
                return self._reader.call(partial(_events, query))
            with self._engine.connect() as connection:  # not the one that appends in another thread
                return [Event.from_json(line) for line in connection.execute(query).scalars()]

    async def batch(self, after: int, limit: int) -> Sequence[Event]:
        """Up to `limit` kept events with `seq > after`, oldest first."""
        found, newest, trimmed = await self._ask(partial(_lines, after, limit, None))
        self._note(newest, trimmed)
        return found

    async def look(self) -> None:
        """Have `newest` and `trimmed` be as they are now."""
        if not self._closed:
            self._note(*await self._ask(_head))

    async def changed(self, after: int) -> None:
        """Wait until there is an event with `seq > after`, or the journal is closed."""
        while not self._closed and self._newest <= after:
            with anyio.move_on_after(_LOOK):
                await self._bell.wait()
                continue
            await self.look()

    def _note(self, newest: int, trimmed: int) -> None:
        # own appends may have gone on meanwhile
        self._newest, self._trimmed = max(self._newest, newest), max(self._trimmed, trimmed)

    def _call(self, work: Callable[[HeldConnections], _T]) -> _T:
        if self._closed:
            raise JournalError("the journal is closed")
        return self._caller.call(work)

    async def _ask(self, work: Callable[[HeldConnections], _T]) -> _T:
        with _failing("read"):
            if self._reader is None:
                return self._call(work)
            return await anyio.to_thread.run_sync(self._reader.call, work, abandon_on_cancel=True)


def _head(held: HeldConnections) -> tuple[int, int]:
    with held.begin() as connection:
        return _head_of(connection)


def _head_of(connection: Connection) -> tuple[int, int]:
    row = connection.execute(select(JOURNAL_HEAD.c.last, JOURNAL_HEAD.c.trimmed)).one()
    return row.last, row.trimmed


def _first(query: Select[Any], held: HeldConnections) -> str | None:
    with held.begin() as connection:
        return connection.execute(query).scalars().first()


def _events(query: Select[Any], held: HeldConnections) -> list[Event]:
    with held.begin() as connection:
        return [Event.from_json(line) for line in connection.execute(query).scalars()]


def _lines(after: int, limit: int, fleet: str | None, held: HeldConnections) -> tuple[list[Event], int, int]:
    """States that outlived the trimming, then what is kept, and the head, from one picture of the database."""
    with held.begin() as connection:
        last, trimmed = _head_of(connection)
        lines: list[str] = []
        if after < trimmed:
            table = JOURNAL_STATES.c
            old = select(table.line).where(table.seq > after, table.seq <= trimmed).order_by(table.seq)
            if fleet is not None:
                old = old.where(table.fleet == fleet)
            lines += connection.execute(old.limit(limit)).scalars()
        kept = select(JOURNAL.c.line).where(JOURNAL.c.seq > max(after, trimmed)).order_by(JOURNAL.c.seq)
        if fleet is not None:
            kept = kept.where(JOURNAL.c.fleet == fleet)
        lines += connection.execute(kept.limit(max(0, limit - len(lines)))).scalars()
    return [Event.from_json(line) for line in lines], last, trimmed


@contextmanager
def _failing(done: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError, UnicodeError) as error:
        cause = getattr(error, "orig", None) or error
        raise JournalError(f"the journal cannot be {done}: {str(cause).strip()[:500]}") from error
