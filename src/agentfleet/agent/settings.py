"""What an agent is told by its surroundings: environment variables, read once at the start."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from agentfleet.errors import SpecError


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the agent serves and how it ends. Times are seconds, sizes are bytes.

    Attributes:
        host: Address to listen on; AGENTFLEET_HOST.
        port: Port to listen on, 0 for any free one; AGENTFLEET_PORT, else PORT.
        token: Bearer token that work and configuration need, None for none; AGENTFLEET_TOKEN. Without one, whoever
            reaches the port may give work.
        drain: How long running tasks may still take after SIGTERM; AGENTFLEET_DRAIN. Keep it a little below the grace
            period of whatever kills the process.
        linger: How long, at most, the agent stays after its last task for results that nobody has fetched;
            AGENTFLEET_LINGER.
        version: What /status calls the agent's version; AGENTFLEET_VERSION.
        instance: Who the agent is; AGENTFLEET_INSTANCE.
        config_url: Where the agent fetches its configuration, such as http://manager:8080/api/v1/clusters/NAME; None
            waits for it to be pushed; AGENTFLEET_CONFIG_URL.
        config_token: Bearer token for that, None for none; AGENTFLEET_CONFIG_TOKEN.
        config_token_file: A file that holds it, read anew for each connection; AGENTFLEET_CONFIG_TOKEN_FILE.
        config_poll: Time between two questions, None to keep a stream open; AGENTFLEET_CONFIG_POLL.
        config_file: Where the last accepted configuration is kept, None for nowhere; AGENTFLEET_CONFIG_FILE, in which
            "{instance}" stands for the agent's own id, so that a template may say it for all.
        config_patience: How long, at the start, an answer is waited for before what is kept is used.
        max_body: Largest request body, and largest result.
        head_timeout: A request's head must have arrived this long after a connection opens.
        body_timeout: And its body this long after the head.
        idle_timeout: A connection without a request is closed after this long.
        config_timeout: How long an `on_config` callback may take.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    drain: float = 30.0
    linger: float = 5.0
    version: str | None = None
    max_body: int = 8 * 2**20
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    idle_timeout: float = 60.0
    config_timeout: float = 30.0
    instance: str | None = None
    config_url: str | None = None
    config_token: str | None = None
    config_token_file: str | None = None
    config_poll: float | None = None
    config_file: str | None = None
    config_patience: float = 2.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            SpecError: A variable holds nonsense; the message names it.
        """
        env = os.environ if env is None else env
        port = "AGENTFLEET_PORT" if env.get("AGENTFLEET_PORT") else "PORT"
        instance = env.get("AGENTFLEET_INSTANCE") or None
        return cls(
            host=env.get("AGENTFLEET_HOST") or "127.0.0.1",
            port=int(_number(env, port, 8080, most=65_535, whole=True)),
            token=env.get("AGENTFLEET_TOKEN") or None,
            drain=_number(env, "AGENTFLEET_DRAIN", 30.0),
            linger=_number(env, "AGENTFLEET_LINGER", 5.0),
            version=env.get("AGENTFLEET_VERSION") or None,
            instance=instance,
            config_url=env.get("AGENTFLEET_CONFIG_URL") or None,
            config_token=env.get("AGENTFLEET_CONFIG_TOKEN") or None,
            config_token_file=env.get("AGENTFLEET_CONFIG_TOKEN_FILE") or None,
            config_poll=_number(env, "AGENTFLEET_CONFIG_POLL", 0.0) or None,
            config_file=(env.get("AGENTFLEET_CONFIG_FILE") or "").replace("{instance}", instance or "") or None,
        )

    def present_config_token(self) -> str | None:
        """The token to fetch configuration with, as it is now; raises OSError when its file cannot be read."""
        if self.config_token_file is None:
            return self.config_token
        with open(self.config_token_file, encoding="ascii") as file:  # noqa: PTH123  as in `vitals`
            return file.read().strip() or None


def _number(env: Mapping[str, str], name: str, default: float, *, most: float = 1e9, whole: bool = False) -> float:
    text = env.get(name)
    if not text:
        return default
    kind = "a whole number" if whole else "a number of seconds"
    try:
        value = float(int(text)) if whole else float(text)
    except ValueError as error:
        raise SpecError(f"{name} is {text[:60]!r}; it must be {kind} from 0 to {most:.0f}") from error
    if not (math.isfinite(value) and 0 <= value <= most):
        raise SpecError(f"{name} is {text[:60]!r}; it must be {kind} from 0 to {most:.0f}")
    return value
