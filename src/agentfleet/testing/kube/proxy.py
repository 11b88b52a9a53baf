"""A proxy in front of an API server that fails on demand, as networks and load balancers do."""

from __future__ import annotations

import re
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, SocketStream, TaskGroup
from anyio.streams.tls import TLSListener, TLSStream

from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.certificates import Certificate
from agentfleet.testing.kube.exchange import Exchange, Rules
from agentfleet.testing.kube.programs import free_ports
from agentfleet.testing.kube.proxyfaults import Fault, Injection
from agentfleet.testing.kube.proxywire import Broken, FaultyStream

__all__ = ["FaultProxy"]

_GONE = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, Broken, ssl.SSLError, OSError)
