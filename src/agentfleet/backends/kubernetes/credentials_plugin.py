"""Credentials that a program or a cloud's login gives: the `exec` plugins of a kubeconfig, and its older providers."""

from __future__ import annotations

import datetime as dt
import math
import os
import subprocess
from collections.abc import Mapping

import anyio
import msgspec

from agentfleet.backends.kubernetes.credentials_kubeconfig import Settings
from agentfleet.errors import BackendUnavailable, DeadlineExceeded, SpecError

__all__ = ["run_plugin", "run_provider"]


class _Given(msgspec.Struct, rename="camel"):
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: dt.datetime | None = None


class _ExecCredential(msgspec.Struct, rename="camel"):
    api_version: str
    status: _Given | None = None


async def run_plugin(settings: Settings, timeout: float) -> tuple[Mapping[str, object], float]:
    """Run the user's credential plugin; it is killed when it takes longer than `timeout` seconds.

    Returns:
        What it gave ("token", or "clientCertificateData" and "clientKeyData"), and for how many seconds that is good.

    Raises:
        SpecError: The plugin is not described as it must be, or is not installed.
        BackendUnavailable: It failed, or what it printed cannot be used.
        DeadlineExceeded: It took too long.
    """
    plugin = settings.user["exec"]
    if not isinstance(plugin, dict) or not plugin.get("command") or not plugin.get("apiVersion"):
        raise SpecError(f"context {settings.context!r}: exec needs command and apiVersion")
    command = [str(plugin["command"]), *map(str, plugin.get("args") or ())]
    if os.sep in command[0]:  # a path is relative to the kubeconfig, a bare name is looked up in PATH
        command[0] = str(settings.folder_of(settings.user) / command[0])
    spec: dict[str, object] = {"interactive": False}
    if plugin.get("provideClusterInfo"):
        spec["cluster"] = {key: value for key, value in settings.cluster.items() if " " not in key}
    info = {"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": spec}
    env = {**os.environ, "KUBERNETES_EXEC_INFO": msgspec.json.encode(info).decode()}
    env |= {str(each["name"]): str(each["value"]) for each in plugin.get("env") or ()}
    try:
        with anyio.fail_after(timeout):
            done = await anyio.run_process(command, env=env, input=b"", check=False, stderr=subprocess.PIPE)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the credential plugin {command[0]} did not answer within {timeout:g} s") from error
    except OSError as error:
        hint = plugin.get("installHint") or "is it installed?"
        raise SpecError(f"cannot run the credential plugin {command[0]}: {error.strerror}; {hint}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise BackendUnavailable(f"the credential plugin {command[0]} failed with code {done.returncode}: {said}")
    return _read(done.stdout, command[0], str(plugin["apiVersion"]))


def _read(output: bytes, name: str, version: str) -> tuple[Mapping[str, object], float]:
    try:
        answer = msgspec.json.decode(output, type=_ExecCredential)
    except msgspec.DecodeError as error:
        raise BackendUnavailable(f"the credential plugin {name} printed no ExecCredential: {error}") from error
    given = answer.status
    if answer.api_version != version:
        raise BackendUnavailable(f"the credential plugin {name} speaks {answer.api_version}, not {version}")
    if given is None or not (given.token or (given.client_certificate_data and given.client_key_data)):
        raise BackendUnavailable(f"the credential plugin {name} gave neither a token nor a certificate with its key")
    lifetime = math.inf
    if (expiry := given.expiration_timestamp) is not None:
        lifetime = (expiry - dt.datetime.now(expiry.tzinfo)).total_seconds()
    found = {
        "token": given.token,
        "clientCertificateData": given.client_certificate_data,
        "clientKeyData": given.client_key_data,
    }
    return {key: value for key, value in found.items() if value}, lifetime


async def run_provider(settings: Settings, timeout: float) -> str | None:
    """The Authorization header of a user with an `auth-provider` (oidc, gcp): the client library's own reading.

    Args:
        settings: The context.
        timeout: Seconds that the provider may take.

    Raises:
        SpecError: The provider's entry cannot be used.
        BackendUnavailable: The provider cannot be asked.
        DeadlineExceeded: It took too long.
    """
    from aiohttp import ClientError  # noqa: PLC0415 - slow to import
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415 - slow to import
    from kubernetes_asyncio.config import ConfigException  # noqa: PLC0415 - slow to import
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader  # noqa: PLC0415 - slow to import

    user = {key: value for key, value in settings.user.items() if " " not in key}
    document = {
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "clusters": [{"name": "it", "cluster": {}}],
        "users": [{"name": "it", "user": user}],
    }
    configuration = Configuration()
    try:
        with anyio.fail_after(timeout):
            await KubeConfigLoader(document).load_and_set(configuration)
    except TimeoutError as error:
        message = f"context {settings.context!r}: the auth-provider did not answer within {timeout:g} s"
        raise DeadlineExceeded(message) from error
    except (ConfigException, ValueError) as error:
        raise SpecError(f"context {settings.context!r}: auth-provider: {error}") from error
    except (ClientError, OSError) as error:
        raise BackendUnavailable(f"context {settings.context!r}: the auth-provider cannot be asked: {error}") from error
    token = configuration.api_key.get("BearerToken")
    return str(token) if token else None
