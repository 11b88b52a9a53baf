"""An admission webhook of our own: a real HTTPS server that a real API server asks, about one namespace alone."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from aiohttp import web

from agentfleet.testing.kube import ApiRefused, ControlPlane

Patch = Sequence[Mapping[str, Any]]
"""A JSON patch."""
Judge = Callable[[Mapping[str, Any]], str | Patch | None]
"""Says of an object why it is refused, or how it is changed; None, and it is let through."""

_ROOT = "/apis/admissionregistration.k8s.io/v1"
_PROBE = "webhook.example.com/probe"
_KNOWN = "is there yet"


@dataclass(slots=True)
class Webhook:
    """What it did, to objects that were really to be made."""

    asked: int = 0
    refused: list[str] = field(default_factory=list)
    """Images of the pods that were refused."""
    changed: int = 0

    def answer(self, review: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
        """The review's answer."""
        request = review["request"]
        said: dict[str, Any] = {"uid": request["uid"], "allowed": True}
        if _PROBE in (request["object"]["metadata"].get("annotations") or {}):
            return said | {"allowed": False, "status": {"message": _KNOWN}}
        verdict = judge(request["object"])
        self.asked += 1
        if isinstance(verdict, str):
            self.refused += [each["image"] for each in request["object"]["spec"]["containers"]]
            return said | {"allowed": False, "status": {"message": verdict}}
        if verdict is not None:
            self.changed += 1
            patch = base64.b64encode(json.dumps(verdict).encode()).decode()
            return said | {"patchType": "JSONPatch", "patch": patch}
        return said


@asynccontextmanager
async def refusing(plane: ControlPlane, namespace: str, judge: Judge) -> AsyncIterator[Webhook]:
    """A validating webhook for the pods that are made in a namespace."""
    async with _webhook(plane, namespace, judge, "validatingwebhookconfigurations", ("", "pods", ["CREATE"])) as made:
        yield made


@asynccontextmanager
async def changing(
    plane: ControlPlane, namespace: str, judge: Judge, *, deployments: bool = False
) -> AsyncIterator[Webhook]:
    """A mutating webhook for the pods that are made in a namespace; or for its Deployments, whenever they are written.

    Both are about pods for `judge`: a Deployment's template is shown to it as one.
    """
    what = ("apps", "deployments", ["CREATE", "UPDATE"]) if deployments else ("", "pods", ["CREATE"])
    verdict = _of_template(judge) if deployments else judge
    async with _webhook(plane, namespace, verdict, "mutatingwebhookconfigurations", what) as made:
        yield made


def _of_template(judge: Judge) -> Judge:
    def verdict(deployment: Mapping[str, Any]) -> str | Patch | None:
        said = judge(deployment["spec"]["template"])
        if said is None or isinstance(said, str):
            return said
        return [{**each, "path": f"/spec/template{each['path']}"} for each in said]

    return verdict


@asynccontextmanager
async def _webhook(
    plane: ControlPlane, namespace: str, judge: Judge, kind: str, what: tuple[str, str, list[str]]
) -> AsyncIterator[Webhook]:
    made = Webhook()
    async with _served(plane, made, judge) as url:
        await plane.api.patch(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": {"webhook": namespace}}})
        try:
            await plane.api.post(f"{_ROOT}/{kind}", _configuration(plane, namespace, url, what))
            await _until_asked(plane, namespace, what)
            yield made
        finally:  # the plane is others', too: nothing may be asked of a server that is gone
            with anyio.CancelScope(shield=True), anyio.move_on_after(20), suppress(ApiRefused):
                await plane.api.delete(f"{_ROOT}/{kind}/{namespace}")


def _configuration(
    plane: ControlPlane, namespace: str, url: str, what: tuple[str, str, list[str]]
) -> Mapping[str, Any]:
    group, plural, operations = what
    authority = base64.b64encode(plane.authority.ca.read_bytes()).decode()
    rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": operations, "resources": [plural]}
    webhook = {
        "name": "webhook.example.com",
        "clientConfig": {"url": url, "caBundle": authority},
        "namespaceSelector": {"matchLabels": {"webhook": namespace}},
        "rules": [rule],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 10,
    }
    return {"metadata": {"name": namespace}, "webhooks": [webhook]}


async def _until_asked(plane: ControlPlane, namespace: str, what: tuple[str, str, list[str]]) -> None:
    """The API server takes a moment to notice a new configuration: wait until it asks about what is never stored."""
    pod = {"containers": [{"name": "probe", "image": "probe"}]}
    labels = {"app": "probe"}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    group, plural, _ = what
    root = f"/apis/{group}/v1" if group else "/api/v1"
    probe = {
        "metadata": {"name": "probe", "annotations": {_PROBE: "yes"}},
        "spec": spec if plural == "deployments" else pod,
    }
    with anyio.fail_after(30):
        while True:
            try:
                await plane.api.post(f"{root}/namespaces/{namespace}/{plural}?dryRun=All", probe)
            except ApiRefused as error:
                if _KNOWN in str(error):
                    return
                raise
            await anyio.sleep(0.1)


@asynccontextmanager
async def _served(plane: ControlPlane, webhook: Webhook, judge: Judge) -> AsyncIterator[str]:
    """The server, with a certificate that the configuration's authority has signed."""

    async def review(request: web.Request) -> web.Response:
        asked = await request.json()
        answer = webhook.answer(asked, judge)
        return web.json_response({"apiVersion": asked["apiVersion"], "kind": "AdmissionReview", "response": answer})

    files = plane.authority.server("webhook")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    app = web.Application()
    app.router.add_post("/", review)
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        with anyio.CancelScope(shield=True):
            await runner.cleanup()
