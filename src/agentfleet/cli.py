"""The `agentfleet` command (extra `cli`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agentfleet.errors import AgentFleetError, MissingExtra

if TYPE_CHECKING:
    from agentfleet.specs import FleetSpec

try:
    import click
except ImportError as error:  # a plain install has the command's name, but not what it is made of
    raise MissingExtra("the agentfleet command needs an extra: pip install 'agentfleet[cli]'") from error


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
