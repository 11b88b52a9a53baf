"""What agents ask of a server: their configuration. Who may is judged as for everything else; no bound is passed.

Whoever may look at a cluster may fetch what an instance is assigned. What an instance says of itself decides whether a
rollout goes on, and a stream takes the place of the instance's own: for both a token must be an agent's, or *operate*.
"""

from __future__ import annotations

import time
from weakref import WeakValueDictionary

from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from agentfleet.delivery import ConfigDelivery
from agentfleet.errors import (
    AgentFleetError,
    BackendUnavailable,
    DeadlineExceeded,
    NotFound,
    OperationRefused,
    RecordUnreadable,
)
from agentfleet.server import config, problems
from agentfleet.server.context import Api
from agentfleet.server.crowds import Crowds, pace_of
from agentfleet.server.exchange import exchange_of
from agentfleet.server.gate import limit, principal_now, recognise
from agentfleet.server.limits import Rates
from agentfleet.server.principals import Principal
from agentfleet.stores.acks import ConfigAck
from agentfleet.stores.fleets import FleetRecord, UnreadFleet
from agentfleet.stores.tokens import Scope

_MOST = 100_000
"""Agents whose rate is remembered."""
_KINDS = {400: "malformed", 404: "not-found", 405: "method-not-allowed", 413: "too-large", 422: "invalid"}


class AgentsApp(config.ConfigApp):
    """Delivers configuration to the agents of every fleet of a manager. It is behind the gate.

    Args:
        api: What the routes share.
    """

    def __init__(self, api: Api) -> None:
        super().__init__(
            self._delivery, self._admit, again=self._admit_again, beat=api.limits.beat, longest=api.limits.stream
        )
        self._api = api
        # buckets of their own: made-up names push nobody else's out
        self._rates = Rates(api.limits.rate, api.limits.burst, time.monotonic, most=_MOST)
        self._crowds = Crowds(api.manager.records, api.clock)
        self._deliveries: WeakValueDictionary[str, ConfigDelivery] = WeakValueDictionary()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request; refusals are the gate's to answer."""
        exchange = exchange_of(scope)
        exchange.route = config.route_of(scope)
        exchange.principal = await recognise(self._api, exchange)
        exchange.routine = exchange.principal.is_agent
        exchange.counts = not exchange.routine  # agents' own words are too many, and kept where they belong
        try:
            await self._serve(scope, receive, send)
        except config.Refusal as refusal:
            kind = _KINDS.get(refusal.status, "unavailable")
            errors = problems.fields_of(refusal.detail) if refusal.status in (400, 422) else ()
            raise problems.Refusal(
                refusal.status, kind, refusal.detail, errors=errors, headers=refusal.headers
            ) from refusal

    async def _admit(self, scope: AsgiScope, cluster: str, instance: str) -> None:
        """Let whoever may speak for a cluster's agents in, as often as they may, and have its delivery begin."""
        exchange = exchange_of(scope)
        assert exchange.principal is not None, "who asks was asked before"
        record = self._record(exchange.principal, cluster)
        exchange.note(fleet=record.name)
        if config.speaks(scope):
            _check_speaks(exchange.principal)
        who = f"{exchange.principal.credential} {record.name}"
        limit(self._api, exchange, f"{who} {instance}", rates=self._rates)
        limit(self._api, exchange, who, rates=self._rates, times=pace_of(record))
        try:
            delivery = self._deliveries[record.name] = await self._api.manager.delivery(record.name)
        except OperationRefused as error:  # it has left, and answers on for those who have not noticed
            raise problems.later(503, "unavailable", str(error)) from error
        await self._crowds.admit(record, delivery.book, instance)

    async def _admit_again(self, scope: AsgiScope, cluster: str, instance: str) -> None:
        """Whether a stream may go on. While nobody can tell it does: the agent needs it more than ever."""
        del instance
        try:
            principal = await principal_now(self._api, exchange_of(scope))
            if principal is None:
                raise config.Refusal(401, "nobody is known by these credentials any more")
            self._record(principal, cluster)
            _check_speaks(principal)
        except (BackendUnavailable, DeadlineExceeded):
            return
        except (AgentFleetError, problems.Refusal) as error:
            raise config.Refusal(403, str(error)) from error

    async def _stream(
        self, delivery: ConfigDelivery, instance: str, scope: AsgiScope, receive: Receive, send: Send
    ) -> None:
        principal = exchange_of(scope).principal
        assert principal is not None, "who asks was asked before"
        self._api.agents.check(principal.credential)
        with self._api.agents.taken(principal.credential):
            await super()._stream(delivery, instance, scope, receive, send)

    async def _hear(self, delivery: ConfigDelivery, said: ConfigAck, scope: AsgiScope) -> None:
        await super()._hear(delivery, said, scope)
        refused = f", has refused {said.refused}" if said.refused else ""
        exchange_of(scope).note(detail=f"as {said.instance}: runs {said.revision}{refused}"[:500])

    def _record(self, principal: Principal, cluster: str) -> FleetRecord:
        principal.require(Scope.AGENT)
        record = self._api.manager.known(cluster)
        if record is None or not principal.reaches(record.name):
            raise NotFound(f"there is no cluster {cluster!r:.300}")
        if isinstance(record, UnreadFleet):
            raise RecordUnreadable(record.trouble)
        return record

    def _delivery(self, cluster: str) -> ConfigDelivery | None:
        record = self._api.manager.known(cluster)
        return None if record is None else self._deliveries.get(record.name)


def _check_speaks(principal: Principal) -> None:
    if not principal.speaks:
        raise problems.Refusal(
            403,
            "forbidden",
            f"this needs the scope {Scope.AGENT} or {Scope.OPERATE}, and {principal.name} has {principal.scope}; "
            "a configuration may be fetched without 'running'",
        )
