"""A manager of one fleet as a process: `python -m tests.kube.managing KUBECONFIG NAMESPACE JOURNAL IDENTITY`.

It takes one command a line ("deploy", "scale 8", "upgrade 2", "size") and says on its output, one JSON object a line,
what came of it, and when it leads. SIGTERM has it leave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import anyio
import anyio.to_thread
from tests.kube.world import spec

from agentfleet import Fleet, NotLeader
from agentfleet.backends.kubernetes import Connection, KubeConfig, KubernetesBackend
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.stores.sql import SqlJournal

SIZE = 6


def say(what: str, **more: Any) -> None:
    print(json.dumps({"what": what, "at": time.monotonic(), **more}), flush=True)


async def obey(fleet: Fleet, word: str, *arguments: str) -> None:
    """Carry out one command; the fleet goes on with it, whoever leads then."""
    try:
        match word:
            case "deploy":
                await fleet.deploy(wait=False)
            case "scale":
                await fleet.scale(int(arguments[0]))
            case "upgrade":
                await fleet.upgrade(arguments[0], wait=False)
            case "size":
                counts = fleet.status()
                say("size", desired=counts["desired"], good=counts["good"])
                return
    except NotLeader as error:
        say("refused", error=str(error))
    else:
        say("done", word=word)


async def manage(kubeconfig: str, namespace: str, journal: str, identity: str) -> None:
    async with (
        Connection(KubeConfig(kubeconfig), qps=500, burst=500) as connection,
        Connection(KubeConfig(kubeconfig)) as to_leases,
        anyio.create_task_group() as group,
    ):
        leases = KubernetesLeases(to_leases, namespace)
        backend = KubernetesBackend(connection, namespace=namespace)
        with SqlJournal(journal) as kept:
            async with Fleet(spec(SIZE), backend=backend, journal=kept, leases=leases, identity=identity) as fleet:

                async def leave() -> None:
                    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                        async for _ in signals:
                            group.cancel_scope.cancel()

                async def lead() -> None:
                    while True:
                        await fleet.leading()
                        say("leads")
                        while fleet.leads:  # noqa: ASYNC110 - it has no event
                            await anyio.sleep(0.05)
                        say("over")

                group.start_soon(leave)
                group.start_soon(lead)
                say("ready")
                while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                    await obey(fleet, *line.split())
    say("left")


if __name__ == "__main__":
    config, namespace, journal, identity = sys.argv[1:]
    try:
        anyio.run(manage, config, namespace, journal, identity)
    except Exception:  # noqa: BLE001 - told to whoever started it
        say("died", error=traceback.format_exc())
        os._exit(1)  # a thread waits for the next command still
