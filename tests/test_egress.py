"""Where a process may connect to on somebody else's word: more than 60 ways to hide an address are refused (G18)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.egress import EgressPolicy, EgressRefused, IpAddress, is_nobodys, is_public, networks_of
from agentfleet.errors import BackendUnavailable, DeadlineExceeded, SpecError
from agentfleet.signals.http import HttpClient, HttpError

pytestmark = pytest.mark.anyio

REBINDING = {
    "good.example": ["93.184.216.34"],
    "two.example": ["93.184.216.34", "10.0.0.1"],
    "loop.example": ["127.0.0.1"],
    "loop6.example": ["::1"],
    "meta.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:169.254.169.254"],
    "ula.example": ["fd00::1"],
    "link.example": ["fe80::1%eth0"],
    "zero.example": ["0.0.0.0"],
    "none.example": [],
}


async def resolver(host: str, port: int) -> Sequence[str]:
    if host not in REBINDING:
        raise OSError("no such name")
    return REBINDING[host]


POLICY = EgressPolicy(schemes=frozenset({"http", "https"}), ports=frozenset({80, 443, 8443}), resolver=resolver)

REFUSED = [
    # plain
    "http://127.0.0.1/",
    "http://127.0.0.1:443/",
    "http://127.1.2.3/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://localhost.localdomain/",
    "http://kubernetes.default.svc.internal/",
    "http://printer.local/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://0.0.0.0/",
    "http://0/",
    "http://255.255.255.255/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://198.18.0.1/",
    "http://192.0.2.1/",
    # metadata of clouds
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.170.2/v2/credentials",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://metadata.google.internal/",
    "http://[fd00:ec2::254]/",
    "http://[fd20:ce::254]/",
    # other ways to write an address
    "http://2130706433/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0x7f.0x0.0x0.0x1/",
    "http://0177.0.0.1/",
    "http://0177.0.0.01/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.01/",
    "http://127.000.000.001/",
    "http://2852039166/",
    "http://0xa9fea9fe/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://4294967297/",
    "http://1.1.1.1.1/",
    "http://256.1.1.1/",
    # IPv6
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::169.254.169.254]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001:0:a9fe:a9fe::1]/",
    "http://[2001:0:4136:e378:8000:63bf:5601:5601]/",
    "http://[2001:db8::5efe:127.0.0.1]/",
    "http://[2606:4700::5efe:10.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[fc00::1]/",
    "http://[fd12:3456::1]/",
    "http://[ff02::1]/",
    "http://[::ffff:0:127.0.0.1]/",
    # names that lead there
    "http://loop.example/",
    "http://loop6.example/",
    "http://meta.example/",
    "http://mapped.example/",
    "http://ula.example/",
    "http://link.example/",
    "http://zero.example/",
    "http://two.example/",
    # what parsers do not agree on
    "http://good.example@127.0.0.1/",
    "http://127.0.0.1@good.example/",
    "http://user:pass@good.example/",
    "http://good.example#@127.0.0.1/",
    "http://good.example\\@127.0.0.1/",
    "http://good.example%2f@127.0.0.1/",
    "http://127.0.0.1%23.good.example/",
    "http://good.example%00.127.0.0.1/",
    "http:///127.0.0.1/",
    "http:127.0.0.1/",
    "http://127.0.0.1 .good.example/",
    "http://good.example\t/",
    "http://good.example\r\nHost: x/",
    "http://good.example\n/",
    " http://good.example/",
    "http://[good.example]/",
    "http://good.example:80:443/",
    "http://good.example:x/",
    "http://good.example:-1/",
    "http://good.example:99999/",
    # digits and dots of other scripts, and names that are folded to others
    "http://①②⑦.⓪.⓪.①/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://ⓛocalhost/",
    "http://lоcalhost/",
    "http://good.exam\u200bple/",
    "http://xn--/",
    "http://-good.example/",
    "http://good..example/",
    "http://.good.example/",
    "http://good.example./",
    "http://*.example/",
    # other schemes and ports
    "ftp://good.example/",
    "file:///etc/passwd",
    "gopher://good.example/",
    "dict://good.example:11211/",
    "jar:http://good.example!/",
    "javascript:alert(1)",
    "//good.example/",
    "good.example",
    "",
    "http://",
    "http://good.example:22/",
    "http://good.example:6379/",
    "http://good.example:0/",
]


def test_there_are_more_than_sixty() -> None:
    assert len(set(REFUSED)) == len(REFUSED) >= 60


@pytest.mark.parametrize("url", REFUSED)
async def test_refused(url: str) -> None:
    with pytest.raises(EgressRefused):
        await POLICY.check(url)


async def test_what_is_allowed_is_told_by_its_address() -> None:
    target = await POLICY.check("https://good.example/hook?a=1")
    assert (target.scheme, target.host, target.address, target.port) == ("https", "good.example", "93.184.216.34", 443)
    assert target.path == "/hook?a=1"
    assert (await POLICY.check("http://93.184.216.34")).path == "/"
    assert (await POLICY.check("http://[2606:4700:4700::1111]:80/")).address == "2606:4700:4700::1111"


async def test_a_name_is_resolved_once_so_that_it_cannot_change_its_mind() -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def rebinding(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    policy = EgressPolicy(resolver=rebinding)
    target = await policy.check("https://rebind.example/")
    assert (target.address, len(answers)) == ("93.184.216.34", 1)  # who connects to it asks nobody else
    with pytest.raises(EgressRefused):
        await policy.check("https://rebind.example/")


async def test_a_redirect_is_another_target() -> None:
    for location in ("http://169.254.169.254/", "http://loop.example/", "file:///etc/passwd"):
        with pytest.raises(EgressRefused):
            await POLICY.check(location)


async def test_an_operator_can_allow_networks_and_domains_but_not_the_metadata() -> None:
    inner = EgressPolicy(
        schemes=frozenset({"http"}),
        ports=frozenset({8080}),
        networks=networks_of(["10.0.0.0/8", "169.254.0.0/16", "fd00::/8", "127.0.0.0/8"]),
        public=False,
        names=("svc.cluster.internal",),
        resolver=_inner,
    )
    assert (await inner.check("http://10.1.2.3:8080/")).address == "10.1.2.3"
    assert (await inner.check("http://hook.svc.cluster.internal:8080/")).address == "10.0.0.7"
    for url in (
        "http://169.254.169.254:8080/",
        "http://[::ffff:169.254.169.254]:8080/",
        "http://[fd00:ec2::254]:8080/",
        "http://93.184.216.34:8080/",
        "http://other.example:8080/",
        "http://evilsvc.cluster.internal:8080/",
    ):
        with pytest.raises(EgressRefused):
            await inner.check(url)
    with pytest.raises(SpecError):
        networks_of(["10.0.0.0/99"])


async def _inner(host: str, port: int) -> Sequence[str]:
    return ["10.0.0.7"]


async def test_what_does_not_resolve_is_no_refusal() -> None:
    with pytest.raises(BackendUnavailable):
        await POLICY.check("http://unknown.example/")
    with pytest.raises(BackendUnavailable):
        await POLICY.check("http://none.example/")

    async def never(host: str, port: int) -> Sequence[str]:
        await anyio.sleep_forever()
        return []

    with pytest.raises(DeadlineExceeded):
        await EgressPolicy(resolver=never, timeout=0.01).check("https://good.example/")


@given(st.ip_addresses())
def test_only_public_addresses_are_admitted(address: IpAddress) -> None:
    try:
        POLICY.admit(address)
    except EgressRefused:
        return
    assert is_public(address)
    assert not address.is_loopback
    assert not address.is_link_local
    assert not address.is_private
    if isinstance(address, ipaddress.IPv6Address):
        for inner in (address.ipv4_mapped, address.sixtofour):
            assert inner is None or is_public(inner)


@given(st.text(max_size=60))
def test_no_text_makes_it_fail_otherwise(text: str) -> None:
    for url in (text, f"http://{text}/", f"http://{text}"):
        try:
            anyio.run(POLICY.check, url)
        except (EgressRefused, BackendUnavailable):
            continue


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254:80",
        "[fe80::1]:80",
        "[::ffff:169.254.169.254]:80",
        "0.0.0.0:80",
        "[::]:80",
        "224.0.0.1:80",
        "[ff02::1]:80",
    ],
)
async def test_probes_do_not_ask_where_no_agent_can_be(address: str) -> None:
    async with HttpClient() as http:
        with pytest.raises(HttpError, match="no agent's address") as caught:
            await http.request("GET", address, "/health", timeout=5)
    assert caught.value.sent is False


def test_agents_may_be_at_private_addresses() -> None:
    assert not any(map(is_nobodys, ("127.0.0.1", "10.0.0.1", "192.168.0.1", "::1", "fd00::1", "93.184.216.34")))
