"""A real Kubernetes control plane on loopback: etcd, API server, controller manager, scheduler; for tests."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
from anyio import to_thread

from agentfleet.errors import AgentFleetError, OperationRefused
from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.assets import find_assets, server_version
from agentfleet.testing.kube.certificates import Authority
from agentfleet.testing.kube.client import Client
from agentfleet.testing.kube.commands import APISERVER, CONTROLLERS, ETCD, SCHEDULER, PlaneOptions, Setup
from agentfleet.testing.kube.errors import ApiRefused, PlaneFailed
from agentfleet.testing.kube.programs import Program
from agentfleet.testing.kube.scratch import Scratch

__all__ = ["ControlPlane", "PlaneOptions"]

_ATTEMPTS = 3  # when another program takes a port between our looking and our using it


class ControlPlane:
    """Starts a control plane of its own, or names an existing cluster; either way it can be asked and written to.

    An async context manager. `start` and `stop` may also be called one by one, and from different event loops: nothing
    here is bound to one. Its programs end with the thread that called `start`, however that ends.

    Args:
        options: How the plane is set up.
        assets: The directory of the programs; found by `find_assets` unless given.
        kubeconfig: An existing cluster instead. Nothing is started then, and what hurts the cluster is refused.
        context: The context in that kubeconfig; its current one unless given.
        timeout: Seconds within which the plane must be ready.
    """

    def __init__(
        self,
        options: PlaneOptions | None = None,
        *,
        assets: Path | None = None,
        kubeconfig: Path | None = None,
        context: str | None = None,
        timeout: float = 120,
    ) -> None:
        self.options = options or PlaneOptions()
        self.programs: Mapping[str, Program] = {}
        """What runs, by name; empty for an existing cluster."""
        self._assets = assets
        self._existing = None if kubeconfig is None else Access.read(kubeconfig, context)
        self._timeout = timeout
        self._scratch: Scratch | None = None
        self._admin: Client | None = None
        self._setup: Setup | None = None
        self._etcd: Client | None = None
        self._written = 0
        self.version: tuple[int, int] = (0, 0)
        """The API server's version, as (1, 20)."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.stop()

    # ------------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start everything and wait until pods can be created and scheduled.

        Raises:
            AssetsMissing: The programs are not on this machine.
            PlaneFailed: A program ended, or was not ready in time; the message ends with its log.
        """
        if self._scratch is not None:
            return
        self._scratch = Scratch()
        try:
            if self._existing is not None:
                await self._join(self._existing)
                return
            place = self._assets or find_assets()
            self.version = await to_thread.run_sync(server_version, place)
            await self._start_on_free_ports(place, self._scratch.path)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.stop()
            raise

    async def _start_on_free_ports(self, place: Path, folder: Path) -> None:
        for attempt in range(1, _ATTEMPTS):
            try:
                await self._start(place, folder / str(attempt))
            except PlaneFailed as error:
                if "address already in use" not in str(error):
                    raise
                self._kill()
            else:
                return
        await self._start(place, folder / str(_ATTEMPTS))

    async def stop(self) -> None:
        """End every program and remove every file. Harmless when nothing runs."""
        self._kill()
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _kill(self) -> None:
        for program in reversed(list(self.programs.values())):
            program.kill()

    async def _join(self, access: Access) -> None:
        self._admin = Client(access)
        said = await self._admin.get("/version")
        self.version = (int(said["major"]), int(said["minor"].rstrip("+")))

    async def _start(self, place: Path, folder: Path) -> None:
        setup = self._setup = await to_thread.run_sync(Setup, place, folder, self.options, self.version)
        self._admin, self._etcd = Client(setup.access), Client(setup.etcd)
        self.programs = {name: Program(line, log=folder / f"{name}.log") for name, line in setup.lines().items()}
        self.programs[ETCD].start()
        self.programs[APISERVER].start()
        await self._until(self._api_ready, f"{APISERVER} to be ready")
        managers = (CONTROLLERS, SCHEDULER)
        for name in managers:
            self.programs[name].start()
        for name in managers:
            asked = Client(setup.health_of(name))
            await self._until(partial(_says_ok, asked, "/healthz"), f"{name} to be healthy")
        await self._until(partial(self._usable, "default"), "the service account of the namespace default")

    # ------------------------------------------------------------------------------------------------ access

    @property
    def api(self) -> Client:
        """A simple client that is allowed everything."""
        if self._admin is None:
            raise OperationRefused("the control plane has not been started: use `async with ControlPlane() as plane`")
        return self._admin

    @property
    def access(self) -> Access:
        """The admin's access: `server`, `ca` and `token`."""
        return self.api.access

    @property
    def nobody(self) -> Access:
        """A user who is known and allowed nothing."""
        return self._ours("name an unprivileged user").nobody

    @property
    def authority(self) -> Authority:
        """Signs further certificates: of clients, and of servers that clients of this plane trust."""
        return self._ours("sign certificates").authority

    @property
    def folder(self) -> Path:
        """A directory that goes with the plane."""
        if self._scratch is None:
            raise OperationRefused("the control plane is not running: start it first")
        return self._scratch.path

    def kubeconfig(
        self, access: Access | None = None, *, server: str | None = None, namespace: str = "default"
    ) -> Path:
        """Write a kubeconfig file that goes with the plane.

        Args:
            access: As whom; the admin unless given.
            server: Another URL, as that of a proxy.
            namespace: The context's namespace.
        """
        chosen = access or self.access
        if server is not None:
            chosen = Access(server, chosen.ca, chosen.token, chosen.certificate, chosen.verify)
        self._written += 1
        return chosen.write(self.folder / f"kubeconfig-{self._written}", namespace=namespace)

    async def service_account(self, namespace: str, name: str, *, seconds: int = 3600) -> Access:
        """Access as a service account, by a token of its own that the server issues; the account must exist."""
        answer = await self.api.post(
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": seconds}},
        )
        return self.access.with_token(answer["status"]["token"])

    async def namespace(self, name: str | None = None, *, timeout: float = 30) -> str:
        """Create a namespace, wait until pods can be created in it, and return its name."""
        chosen = name or f"test-{secrets.token_hex(4)}"
        await self.api.post("/api/v1/namespaces", {"metadata": {"name": chosen}})
        await self._until(partial(self._usable, chosen), f"the service account of namespace {chosen}", timeout)
        return chosen

    # ------------------------------------------------------------------------------------------------ state

    async def ready(self, timeout: float = 30) -> None:
        """Wait until the API server says that it is ready."""
        await self._until(self._api_ready, f"{APISERVER} to be ready", timeout)

    async def _api_ready(self) -> bool:
        return await _says_ok(self.api, "/readyz")

    async def _usable(self, namespace: str) -> bool:
        account = await self.api.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
        return self.version >= (1, 24) or bool(account.get("secrets"))  # admission wants the token before that

    async def _until(self, holds: Callable[[], Awaitable[bool]], what: str, timeout: float | None = None) -> None:
        """Ask until it holds; a program that has ended ends the wait."""
        last: AgentFleetError | None = None
        with anyio.move_on_after(timeout or self._timeout):
            while True:
                try:
                    if await holds():
                        return
                except AgentFleetError as error:
                    last = error
                for program in self.programs.values():
                    program.check()
                await anyio.sleep(0.05)
        logs = "\n".join(f"--- {each.name}\n{each.tail()}" for each in self.programs.values())
        raise PlaneFailed(f"waited {timeout or self._timeout:g} s for {what}; last error: {last}\n{logs}")

    # ------------------------------------------------------------------------------------------------ faults

    def kill_apiserver(self) -> None:
        """End the API server at once, as `kill -9` does, and return when it is gone. What it stored is in etcd."""
        self._ours("kill its API server")
        self.programs[APISERVER].kill()

    async def restart_apiserver(self, timeout: float = 60) -> None:
        """Start the API server again on its old port (killing it first if it runs), and wait until it is ready."""
        self.kill_apiserver()
        self.programs[APISERVER].start()
        await self.ready(timeout)

    def freeze_apiserver(self) -> None:
        """Stop the API server in its tracks: connections stay open, and nothing answers (SIGSTOP)."""
        self._signal(APISERVER, signal.SIGSTOP)

    def thaw_apiserver(self) -> None:
        """Let it go on."""
        self._signal(APISERVER, signal.SIGCONT)

    def freeze_etcd(self) -> None:
        """Stop etcd in its tracks: the API server lives, and cannot read or write (SIGSTOP)."""
        self._signal(ETCD, signal.SIGSTOP)

    def thaw_etcd(self) -> None:
        """Let it go on."""
        self._signal(ETCD, signal.SIGCONT)

    async def compact(self, *, forget: bool = False) -> int:
        """Make etcd forget all revisions but the present one; returns that revision.

        Continued lists of an older revision answer 410 from then on. A watch is answered from the API server's own
        memory, which remembers: with `forget` the API server is restarted, and then older watches answer 410 too.
        """
        self._ours("compact its etcd")
        assert self._etcd is not None
        said = await self._etcd.post("/v3/kv/range", {"key": "AA==", "limit": 1})
        revision = int(said["header"]["revision"])
        try:
            await self._etcd.post("/v3/kv/compaction", {"revision": revision, "physical": True}, timeout=30)
        except ApiRefused as error:
            if "compacted" not in str(error):
                raise  # anything but: somebody has compacted it just now
        if forget:
            await self.restart_apiserver()
        return revision

    def _signal(self, name: str, number: signal.Signals) -> None:
        self._ours(f"send {number.name} to its {name}")
        self.programs[name].signal(number)

    def _ours(self, what: str) -> Setup:
        if self._setup is None:
            raise OperationRefused(f"cannot {what}: this cluster was not started here, or has not been started yet")
        return self._setup


async def _says_ok(client: Client, path: str) -> bool:
    said: Any = await client.get(path, timeout=5)
    return bool(said == "ok")
