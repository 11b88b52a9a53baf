"""The `agentfleet` command (extra `cli`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentfleet.errors import AgentFleetError, MissingExtra

if TYPE_CHECKING:
    from agentfleet.specs import FleetSpec

try:
    import click
except ImportError as error:  # a plain install has the command's name, but not what it is made of
    raise MissingExtra("the agentfleet command needs an extra: pip install 'agentfleet[cli]'") from error


_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
@click.version_option(package_name="agentfleet")
def main() -> None:
    """Run fleets of AI-agent instances."""


@main.command()
@click.option("--report", default="build/demo-report.json", show_default=True, help="Where the figures go, as JSON.")
@click.option("--plain", is_flag=True, help="Print lines even on a terminal.")
def demo(report: str, *, plain: bool) -> None:
    """See a real fleet live, be hurt and heal, in under two minutes."""
    from agentfleet.demo.driver import run_demo  # noqa: PLC0415 - rich is slow to import, and only this needs it

    try:
        sys.exit(run_demo(Path(report), plain=plain))
    except AgentFleetError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file: Path) -> None:
    """Check a fleet's spec (YAML or JSON), and print it in full."""
    click.echo(_read(file).to_yaml(), nl=False)


@main.command()
def schema() -> None:
    """Print the JSON schema of a fleet's spec."""
    import json  # noqa: PLC0415

    from agentfleet.specs import FleetSpec  # noqa: PLC0415

    click.echo(json.dumps(FleetSpec.model_json_schema(), indent=2))


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kubernetes-version", "version", metavar="VERSION", help="The cluster's version, such as 1.29.")
@click.option("--hpa/--no-hpa", default=None, help="Whether the cluster's own autoscaler scales the fleet.")
@click.option("--namespace", "-n", help="Where the objects live.")
def render(file: Path, version: str | None, namespace: str | None, *, hpa: bool | None) -> None:
    """Print the Kubernetes objects that a fleet's spec (YAML or JSON) becomes; needs no cluster."""
    from agentfleet.backends.kubernetes.apiversions import ApiVersions  # noqa: PLC0415
    from agentfleet.backends.kubernetes.manifests import render as manifests_of  # noqa: PLC0415

    spec = _read(file)
    try:
        api = ApiVersions() if version is None else ApiVersions.of(version)
        manifests = manifests_of(spec, api, namespace=namespace, hpa=hpa)
    except AgentFleetError as error:
        raise click.ClickException(str(error)) from error
    for note in manifests.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(manifests.to_yaml(), nl=False)


# ------------------------------------------------------------------------------------------------ the server


_config_schemas = click.option(
    "--config-schemas",
    envvar="AGENTFLEET_CONFIG_SCHEMAS",
    type=_FOLDER,
    help="JSON schemas of configuration: FLEET.json, and default.json for all others.",
)


