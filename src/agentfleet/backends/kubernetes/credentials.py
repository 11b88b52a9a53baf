"""Who asks, and whom: access to one API server, read from a kubeconfig or from the pod that we run in.

A source is asked for an `Access` before each call and answers from memory as long as that is good: files are looked at
once a minute, a credential plugin is run when what it gave runs out, and both at once after a 401. An `Access` whose
`tls` part differs from the last one's needs a new TLS client; a new token alone does not.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio

from agentfleet.backends.kubernetes.credentials_impersonation import impersonation_of
from agentfleet.backends.kubernetes.credentials_kubeconfig import Settings, load_settings
from agentfleet.backends.kubernetes.credentials_plugin import run_plugin, run_provider
from agentfleet.errors import SpecError

__all__ = ["Access", "Credentials", "InCluster", "KubeConfig", "Tls"]

_log = logging.getLogger(__name__)

REREAD = 60.0
"""Seconds after which files are looked at again, as Kubernetes' own clients do."""
SKEW = 30.0
"""Seconds before its expiry from which a credential is not used any more."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class Tls:
    """What one TLS client is built from. Contents, not paths: a file may change under the same name."""

    ca: bytes | None = None
    """PEM; None trusts the machine's own authorities."""
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    verify: bool = True
    server_name: str | None = None
    proxy: str | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an API server as somebody."""

    server: str
    """"https://host:port", perhaps with a path, without a slash at the end."""
    tls: Tls
    authorization: str | None = field(default=None, repr=False)
    """The whole Authorization header."""
    namespace: str = "default"
    impersonation: tuple[tuple[str, str], ...] = ()
    """Headers that say as whom each request is made, where that is somebody else."""


class Credentials(Protocol):
    """Where an `Access` comes from."""

    async def access(self, *, rejected: Access | None = None) -> Access:
        """What to use now.

        Args:
            rejected: What the server answered 401 to: whatever this is read from is read again now.

        Raises:
            SpecError: The configuration cannot be read or is wrong.
            BackendUnavailable: A credential plugin failed.
            DeadlineExceeded: It did not answer in time.
        """
        ...


class _Cached:
    """Reads again when it is time to, and never twice at once."""

    def __init__(self) -> None:
        self._lock = anyio.Lock()
        self._access: Access | None = None
        self._read_at = float("-inf")

    async def access(self, *, rejected: Access | None = None) -> Access:
        """See `Credentials.access`."""
        if (access := self._usable(rejected)) is not None:
            return access
        async with self._lock:
            if (access := self._usable(rejected)) is not None:  # another call has read it while this one waited
                return access
            try:
                access = await self._read(forced=rejected is not None)
            except SpecError as error:
                if self._access is None or rejected is not None:
                    raise
                # a file is just being replaced, say; what was read before holds until the server says otherwise
                _log.warning("credentials cannot be read again, the old ones stay in use: %s", error)
                access = self._access
            self._access, self._read_at = access, anyio.current_time()
            return access

    def _usable(self, rejected: Access | None) -> Access | None:
        if self._access is None or self._access is rejected or anyio.current_time() - self._read_at >= REREAD:
            return None
        return self._access

    async def _read(self, *, forced: bool) -> Access:
        raise NotImplementedError


class InCluster(_Cached):
    """The service account of the pod that we run in; its token and certificate are replaced on disk now and then.

    Args:
        folder: Where the kubelet puts them.
        environ: Where the API server's address is found.
    """

    def __init__(self, folder: Path = SERVICE_ACCOUNT, environ: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._environ = os.environ if environ is None else environ

    @staticmethod
    def found() -> bool:
        """Whether we run in a pod with a service account."""
        return "KUBERNETES_SERVICE_HOST" in os.environ and (SERVICE_ACCOUNT / "token").exists()

    async def _read(self, *, forced: bool) -> Access:  # noqa: ARG002 - files are read whenever we are asked
        host, port = (self._environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port:
            raise SpecError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: not in a pod?")
        token = read_file(self._folder / "token").decode().strip()
        if not token:
            raise SpecError(f"{self._folder / 'token'} is empty")
        name = self._folder / "namespace"
        return Access(
            server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
            tls=Tls(ca=read_file(self._folder / "ca.crt")),
            authorization=f"Bearer {token}",
            namespace=read_file(name).decode().strip() if exists(name) else "default",
        )


class KubeConfig(_Cached):
    """One context of a kubeconfig.

    Args:
        path: The file, or several joined by ":" as in $KUBECONFIG; by default $KUBECONFIG or ~/.kube/config.
        context: Name of the context; the current one by default.
        plugin_timeout: Seconds that a credential plugin may take.
    """

    def __init__(
        self, path: str | Path | None = None, context: str | None = None, *, plugin_timeout: float = 30.0
    ) -> None:
        super().__init__()
        self._paths = str(path or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
        self._context = context
        self._plugin_timeout = plugin_timeout
        self._plugged: Mapping[str, object] = {}
        self._plugged_by: object = None
        self._plugged_until = float("-inf")

    async def _read(self, *, forced: bool) -> Access:
        settings = load_settings(self._paths, self._context)
        cluster, user = settings.cluster, settings.user
        impersonation = impersonation_of(user, settings.context)
        given = await self._from_plugin(settings, forced=forced) if "exec" in user else {}
        authorization = _authorization(settings, given)
        if authorization is None and "auth-provider" in user:
            authorization = await run_provider(settings, self._plugin_timeout)
        certificate, key = (_data(user, f"client-{part}", settings) for part in ("certificate", "key"))
        if "clientCertificateData" in given:
            certificate, key = (str(given[f"client{part}Data"]).encode() for part in ("Certificate", "Key"))
        server = str(cluster.get("server", "")).rstrip("/")
        if not server:
            raise SpecError(f"{self._paths}: the cluster of context {settings.context!r} has no server")
        return Access(
            server=server,
            tls=Tls(
                ca=_data(cluster, "certificate-authority", settings),
                certificate=certificate,
                key=key,
                verify=not cluster.get("insecure-skip-tls-verify", False),
                server_name=_text(cluster.get("tls-server-name")),
                proxy=_text(cluster.get("proxy-url")),
            ),
            authorization=authorization,
            namespace=settings.namespace,
            impersonation=impersonation,
        )

    def _usable(self, rejected: Access | None) -> Access | None:
        if anyio.current_time() >= self._plugged_until and self._plugged_by is not None:
            return None
        return super()._usable(rejected)

    async def _from_plugin(self, settings: Settings, *, forced: bool) -> Mapping[str, object]:
        """What the user's credential plugin gives; kept until it runs out, or is rejected, or another one is meant."""
        plugin = settings.user["exec"]
        if forced or plugin != self._plugged_by or anyio.current_time() >= self._plugged_until:
            self._plugged, lifetime = await run_plugin(settings, self._plugin_timeout)
            self._plugged_by = plugin
            self._plugged_until = anyio.current_time() + max(lifetime - SKEW, lifetime / 2, 1.0)
        return self._plugged


def _authorization(settings: Settings, given: Mapping[str, object]) -> str | None:
    """The Authorization header from a plugin's answer or the user's own entry; None without token and password."""
    user = settings.user
    if "token" in given:
        return f"Bearer {given['token']}"
    if user.get("tokenFile"):  # wins over `token`, as in kubectl
        return f"Bearer {read_file(settings.folder_of(user) / str(user['tokenFile'])).decode().strip()}"
    if user.get("token"):
        return f"Bearer {user['token']}"
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"
    return None


def _data(entry: Mapping[str, object], name: str, settings: Settings) -> bytes | None:
    """The contents of `name`, which the entry holds in base64 or names a file for."""
    if entry.get(f"{name}-data"):
        try:
            return base64.b64decode(str(entry[f"{name}-data"]), validate=False)
        except binascii.Error as error:
            raise SpecError(f"{settings.context}: {name}-data is not base64: {error}") from error
    if entry.get(name):
        return read_file(settings.folder_of(entry) / str(entry[name]))
    return None


def _text(value: object) -> str | None:
    return str(value) if value else None


def exists(path: Path) -> bool:
    """Whether there is such a file."""
    return path.exists()


def read_file(path: Path) -> bytes:
    """The contents of a small local file; raises `SpecError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from error
