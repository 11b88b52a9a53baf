"""A client of the REST API (extra `agentfleet[client]`), typed by the same models as the server.

::

    async with FleetClient("https://fleet-a:8080", "https://fleet-b:8080", token=token) as client:
        made = await client.create(ClusterConfig(cluster_name="researchers", template=template))
        await client.finished(made.operation_id, timeout="5m")
"""

from __future__ import annotations

from agentfleet.errors import MissingExtra

try:
    import aiohttp as _aiohttp
except ImportError as error:
    raise MissingExtra("the client needs 'agentfleet[client]': pip install 'agentfleet[client]'") from error

from agentfleet.client.client import FleetClient
from agentfleet.rest.clusters import ClusterConfig, ClusterFromSpec, RemoteSpec

del _aiohttp

__all__ = ["ClusterConfig", "ClusterFromSpec", "FleetClient", "RemoteSpec"]
