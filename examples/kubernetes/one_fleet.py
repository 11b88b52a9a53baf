"""A manager of one fleet in a cluster, for a program of your own. Run two of it: one leads, the other takes over.

    FLEET=fleet.yaml JOURNAL=postgresql://fleet@db/fleet python one_fleet.py

For many fleets and an API there is `agentfleet serve` (manager.yaml).

It needs `agentfleet[kubernetes,sql]`, a kubeconfig or a pod's own service account, and the rights of rbac.yaml.
"""

from __future__ import annotations

import logging
import os
import signal

import anyio

from agentfleet import Fleet, FleetSpec, NotLeader, RolloutFailed
from agentfleet.backends.kubernetes import Connection, KubernetesBackend
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.stores.sql import SqlJournal

log = logging.getLogger("manager")


async def leave_when_asked(scope: anyio.CancelScope) -> None:
    """SIGTERM and SIGINT: hand over at once. The instances stay."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("asked to leave by %s", number.name)
            scope.cancel()


async def lead(fleet: Fleet) -> None:
    """Whenever it is our turn: have the fleet be as its file says, and keep it so."""
    while True:
        await fleet.leading()
        log.info("leads %s", fleet.name)
        try:
            await fleet.deploy()
            log.info("%s is as it should be: %s", fleet.name, fleet.status())
        except NotLeader:
            continue
        except RolloutFailed as error:  # it has been rolled back, or waits for another spec: keep what runs
            log.error("%s", error)  # noqa: TRY400 - the message says it all
        while fleet.leads:  # noqa: ASYNC110 - a leader has nothing else to do here
            await anyio.sleep(1.0)


async def main() -> None:
    """Stand by, lead, and leave in good order."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    spec = FleetSpec.from_yaml(await anyio.Path(os.environ["FLEET"]).read_text())
    async with Connection.find() as connection, Connection.find() as to_leases, anyio.create_task_group() as group:
        group.start_soon(leave_when_asked, group.cancel_scope)
        namespace = await connection.namespace()
        backend, leases = KubernetesBackend(connection), KubernetesLeases(to_leases, namespace)
        with SqlJournal(os.environ["JOURNAL"]) as journal:
            async with Fleet(spec, backend=backend, journal=journal, leases=leases) as fleet:
                await lead(fleet)


if __name__ == "__main__":
    anyio.run(main)
