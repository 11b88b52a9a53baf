"""Asking whether a manager lives: plainly, over TLS with its own certificate, and what is said when it does not."""

from __future__ import annotations

import http.server
import shutil
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from agentfleet.cli import main
from agentfleet.liveness import ask
from agentfleet.testing.kube.certificates import Authority, Certificate

pytestmark = pytest.mark.integration


class Manager(http.server.BaseHTTPRequestHandler):
    """Lives, is not ready, has moved, or speaks no HTTP, by path."""

    def do_GET(self) -> None:
        status = {"/livez": 200, "/readyz": 503, "/moved": 302}.get(self.path)
        if status is None:
            self.wfile.write(b"SSH-2.0-other\r\n")
            return
        self.send_response(status)
        self.send_header("Location", "/livez")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class Quiet(http.server.ThreadingHTTPServer):
    """A server that does not print a refused handshake."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""


@contextmanager
def manager(certificate: Certificate | None = None) -> Iterator[int]:
    """A server on loopback; its port."""
    with Quiet(("127.0.0.1", 0), Manager) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate, certificate.key)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with the program openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_manager_that_lives_says_so(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # asked for directly all the same
    with manager() as port:
        assert ask(host, port) == "200 OK"


@pytest.mark.parametrize(("path", "said"), [("/readyz", "503 Service Unavailable"), ("/moved", "302 Found")])
def test_another_answer_is_no(path: str, said: str) -> None:
    with manager() as port, pytest.raises(RuntimeError, match=said):
        ask("127.0.0.1", port, path=path)


def test_no_answer_is_no() -> None:
    with manager() as port, pytest.raises(OSError, match="does not speak HTTP"):
        ask("127.0.0.1", port, path="/other")
    with pytest.raises(OSError, match="refused"):
        ask("127.0.0.1", port)


def test_it_trusts_the_managers_own_certificate_alone(authority: Authority) -> None:
    """Whatever names it holds, and without the authority that signed it."""
    own, other = authority.server("own", "DNS:fleet.example"), authority.server("other")
    with manager(own) as port:
        assert ask("127.0.0.1", port, certificate=own.certificate) == "200 OK"
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            ask("127.0.0.1", port, certificate=other.certificate)


def test_the_command_takes_the_managers_own_variables(authority: Authority) -> None:
    own = authority.server("command")
    with manager(own) as port:
        env = {
            "AGENTFLEET_HOST": "0.0.0.0",
            "AGENTFLEET_PORT": str(port),
            "AGENTFLEET_TLS_CERT": str(own.certificate),
        }
        alive = CliRunner(env=env).invoke(main, ["alive"])
        unready = CliRunner(env=env).invoke(main, ["alive", "--path", "/readyz"])
    assert (alive.exit_code, alive.output) == (0, "200 OK\n")
    assert unready.exit_code == 1
    assert f"https://0.0.0.0:{port}/readyz: 503 Service Unavailable" in unready.output
