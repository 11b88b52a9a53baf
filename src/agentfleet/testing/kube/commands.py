"""The command lines of a control plane on loopback: what each program must be told to run without machines under it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.certificates import Authority
from agentfleet.testing.kube.programs import free_ports

ETCD, APISERVER, CONTROLLERS, SCHEDULER = "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"

SERVICES = "10.0.0.0/16"


@dataclass(frozen=True, slots=True)
class PlaneOptions:
    """How a control plane of our own is set up.

    Attributes:
        api_qps: Requests per second that the controller manager and the scheduler may send; their own defaults are
            20 and 50, which makes 1,000 pods take 50 s.
        controllers: Which controllers run, as `--controllers` takes them: ("*",), ("*", "-nodelifecycle").
        node_grace: Seconds without a lease after which a node counts as lost.
        eviction: Seconds that pods may stay on a lost node. It becomes the toleration that admission gives to pods
            without one of their own. None leaves the server's 300 s.
        watch_cache: Whether the API server answers watches from its own memory. Without it, compaction expires
            watches at once; with it, only after a restart.
        extra: Further arguments by program name.
    """

    api_qps: float = 1000
    controllers: Sequence[str] = ("*",)
    node_grace: float = 40
    eviction: float | None = None
    watch_cache: bool = True
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Setup:
    """The files and command lines of one plane: ports, certificates, tokens, kubeconfig. Making it takes a moment."""

    def __init__(self, programs: Path, folder: Path, options: PlaneOptions, version: tuple[int, int]) -> None:
        """Write everything that the programs read into `folder`, which must not exist."""
        folder.mkdir()
        self._programs = programs
        self.folder = folder
        self._options = options
        self._version = version
        self._ports = dict(zip((ETCD, "peer", APISERVER, CONTROLLERS, SCHEDULER), free_ports(5), strict=True))
        self.authority = Authority(folder)
        self._certificate = self.authority.server("kube-apiserver")
        self._accounts = self.authority.key_pair("accounts")
        admin, nobody = secrets.token_hex(16), secrets.token_hex(16)
        self._tokens = folder / "tokens.csv"
        self._tokens.write_text(f'{admin},admin,admin,"system:masters"\n{nobody},nobody,nobody\n')
        self.access = Access(server=self._url(APISERVER, "https"), ca=self.authority.ca.read_text(), token=admin)
        self.nobody = self.access.with_token(nobody)
        self.etcd = Access(server=self._url(ETCD))
        self._kubeconfig = self.access.write(folder / "components.kubeconfig")

    def lines(self) -> dict[str, list[str]]:
        """The command line of each program, in the order in which they start."""
        made = {
            ETCD: self._etcd(),
            APISERVER: self._apiserver(),
            CONTROLLERS: self._controller_manager(),
            SCHEDULER: self._manager(SCHEDULER),
        }
        return {
            name: [str(self._programs / name), *line, *self._options.extra.get(name, ())] for name, line in made.items()
        }

    def health_of(self, name: str) -> Access:
        """Where the controller manager or the scheduler answers /healthz."""
        return Access(server=self._url(name, "https"), verify=False)

    def _url(self, name: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self._ports[name]}"

    def _etcd(self) -> list[str]:
        client, peer = self._url(ETCD), self._url("peer")
        return [
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--quota-backend-bytes=4294967296",
            "--log-level=error",
            "--logger=zap",
        ]

    def _apiserver(self) -> list[str]:
        """RBAC on, static tokens and client certificates, tokens of service accounts."""
        options = self._options
        arguments = [
            f"--etcd-servers={self._url(ETCD)}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._ports[APISERVER]}",
            f"--cert-dir={self.folder}",
            f"--tls-cert-file={self._certificate.certificate}",
            f"--tls-private-key-file={self._certificate.key}",
            f"--client-ca-file={self.authority.ca}",
            f"--token-auth-file={self._tokens}",
            "--authorization-mode=Node,RBAC",
            f"--service-account-key-file={self._accounts}",
            f"--service-account-signing-key-file={self._accounts}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICES}",
            "--endpoint-reconciler-type=none",  # it refuses to put a loopback address into Endpoints
            "--allow-privileged=true",
            "--profiling=false",
            f"--watch-cache={'true' if options.watch_cache else 'false'}",
        ]
        if options.eviction is not None:
            seconds = max(1, round(options.eviction))
            arguments += [
                f"--default-not-ready-toleration-seconds={seconds}",
                f"--default-unreachable-toleration-seconds={seconds}",
            ]
        return arguments

    def _controller_manager(self) -> list[str]:
        """The controllers, each as its own service account."""
        options = self._options
        return [
            *self._manager(CONTROLLERS),
            f"--controllers={','.join(options.controllers)}",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self._accounts}",
            f"--root-ca-file={self.authority.ca}",
            f"--node-monitor-grace-period={options.node_grace:g}s",
            f"--node-monitor-period={min(5.0, max(0.5, options.node_grace / 8)):g}s",
            "--concurrent-deployment-syncs=10",
            "--concurrent-replicaset-syncs=10",
        ]

    def _manager(self, name: str) -> list[str]:
        qps = self._options.api_qps
        arguments = [
            f"--kubeconfig={self._kubeconfig}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports[name]}",
            f"--cert-dir={self.folder / name}",
            f"--kube-api-qps={qps:g}",
            f"--kube-api-burst={max(30, round(qps * 1.5))}",
        ]
        if self._version < (1, 24):
            arguments.append("--port=0")  # no plain HTTP port beside; later versions have none and refuse the flag
        return arguments
