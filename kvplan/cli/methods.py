"""`kvplan methods`: what a policy can be made of."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="One method, told in full.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every evictor, head split, merger, channel selector, codec, allocator and sharing ranker."""
    import json

    from kvplan.cli.console import out
    from kvplan.errors import MethodError
    from kvplan.registry import unknown
    from kvplan.report.methods import card, found, table

    known = found()
    if name is not None:
        chosen = [method for method in known if method.name == name]
        if not chosen:
            raise MethodError(unknown("method", name, sorted({method.name for method in known})))
        known = chosen
    if as_json:
        typer.echo(json.dumps([method.to_json() for method in known], indent=2))
    elif name is not None:
        for method in known:
            out.print(card(method), soft_wrap=True)
    else:
        out.print(table(known), soft_wrap=True)
        out.print("kvplan methods NAME tells one in full; how they go together: docs/policy.md", style="dim")
