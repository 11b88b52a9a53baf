"""A small certificate authority for tests, made with the `openssl` program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from agentfleet.testing.kube.errors import PlaneFailed

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
_LEAF = """\
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature,keyEncipherment
extendedKeyUsage={usage}
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
"""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its private key, as files in PEM."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for servers and clients of one test; everything is kept in one directory."""

    def __init__(self, place: Path) -> None:
        """Make the authority's own certificate in `place`."""
        self.place = place
        self.ca = place / "ca.crt"
        self._key = place / "ca.key"
        self._made = 0
        _openssl(
            *("req", "-x509", *_KEY, "-days", "30", "-subj", "/CN=agentfleet-test-ca"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
            *("-keyout", str(self._key), "-out", str(self.ca)),
        )

    def server(self, name: str, addresses: str = "IP:127.0.0.1,DNS:localhost") -> Certificate:
        """A certificate for a server on loopback."""
        return self._sign(name, f"/CN={name}", _LEAF.format(usage="serverAuth") + f"subjectAltName={addresses}\n")

    def client(self, user: str, *groups: str, days: int = 30) -> Certificate:
        """A certificate by which the API server knows `user`, a member of `groups`."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        return self._sign(user.replace(":", "-"), subject, _LEAF.format(usage="clientAuth"), days)

    def key_pair(self, name: str) -> Path:
        """A bare private key in PEM, as service account tokens are signed with."""
        path = self.place / f"{name}.key"
        _openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(path))
        return path

    def _sign(self, name: str, subject: str, extensions: str, days: int = 30) -> Certificate:
        self._made += 1
        base = self.place / f"{name}-{self._made}"
        request, written = base.with_suffix(".csr"), base.with_suffix(".ext")
        made = Certificate(base.with_suffix(".crt"), base.with_suffix(".key"))
        written.write_text(extensions)
        _openssl("req", "-new", *_KEY, "-subj", subject, "-keyout", str(made.key), "-out", str(request))
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key), "-days", str(days)),
            *("-set_serial", str(self._made), "-extfile", str(written), "-out", str(made.certificate)),
        )
        return made


def _openssl(*arguments: str) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            ["openssl", *arguments],  # noqa: S607 - wherever the system has it
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError as error:
        raise PlaneFailed(
            "the certificates of a test need the program openssl, which is not on PATH: install it"
        ) from error
    if done.returncode != 0:
        raise PlaneFailed(
            f"openssl {' '.join(arguments[:2])} failed with {done.returncode}: {done.stderr[-500:].strip()}"
        )
