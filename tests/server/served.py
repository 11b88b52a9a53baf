"""A server in a process of its own, for tests: `python -m tests.server.served DATABASE TOKEN_FILE [OPTIONS as JSON]`.

It prints its address on a line of its own once it takes requests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio

from agentfleet.server.limits import Limits
from agentfleet.server.logs import log_as_json
from agentfleet.server.serving import Options, serve

PATHS = ("token_file", "tls_cert", "tls_key", "access_rules", "template", "config_schemas", "state_dir")


def main(database: str, token_file: str, more: str = "{}") -> None:
    """Serve until SIGTERM."""
    given: dict[str, Any] = {"token_file": token_file, "backend": "memory", "port": 0} | json.loads(more)
    given |= {name: Path(given[name]) for name in PATHS if given.get(name)}
    given["limits"] = Limits(**given.pop("limits", {}))
    given["operators_may"] = frozenset(given.pop("operators_may", ()))
    given["namespaces"] = tuple(given.pop("namespaces", ()))
    log_as_json("warning")
    anyio.run(_serve, Options(database=database, **given))


async def _serve(options: Options) -> None:
    await serve(options, started=lambda address: print(address, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
