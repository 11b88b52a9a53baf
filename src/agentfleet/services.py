"""What a fleet gives its agents: configuration and work. `Fleet` inherits it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel

from agentfleet import outcome
from agentfleet.acting import InstanceOperations
from agentfleet.clock import Clock
from agentfleet.configspec import ConfigRollout
from agentfleet.configstatus import ConfigStatus, config_status
from agentfleet.configstore import ConfigStore
from agentfleet.dispatch import Dispatcher
from agentfleet.errors import ConfigInvalid
from agentfleet.signals.http import HttpClient
from agentfleet.stores.acks import ConfigAcks
from agentfleet.stores.journal import Journal
from agentfleet.waiting import Timeout, timeout_of


class AgentServices(InstanceOperations):
    """Configures the agents, and hands them tasks."""

    name: str
    clock: Clock
    journal: Journal
    config: ConfigStore
    acks: ConfigAcks

    async def configure(
        self,
        document: object,
        *,
        author: str = "operator",
        reason: str = "configure",
        rollout: ConfigRollout | None = None,
        wait: bool = True,
        timeout: Timeout = None,
    ) -> int:
        """Publish a configuration and deliver it to every agent, at once or in rings.

        Args:
            document: Plain JSON values, or a pydantic model; validated by what is registered for the fleet's name.
            author: Who changes it.
            reason: Why.
            rollout: In which rings it reaches the fleet, and what stops it; None is to all at once.
            wait: Return when every running agent has acknowledged or refused it; with `rollout` when that is over.
            timeout: How long to wait; None waits for as long as it takes.

        Returns:
            The new revision.

        Raises:
            SpecError: `author`, `reason` or `timeout` is not usable; nothing was changed.
            ConfigInvalid: The document fails validation; nothing was changed.
            OperationRefused: With `rollout`: another is not over, or there is nothing to go back to yet.
            RolloutFailed: With `rollout`: it was stopped, and taken back where its policy says so; or another revision
                was published meanwhile.
            DeadlineExceeded: Not everybody has answered in time; the push goes on.
        """
        seconds = timeout_of(timeout)
        self._runtime.check_open()
        if not isinstance(document, Mapping | BaseModel):
            raise ConfigInvalid(f"the document must be an object with named settings, not {type(document).__name__}")
        if rollout is not None:
            self._runtime.deployed()
        stored = await self.config.put(self.name, document, author=author, reason=reason, rollout=rollout)
        if wait and rollout is not None:
            await outcome.configured(self._runtime, stored.revision, seconds)
        elif wait:
            feed = self._runtime.feed
            answered = "all agents have answered"
            await self._runtime.waiting.within(seconds, answered, lambda: feed.wait_settled(stored.revision))
        return stored.revision

    async def config_status(self) -> ConfigStatus:
        """What configuration is out, who runs which revision, and how far a rollout in rings has come.

        Any manager may be asked, whether it leads or not.

        Raises:
            ConfigError: The store, or where acknowledgements are kept, cannot be asked.
            DeadlineExceeded: It did not answer in time.
        """
        if self.leads:
            return await config_status(self.config, self.name, self._runtime.configuring.book.known.values())
        _, acks = await self.acks.after(self.name, 0)
        return await config_status(self.config, self.name, acks)

    @asynccontextmanager
    async def dispatcher(self, **options: Any) -> AsyncIterator[Dispatcher]:
        """A least-loaded dispatcher in front of this fleet, with the tasks that the journal says are open taken up.

        While it is open its depth is the fleet's "queue" metric; the depths of several are added up. One that is opened
        beside another leaves the tasks in the journal alone: they are the other's.

        Args:
            options: Limits of `Dispatcher`, such as `per_instance` and `max_attempts`.
        """
        self._runtime.check_open()
        async with (
            HttpClient() as http,
            Dispatcher(
                self.endpoints(), http=http, clock=self.clock, journal=self.journal, fleet=self.name, **options
            ) as dispatcher,
        ):
            if not self._runtime.meter.has_queue:
                await dispatcher.recover()
            with self._runtime.meter.queueing(lambda: dispatcher.depth):
                yield dispatcher
