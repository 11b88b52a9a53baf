"""A process that publishes until it is killed: tells each revision as soon as it is acknowledged.

It stands by with all modules loaded. For each line on its standard input, `{"url": …, "key": …, "name": …}`, it forks a
writer that publishes `{"by": "NAME-1"}`, `{"by": "NAME-2"}` and so on, and tells `["begun", pid]`,
`["acked", "NAME-1", revision]` … and `["ended"]`, when the writer is no more.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys

from agentfleet.configstore import ConfigStore
from agentfleet.stores.sql import Database, SqlConfig


def tell(*said: object) -> None:
    """Write one line at once: nothing that was told is lost with the process."""
    os.write(1, (json.dumps(said) + "\n").encode())


async def write(url: str, key: str, name: str) -> None:
    """Publish for ever."""
    async with Database(url) as database:
        store = ConfigStore(SqlConfig(database))
        for number in itertools.count(1):
            stored = await store.put(key, {"by": f"{name}-{number}"}, author=name, reason="count")
            tell("acked", f"{name}-{number}", stored.revision)


def main() -> None:
    """Fork a writer for each line."""
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            asyncio.run(write(**asked))
            os._exit(0)
        tell("begun", pid)
        os.waitpid(pid, 0)
        tell("ended")


if __name__ == "__main__":
    main()
