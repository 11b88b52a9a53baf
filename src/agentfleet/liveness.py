"""Asks the manager on this machine whether it lives, for a container's HEALTHCHECK; the standard library alone."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path

ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a server listens to
"""Where a server is asked that listens on all addresses."""


def ask(host: str, port: int, *, path: str = "/livez", certificate: Path | None = None, timeout: float = 3.0) -> str:
    """Ask once, directly: no proxy, no redirect.

    Args:
        host: Where the manager listens, as it was told itself.
        port: And the port.
        path: What to ask for.
        certificate: The manager's own certificate (PEM), if it speaks TLS: none but this one is trusted.
        timeout: Seconds for each step of the exchange.

    Returns:
        The answer's first line, such as "200 OK".

    Raises:
        OSError: There was no answer, or not in time; or it was no HTTP, or not of this certificate.
        RuntimeError: The answer was another than 2xx; the message is that answer.
    """
    host = ANYWHERE.get(host, host)
    if certificate is None:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=_trusting(certificate))
    try:
        connection.request("GET", path)
        with connection.getresponse() as answer:
            said = f"{answer.status} {answer.reason}".strip()
    except http.client.HTTPException as error:
        raise OSError(f"{host}:{port} does not speak HTTP: {error!r}") from error
    finally:
        connection.close()
    if not 200 <= answer.status < 300:
        raise RuntimeError(said)
    return said


def _trusting(certificate: Path) -> ssl.SSLContext:
    """Trust this certificate, whoever has signed it and whatever names it holds: it is asked for on loopback."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