@main.command()
@click.option(
    "--database", envvar="AGENTFLEET_DATABASE", default="sqlite:///fleet.db", show_default=True, help="The store."
)
@click.option(
    "--backend",
    envvar="AGENTFLEET_BACKEND",
    type=click.Choice(["kubernetes", "process", "memory"]),
    required=True,
    help="What runs the instances.",
)
@click.option("--host", envvar="AGENTFLEET_HOST", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", envvar="AGENTFLEET_PORT", default=8080, show_default=True, help="Port; 0 takes a free one.")
@click.option(
    "--tls-cert", envvar="AGENTFLEET_TLS_CERT", type=_FILE, help="Certificate chain (PEM); read again on change."
)
@click.option("--tls-key", envvar="AGENTFLEET_TLS_KEY", type=_FILE, help="Its key (PEM).")
@click.option(
    "--token-file", envvar="AGENTFLEET_TOKEN_FILE", type=_FILE, help="Lines of: name scopes fleets token-or-sha256."
)
@click.option(
    "--access-rules", envvar="AGENTFLEET_ACCESS_RULES", type=_FILE, help="What Kubernetes' users may do (YAML)."
)
@click.option(
    "--insecure-loopback", envvar="AGENTFLEET_INSECURE_LOOPBACK", is_flag=True, help="No tokens; this machine alone."
)
@click.option("--open-metrics", envvar="AGENTFLEET_OPEN_METRICS", is_flag=True, help="/metrics needs no token.")
@click.option("--identity", envvar="AGENTFLEET_IDENTITY", help="This manager's name; the host's by default.")
@click.option(
    "--leases",
    envvar="AGENTFLEET_LEASES",
    type=click.Choice(["database", "kubernetes", "none"]),
    help="Where leases are kept; by default as fits backend and database.",
)
@click.option(
    "--namespace",
    "namespaces",
    envvar="AGENTFLEET_NAMESPACES",
    multiple=True,
    help="Where new fleets live; repeatable.",
)
@click.option(
    "--template", envvar="AGENTFLEET_TEMPLATE", type=_FILE, help="What runs where a request does not say it (YAML)."
)
@_config_schemas
@click.option(
    "--operators-may",
    envvar="AGENTFLEET_OPERATORS_MAY",
    multiple=True,
    help="Part of a template that 'operate' may say.",
)
@click.option(
    "--state-dir", envvar="AGENTFLEET_STATE_DIR", type=click.Path(path_type=Path), help="Of the process backend."
)
@click.option(
    "--keep-events",
    envvar="AGENTFLEET_KEEP_EVENTS",
    type=click.IntRange(min=0),
    default=500_000,
    show_default=True,
    help="Events that are kept, besides what recovery needs; 0 keeps all.",
)
@click.option(
    "--linger", envvar="AGENTFLEET_LINGER", default="0s", show_default=True, help="Answer on so long after SIGTERM."
)
@click.option(
    "--log-level", envvar="AGENTFLEET_LOG_LEVEL", default="info", show_default=True, help="The least that is logged."
)
def serve(
    log_level: str,
    linger: str,
    keep_events: int,
    namespaces: tuple[str, ...],
    operators_may: tuple[str, ...],
    **options: Any,
) -> None:
    """Manage all fleets of a database, and answer the REST API. SIGTERM hands over and ends."""
    import anyio  # noqa: PLC0415 - slow to import, and only this needs it

    from agentfleet.server.logs import log_as_json  # noqa: PLC0415
    from agentfleet.server.serving import Options  # noqa: PLC0415
    from agentfleet.server.serving import serve as run  # noqa: PLC0415
    from agentfleet.waiting import seconds_of  # noqa: PLC0415

    try:
        log_as_json(log_level)
        made = Options(
            linger=seconds_of(linger, "linger"),
            keep_events=keep_events or None,
            namespaces=namespaces,
            operators_may=frozenset(operators_may),
            **options,
        )
        anyio.run(run, made)
    except AgentFleetError as error:
        raise click.ClickException(str(error)) from error


@main.command()
def openapi() -> None:
    """Print the OpenAPI document of the REST API."""
    import json  # noqa: PLC0415

    from agentfleet.server.app import document  # noqa: PLC0415

    click.echo(json.dumps(document(), indent=2))


@main.group()
@click.option(
    "--database", envvar="AGENTFLEET_DATABASE", default="sqlite:///fleet.db", show_default=True, help="The store."
)
@click.pass_context
def token(context: click.Context, database: str) -> None:
    """Tokens of the REST API."""
    context.obj = database


@token.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, default=("read",), show_default=True, help="read, operate or admin.")
@click.option("--fleet", "fleets", multiple=True, required=True, help="Name of a fleet, or '*' for all; repeatable.")
@click.option("--expires", help="Time until it ends, such as 90d; never by default.")
@click.pass_obj
def create_token(
    database: str, name: str, scopes: tuple[str, ...], fleets: tuple[str, ...], expires: str | None
) -> None:
    """Make a token, and print it: this once, and never again."""
    from agentfleet.server import tokens  # noqa: PLC0415

    click.echo(_say(lambda: tokens.create(database, name, scopes=scopes, fleets=fleets, expires=expires)))


@token.command("list")
@click.pass_obj
def list_tokens(database: str) -> None:
    """List all tokens, revoked ones included."""
    from agentfleet.server import tokens  # noqa: PLC0415

    click.echo(_say(lambda: tokens.listed(database)))


