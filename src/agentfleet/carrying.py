"""Carries one operation out on a fleet that this manager leads: states what is wanted, then waits until it is so.

An operation may have been begun by an earlier leader, which died before it wrote that down. So beginning looks first
whether what is asked for is so already, and says the same again otherwise; only what cannot be said twice
(`operations.resumable`) is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentfleet.errors import OperationRefused
from agentfleet.fleet import Fleet
from agentfleet.operations import Apply, Deploy, Isolate, Kind, Operation, Replace, Rollback, Scale
from agentfleet.specs import AgentTemplate
from agentfleet.state import FleetState

Outcome = Mapping[str, Any]


def target_of(fleet: Fleet, operation: Operation) -> int:
    """The revision that a rollback goes to: chosen once, because choosing again would go back further.

    Raises:
        OperationRefused: There is no earlier good revision.
    """
    chosen = operation.outcome.get("revision") or Rollback.parse(operation.arguments).revision
    state = fleet.state
    if chosen is None and state is not None:
        chosen = state.fallback
    if chosen is None:
        raise OperationRefused(f"fleet {fleet.name} has no earlier good revision to roll back to")
    return int(chosen)


async def begin(fleet: Fleet, operation: Operation) -> Outcome:
    """State what an operation wants; returns what is known of it then. Raises as the fleet's methods do."""
    match operation.kind:
        case Kind.CREATE | Kind.APPLY:
            return await _deploy(fleet, operation)
        case Kind.DEPLOY:
            return await _upgrade(fleet, operation)
        case Kind.ROLLBACK:
            return await _roll_back(fleet, operation)
        case Kind.SCALE:
            replicas = Scale.parse(operation.arguments).replicas
            if fleet.state is None or fleet.state.replicas != replicas:
                await fleet.scale(replicas)
            return {"replicas": replicas}
        case Kind.STOP:
            await fleet.stop(wait=False)
        case Kind.START:
            await fleet.start(wait=False)
        case Kind.PAUSE:
            await fleet.pause()
        case Kind.RESUME:
            await fleet.resume()
        case Kind.DELETE:
            pass  # said and waited for in one, by `finish`
        case _:
            await _with_instance(fleet, operation)
    return {}


async def finish(fleet: Fleet, operation: Operation) -> Outcome:
    """Wait until what an operation wanted is so; raises where it does not come to be.

    A fleet that is paused, stopped or of size 0 takes a revision on and does not roll it out: it is "held" then.
    """
    match operation.kind:
        case Kind.CREATE | Kind.APPLY:
            await fleet.brought_up()
        case Kind.DEPLOY | Kind.ROLLBACK:
            await fleet.rolled_out(operation.outcome["revision"])
        case Kind.SCALE | Kind.START:
            await fleet.ready(timeout=fleet.spec.rollout.progress_deadline)
        case Kind.STOP:
            await fleet.emptied()
        case Kind.DELETE:
            if fleet.state is not None:  # else it was never brought up
                await fleet.delete()
        case _:
            pass
    revision, state = operation.outcome.get("revision"), fleet.state
    held = revision is not None and state is not None and state.target == revision and state.rolling
    return {"held": True} if held else {}


def changed(template: AgentTemplate, deploy: Deploy) -> AgentTemplate:
    """A template with what a deployment changes.

    Raises:
        SpecError: A change is not valid; the message names the field.
    """
    version = {} if deploy.version is None else {"version": deploy.version}
    return AgentTemplate.parse({**template.to_dict(), **deploy.changes, **version}, source="the changed template")


async def _deploy(fleet: Fleet, operation: Operation) -> Outcome:
    if Apply.parse({"spec": operation.arguments["spec"]}).spec != fleet.spec:
        raise OperationRefused(f"another spec of fleet {fleet.name} was applied since")
    await fleet.deploy(wait=False)
    assert fleet.state is not None, "it was just deployed"
    if operation.kind is Kind.APPLY:
        await _return_to_spec(fleet, fleet.state)
    return {"revision": fleet.state.target, "version": fleet.state.template.version}


async def _return_to_spec(fleet: Fleet, state: FleetState) -> None:
    """Have what was deployed, rolled back or scaled since the last spec be as the new one says.

    `Fleet.deploy` looks only at what differs from the last spec, because a program says the same one at each start.
    """
    if state.template != fleet.spec.template:
        await fleet.upgrade(wait=False, **_fields(fleet.spec.template))
    if fleet.spec.scaling is None and state.replicas != fleet.spec.replicas:
        await fleet.scale(fleet.spec.replicas)


def _fields(template: AgentTemplate) -> dict[str, Any]:
    return {name: getattr(template, name) for name in AgentTemplate.model_fields}


async def _upgrade(fleet: Fleet, operation: Operation) -> Outcome:
    state = fleet.state
    if state is None or state.deleted:
        raise OperationRefused(f"fleet {fleet.name} is not deployed")
    template = changed(state.template, Deploy.parse(operation.arguments))
    if template != state.template:
        revision = await fleet.upgrade(wait=False, **_fields(template))
        return {"revision": revision.number, "version": template.version}
    return {"revision": state.target, "version": template.version}


async def _roll_back(fleet: Fleet, operation: Operation) -> Outcome:
    target = target_of(fleet, operation)
    if fleet.state is None or fleet.state.target != target:
        await fleet.rollback(target, wait=False)
    assert fleet.state is not None, "it was just rolled back"
    return {"revision": target, "version": fleet.state.template.version}


async def _with_instance(fleet: Fleet, operation: Operation) -> None:
    id = operation.arguments["instance"]
    match operation.kind:
        case Kind.RESTART:
            await fleet.restart(id)
        case Kind.REPLACE:
            await fleet.replace(id, elsewhere=Replace.parse(operation.arguments).elsewhere)
        case Kind.ISOLATE:
            asked = Isolate.parse(operation.arguments)
            await fleet.isolate(id, reason=asked.reason, keep=asked.keep)
        case Kind.RELEASE:
            await fleet.release(id)
