"""`kvplan`: the commands, and nothing heavy at import, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvplan import __version__
from kvplan.cli import (
    bench,
    calibrate,
    check,
    config,
    doctor,
    eval,
    methods,
    policy,
    profile,
    report,
    run,
    search,
    worker,
)
from kvplan.cli.console import set_quiet, set_verbose
from kvplan.cli.exits import leave, run_app

app = typer.Typer(
    name="kvplan",
    help="Plan, search and run a KV-cache policy for a transformers model under a memory target.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut long options off at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvplan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No talk and no progress on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also say what the libraries below say.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also KVPLAN_DEBUG=1).")] = False,
    explain_config: Annotated[
        bool, typer.Option("--explain-config", help="Print each option's value and where it is from; do nothing else.")
    ] = False,
) -> None:
    # `debug` is read by run_app, which also sees failures before this function runs.
    set_quiet(quiet)
    set_verbose(verbose)
    config.explain = explain_config


for name, module in {
    "calibrate": calibrate,
    "search": search,
    "worker": worker,
    "run": run,
    "eval": eval,
    "check": check,
    "bench": bench,
    "report": report,
    "methods": methods,
    "doctor": doctor,
}.items():
    app.command(name, cls=config.Command)(module.command)
app.add_typer(policy.app, name="policy")
app.add_typer(profile.app, name="profile")


def main() -> None:
    """The `kvplan` script."""
    # OpenMP reads it when torch is imported: threads that spin while they wait starve each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    leave(run_app(app, sys.argv[1:]))
