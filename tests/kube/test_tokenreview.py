"""Kubernetes' own tokens at the REST API: whose they are the API server says, what they may the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("fastapi")

from agentfleet.backends.kubernetes import Connection, KubeConfig
from agentfleet.backends.kubernetes.errors import Forbidden
from agentfleet.errors import BackendUnavailable, SpecError
from agentfleet.server.tokenreview import AccessRules, TokenReviews, principal_of
from agentfleet.stores.tokens import Scope
from agentfleet.testing.kube import ControlPlane

JWT = "aaaa.bbbb.cccc"
ONE = {"user": "ann", "scopes": ["operate"], "fleets": ["a"]}
ALL_READ = {"group": "system:authenticated", "scopes": ["read"], "fleets": ["*"]}


def rules(*rules: dict[str, Any], **more: Any) -> AccessRules:
    return AccessRules.parse({"rules": list(rules), **more})


class Server:
    """Answers reviews."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    async def request(
        self, method: str, path: str, *, body: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        assert (method, path) == ("POST", "/apis/authentication.k8s.io/v1/tokenreviews")
        assert body is not None
        self.asked.append(json.loads(body)["spec"])
        if isinstance(self.answer, Exception):
            raise self.answer
        return json.dumps(self.answer).encode()


def yes(name: str = "ann", *groups: str, **more: Any) -> dict[str, Any]:
    return {"status": {"authenticated": True, "user": {"username": name, "groups": list(groups)}, **more}}


def test_of_the_rules_that_fit_the_greatest_holds_alone() -> None:
    given = rules(ONE, {"group": "ops", "scopes": ["operate"], "fleets": ["b"]}, ALL_READ).rules
    found = principal_of(given, "ann", ["ops", "system:authenticated"])
    assert found is not None
    assert (found.scope, found.fleets, found.name) == (Scope.OPERATE, frozenset({"a", "b"}), "kubernetes/ann")
    reader = principal_of(given, "bob", ["system:authenticated"])
    assert reader is not None
    assert (reader.scope, reader.everywhere) == (Scope.READ, True)
    assert principal_of(given, "bob", []) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": ["read"], "fleets": ["*"]},
        {"user": "a", "group": "b", "scopes": ["read"], "fleets": ["*"]},
        {"user": "a", "scopes": ["root"], "fleets": ["*"]},
        {"user": "a", "scopes": ["read"], "fleets": ["Not A Name"]},
        {"user": "a", "scopes": [], "fleets": ["*"]},
    ],
)
def test_wrong_rules_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="rules"):
        rules(wrong)


def test_answers_are_remembered_for_a_while_and_other_tokens_never_sent() -> None:
    async def test() -> None:
        server = Server(yes())
        reviews = TokenReviews(server, rules(ONE))
        for _ in range(3):
            found = await reviews.principal(JWT)
            assert found is not None
        assert len(server.asked) == 1
        for other in ("af_0123456789abcdef." + "x" * 43, "plain", "a.b", "x" * 9000 + ".b.c"):
            assert await reviews.principal(other) is None
        assert len(server.asked) == 1

    anyio.run(test)


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        (yes(), True),
        (yes(audiences=["fleet"]), True),
        (yes("bob"), False),
        ({"status": {"authenticated": False}}, False),
        ({"status": {}}, False),
        ({"status": {"authenticated": "true", "user": {"username": "ann"}}}, False),
    ],
)
def test_who_is_known(answer: object, known: bool) -> None:
    async def test() -> None:
        assert (await TokenReviews(Server(answer), rules(ONE)).principal(JWT) is not None) is known

    anyio.run(test)


@pytest.mark.parametrize("audiences", [[], None, ["other"]])
def test_a_token_for_others_is_not_known(audiences: object) -> None:
    async def test() -> None:
        server = Server(yes(audiences=audiences))
        assert await TokenReviews(server, rules(ONE, audiences=["fleet"])).principal(JWT) is None
        assert server.asked == [{"token": JWT, "audiences": ["fleet"]}]

    anyio.run(test)


@pytest.mark.parametrize(
    "answer", [{}, [], {"status": {"authenticated": True, "user": {}}}, Forbidden("403"), BackendUnavailable("x")]
)
def test_what_cannot_be_asked_is_nobodys_fault(answer: object) -> None:
    async def test() -> None:
        with pytest.raises(BackendUnavailable) as caught:
            await TokenReviews(Server(answer), rules(ONE)).principal(JWT)
        assert JWT not in str(caught.value)

    anyio.run(test)


@pytest.mark.integration
def test_on_a_real_api_server(plane: ControlPlane, tmp_path: Path) -> None:
    async def test() -> None:
        namespace = await plane.namespace()
        for name in ("manager", "console"):
            await plane.api.post(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        manager = await plane.service_account(namespace, "manager")
        console = await plane.service_account(namespace, "console")
        config = manager.write(tmp_path / "kubeconfig", namespace=namespace)
        assert console.token is not None
        given = rules({"user": f"system:serviceaccount:{namespace}:console", "scopes": ["operate"], "fleets": ["a"]})
        async with Connection(KubeConfig(config)) as connection:
            with pytest.raises(BackendUnavailable, match="reviews no tokens"):  # not without the right to
                await TokenReviews(connection, given).principal(console.token)
            await allow(plane, namespace)
            reviews = TokenReviews(connection, given)
            found = await until_allowed(reviews, console.token)
            assert found is not None
            assert (found.scope, found.fleets) == (Scope.OPERATE, frozenset({"a"}))
            assert await reviews.principal(manager.token or "") is None  # known to the cluster, in no rule
            forged = console.token[:-6] + "AAAAAA"
            assert await reviews.principal(forged) is None
            elsewhere = TokenReviews(connection, rules(given.rules[0].to_dict(), audiences=["https://other.example"]))
            assert await elsewhere.principal(console.token) is None

    anyio.run(test)


async def allow(plane: ControlPlane, namespace: str, *, account: str = "manager") -> None:
    """The right to review tokens, and no other."""
    rbac, name = "/apis/rbac.authorization.k8s.io/v1", f"token-reviews-{namespace}"
    rule = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    await plane.api.post(f"{rbac}/clusterroles", {"metadata": {"name": name}, "rules": [rule]})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
    }
    await plane.api.post(f"{rbac}/clusterrolebindings", binding)


async def until_allowed(reviews: TokenReviews, token: str) -> Any:
    """The API server takes a moment to see a new binding."""
    with anyio.fail_after(30):
        while True:
            try:
                return await reviews.principal(token)
            except BackendUnavailable:
                await anyio.sleep(0.1)
