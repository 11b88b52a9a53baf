"""Kubelets that run at the same time, in whatever processes, have networks of their own."""

from __future__ import annotations

import pytest

from agentfleet.errors import BackendUnavailable, SpecError
from agentfleet.testing.kube import addresses
from agentfleet.testing.kube.addresses import Addresses


def network(of: Addresses) -> str:
    return of.host(0).rsplit(".", 2)[0]


def test_a_network_is_one_kubelets_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_NETWORKS", range(251, 253))  # tests that run meanwhile take none of these
    ann, ben = Addresses(None), Addresses(None)
    try:
        assert {network(ann), network(ben)} == {"127.251", "127.252"}
        with pytest.raises(BackendUnavailable, match=r"127\.251\.0\.0/16 to 127\.252\.0\.0/16 is taken.*addresses"):
            Addresses(None)
    finally:
        ben.close()
    again = Addresses(None)
    again.close()
    ann.close()
    assert network(again) == network(ben)


def test_pods_get_an_address_again_only_when_no_other_is_left() -> None:
    few = Addresses("127.253.0.0/29")
    assert few.host(0) == "127.253.0.6"
    taken = [few.take() for _ in range(4)]
    assert taken == [f"127.253.0.{last}" for last in range(1, 5)]
    few.give_back(taken[2])
    assert few.take() == taken[2]
    with pytest.raises(SpecError, match="no address is free in 127.253.0.0/29"):
        few.take()
