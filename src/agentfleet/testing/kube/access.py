"""How a cluster is reached: address, authority, credentials; read from and written to kubeconfig files."""

from __future__ import annotations

import base64
import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from agentfleet.errors import SpecError


@dataclass(frozen=True, slots=True)
class Access:
    """One user's way to one API server.

    Attributes:
        server: The server's URL.
        ca: The authority's certificate in PEM; None for the system's authorities.
        token: The bearer token.
        certificate: The client's certificate and key in one PEM.
        verify: Whether the server's certificate is checked.
    """

    server: str
    ca: str | None = None
    token: str | None = None
    certificate: str | None = None
    verify: bool = True

    def with_token(self, token: str) -> Access:
        """The same server as another user."""
        return replace(self, token=token, certificate=None)

    def ssl_context(self, folder: Path) -> ssl.SSLContext | None:
        """What TLS needs; None for a plain http server. `folder` holds a client certificate while it is read."""
        if not self.server.startswith("https:"):
            return None
        context = ssl.create_default_context(cadata=self.ca)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            file = folder / "client.pem"
            file.touch(mode=0o600)
            file.write_text(self.certificate)
            context.load_cert_chain(file)
            file.unlink()
        return context

    def write(self, path: Path, *, namespace: str = "default") -> Path:
        """Write a kubeconfig file, and return its path."""
        cluster: dict[str, Any] = {"server": self.server}
        if self.ca is not None:
            cluster["certificate-authority-data"] = _encode(self.ca)
        if not self.verify:
            cluster["insecure-skip-tls-verify"] = True
        user: dict[str, Any] = {}
        if self.token is not None:
            user["token"] = self.token
        if self.certificate is not None:
            user |= {"client-certificate-data": _encode(self.certificate), "client-key-data": _encode(self.certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path

    @classmethod
    def read(cls, path: Path, context: str | None = None) -> Access:
        """Read a kubeconfig file. Tokens and certificates are understood, exec plugins are not."""
        config = yaml.safe_load(path.read_text())
        chosen = context or config.get("current-context")
        named = _named(config, "contexts", chosen, path)
        cluster = _named(config, "clusters", named["cluster"], path)
        user = _named(config, "users", named.get("user"), path)
        if "exec" in user or "auth-provider" in user:
            raise SpecError(
                f"{path}: user {named.get('user')!r} gets its credentials from a plugin, which this test support "
                "does not run: write a kubeconfig with a token (kubectl create token)"
            )
        folder = path.parent
        token = user.get("token") or (Path(user["tokenFile"]).read_text().strip() if "tokenFile" in user else None)
        certificate = _pem(user, "client-certificate", folder)
        key = _pem(user, "client-key", folder)
        return cls(
            server=cluster["server"],
            ca=_pem(cluster, "certificate-authority", folder),
            token=token,
            certificate=f"{certificate}\n{key}" if certificate and key else None,
            verify=not cluster.get("insecure-skip-tls-verify", False),
        )


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _pem(entry: dict[str, Any], field: str, folder: Path) -> str | None:
    if data := entry.get(f"{field}-data"):
        return base64.b64decode(data).decode()
    return (folder / entry[field]).read_text() if field in entry else None


def _named(config: dict[str, Any], kind: str, name: str | None, path: Path) -> dict[str, Any]:
    for entry in config.get(kind) or []:
        if entry["name"] == name:
            found: dict[str, Any] = entry[kind[:-1]]
            return found
    raise SpecError(f"{path} has no {kind[:-1]} named {name!r}: name one of its own, or set current-context")
