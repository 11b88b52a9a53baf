"""The parts that configure one fleet, put together: what instances have said, the feed, and the rollout in rings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio

from agentfleet.clock import Clock
from agentfleet.configacks import AckBook
from agentfleet.configassign import Assignment
from agentfleet.configrings import ConfigRings
from agentfleet.configstore import ConfigStore
from agentfleet.core.fence import Fence
from agentfleet.desk import Desk, Record
from agentfleet.feed import ConfigFeed, Keep
from agentfleet.fencing import FencedRequests
from agentfleet.signals.http import Requests
from agentfleet.stores.acks import ConfigAcks
from agentfleet.stores.config import RolloutRecord
from agentfleet.stores.config_journaled import ROLLOUT, TRIAL, remembered
from agentfleet.stores.journal import Journal
from agentfleet.turn import Turn


class Configuring:
    """Configures one fleet while its manager leads. See `ConfigFeed` and `ConfigRings` for the arguments."""

    def __init__(
        self,
        store: ConfigStore,
        desk: Desk,
        turn: Turn,
        *,
        acks: ConfigAcks,
        http: Requests,
        clock: Clock,
        record: Record,
        credential: Callable[[str], str | None],
        on_met: Callable[[str], None],
        keep: Keep | None,
        remember: bool,
        fence: Fence,
        sees: Callable[[], bool],
    ) -> None:
        key = desk.spec.name
        self.book = AckBook(acks, key, clock=clock)
        self.feed = ConfigFeed(
            store,
            key,
            http=FencedRequests(http, fence),
            clock=clock,
            record=record,
            acks=self.book,
            credential=credential,
            on_met=on_met,
            keep=keep,
            remember=remember,
        )
        self.rings = ConfigRings(
            store, key, desk=desk, turn=turn, acks=self.book, clock=clock, record=record, fence=fence, sees=sees
        )

    def restore(self, journal: Journal, fleet: str) -> None:
        """Take up what an earlier manager delivered last, before the store is asked, which may be out of reach."""
        everyone, trial = remembered(journal, fleet), remembered(journal, fleet, TRIAL)
        state = journal.last_state(fleet, ROLLOUT)
        record = None if state is None else RolloutRecord.from_dict(state.data)
        on_trial = trial is not None and record is not None and record.revision == trial.revision
        newer = everyone is None or (trial is not None and trial.revision > everyone.revision)
        if trial is not None and record is not None and on_trial and newer:
            self.feed.restore(Assignment(everyone, trial, frozenset(record.trials)))
        else:
            self.feed.restore(Assignment(everyone))

    async def run(self) -> None:
        """Configure until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(self.rings.run), name="rings")
            await self.feed.run()