@token.command("revoke")
@click.argument("name")
@click.pass_obj
def revoke_token(database: str, name: str) -> None:
    """End a token, by its name or id."""
    from agentfleet.server import tokens  # noqa: PLC0415

    click.echo(_say(lambda: tokens.revoke(database, name)))


@main.group()
@click.option(
    "--database", envvar="AGENTFLEET_DATABASE", default="sqlite:///fleet.db", show_default=True, help="The store."
)
@click.pass_context
def config(context: click.Context, database: str) -> None:
    """Configuration of fleets, out of a database and into one."""
    context.obj = database


@config.command("export")
@click.option("--fleet", "fleets", multiple=True, help="Name of a fleet; repeatable. All by default.")
@click.pass_obj
def export_config(database: str, fleets: tuple[str, ...]) -> None:
    """Print the newest configuration of fleets, as one JSON text that 'import' reads."""
    from agentfleet.server import archive  # noqa: PLC0415

    click.echo(_say(lambda: archive.exported(database, fleets)), nl=False)


@config.command("import")
@click.argument("file", type=_FILE)
@click.option("--reason", required=True, help="Why; it stands in the history.")
@click.option("--dry-run", is_flag=True, help="Check, say what would change, and publish nothing.")
@_config_schemas
@click.pass_obj
def import_config(database: str, file: Path, reason: str, config_schemas: Path | None, *, dry_run: bool) -> None:
    """Publish the configuration in a file where it differs from the newest; all is checked before the first."""
    from agentfleet.server import archive  # noqa: PLC0415

    click.echo(_say(lambda: archive.imported(database, file, reason=reason, schemas=config_schemas, dry_run=dry_run)))


@main.command()
@click.option("--database", required=True, envvar="AGENTFLEET_DATABASE", help="Its address.")
@click.option(
    "--to", default="head", show_default=True, help="Number of a migration; head: this version's newest; base: none."
)
@click.option("--yes", is_flag=True, help="Do not ask before a migration that may drop something.")
def migrate(database: str, to: str, *, yes: bool) -> None:
    """Bring a database's tables to this version, or with --to back to those of an earlier one.

    Going back DROPS what the later tables hold: below 0007 which entries of the audit are of which chain (they are
    not found to fit any more), below 0006 the keys of requests to configure, below 0005 tokens and the audit, below
    0004 rollouts in rings and acknowledgements, below 0003 fleets and operations; base drops all.
    """
    try:
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - slow to import, and needs an extra

        from agentfleet.stores.sql import migrate as move  # noqa: PLC0415
    except ImportError as error:
        raise click.ClickException("databases need 'agentfleet[sql]': pip install 'agentfleet[sql]'") from error
    if to != "head" and not yes:
        click.confirm(f"Going back to {to} drops what later tables hold (see --help). Go on?", abort=True)
    try:
        move(database, to)
    except (AgentFleetError, SQLAlchemyError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, envvar="AGENTFLEET_HOST", help="Where it listens.")
@click.option("--port", default=8080, show_default=True, envvar="AGENTFLEET_PORT", help="And the port.")
@click.option(
    "--tls-cert",
    envvar="AGENTFLEET_TLS_CERT",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its certificate, if it speaks TLS.",
)
@click.option("--path", default="/livez", show_default=True, help="What to ask for; /readyz: whether it may get work.")
def alive(host: str, port: int, tls_cert: Path | None, path: str) -> None:
    """Ask the manager on this machine whether it lives, as a container's health check does."""
    from agentfleet.liveness import ask  # noqa: PLC0415

    try:
        click.echo(ask(host, port, path=path, certificate=tls_cert))
    except (OSError, RuntimeError) as error:
        raise click.ClickException(f"http{'s' if tls_cert else ''}://{host}:{port}{path}: {error}") from error


def _say(work: Callable[[], str]) -> str:
    try:
        return work()
    except AgentFleetError as error:
        raise click.ClickException(str(error)) from error


def _read(file: Path) -> FleetSpec:
    """A fleet's spec from a file; what is wrong with it, as the command's own error."""
    from agentfleet.specs import FleetSpec  # noqa: PLC0415

    text = file.read_text()
    try:
        return FleetSpec.from_json(text) if file.suffix == ".json" else FleetSpec.from_yaml(text)
    except AgentFleetError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
