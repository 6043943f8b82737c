"""`kvplan profile`: look at profiles and merge those of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvplan.cli.config import Command

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Show profiles and merge those of several shards of prompts."
)


@app.command(cls=Command)
def merge(
    profiles: Annotated[
        list[Path], typer.Argument(metavar="PROFILE", help="Profiles of one model on different prompts.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the merged profile.")],
) -> None:
    """Merge the profiles of shards into the profile of all their prompts."""
    from functools import reduce

    from kvplan.calibrate.profile import Profile, describe
    from kvplan.calibrate.profile import merge as merge_two
    from kvplan.cli.console import note
    from kvplan.errors import ProfileError
    from kvplan.files import check_writable

    if len(profiles) < 2:
        raise ProfileError("merging needs at least two profiles")
    check_writable(output)

    def add(merged: Profile, path: Path) -> Profile:
        try:
            return merge_two(merged, Profile.load(path))
        except ProfileError as error:
            raise (
                error if str(error).startswith(str(path)) else ProfileError(f"{path}: cannot be merged, {error}")
            ) from error

    merged = reduce(add, profiles[1:], Profile.load(profiles[0]))
    merged.save(output)
    note(f"{output}: {describe(merged)}; its times are sums over the {len(profiles)} profiles")


@app.command(cls=Command)
def show(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a profile as a table of layers."""
    import json

    from kvplan.calibrate.profile import Profile
    from kvplan.cli.console import out
    from kvplan.report.profile import table

    loaded = Profile.load(profile)
    if as_json:
        typer.echo(json.dumps(loaded.summary(), indent=2))
    else:
        out.print(table(loaded), soft_wrap=True)
