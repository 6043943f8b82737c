"""`kvplan doctor`: what this machine has, and what is slow here and why."""

from __future__ import annotations

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell versions, devices and kernels, and what would make kvplan faster here. Exit code 1 if something is wrong."""
    import json

    from kvplan.check.doctor import examine
    from kvplan.cli.console import out
    from kvplan.report.doctor import picture

    finding = examine()
    if as_json:
        typer.echo(json.dumps(finding.to_json(), indent=2))
    else:
        out.print(picture(finding), soft_wrap=True)
    raise typer.Exit(1 if finding.problems else 0)
