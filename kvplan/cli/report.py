"""`kvplan report`: what was measured, searched and planned, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.console import MAX_TOKENS
from kvplan.cli.options import OneDevice, PolicyDType, PolicyModel, TrustRemoteCode

if TYPE_CHECKING:
    from kvplan.report.inputs import Inputs
    from kvplan.report.sample import Sample

SAMPLE_TOKENS = 1024


def command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...", help="A profile, a search's journal, policies, a results file: what there is."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The report; with --plot the picture (.svg, .png); with --data the CSV.",
            show_default="report.html, NAME.svg, standard output",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            help="One picture alone: sensitivity, budgets, bytes, pareto, history, parameters or kept.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="The numbers of --plot as CSV.")] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            help="A search that is kept on a server: postgresql+psycopg://user@host/database.", show_default=False
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help="The name of that search.", show_default=False)] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_TOKENS,
            help="Prompt tokens that budgets and bytes are drawn for.",
            show_default="the sample's, or the planned ones",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="A prompt to show the kept tokens of; - is standard input.", show_default="a bundled one"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of that prompt.")] = SAMPLE_TOKENS,
    sample: Annotated[
        bool, typer.Option("--sample/--no-sample", help="Run the policy's model to see which tokens each layer keeps.")
    ] = True,
    model: PolicyModel = None,
    device: OneDevice = "cpu",
    dtype: PolicyDType = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw what was measured, searched and planned as one HTML file that needs no network; short forms go to stdout."""
    from dataclasses import replace

    from kvplan.errors import KVPlanError
    from kvplan.files import check_writable

    files = files or []
    if not files and storage is None:
        raise KVPlanError("nothing to report on; name a profile, a search's journal, policies or a results file")
    if study is not None and storage is None:
        raise KVPlanError("--study names a study on a server; say with --storage where")
    if data and plot is None:
        raise KVPlanError("--data gives the numbers of one picture; name it with --plot")
    target = output or (None if data else Path("report.html" if plot is None else f"{plot}.svg"))
    if plot is not None:
        _check_plot(plot, target, data)
    if target is not None:
        check_writable(target, [*files, prompt_file])

    from kvplan.report.inputs import read_inputs

    inputs = replace(read_inputs(files, storage, study), context=context)
    if prompt_file is not None and (inputs.policy is None or not sample):
        raise KVPlanError("--prompt-file is for the kept tokens of a policy: give a policy, and leave out --no-sample")
    if not data:
        from kvplan.report.plots.base import figure_class

        figure_class()  # what is missing is said before the model runs
    if sample and plot in (None, "kept") and inputs.policies:
        found = _sample(inputs, prompt_file, max_tokens, (model, dtype, device, trust_remote_code))
        inputs = replace(inputs, sample=found)
    if plot is None:
        assert target is not None
        _write_report(inputs, target)
    else:
        _write_plot(inputs, plot, target, data)


def _check_plot(plot: str, target: Path | None, data: bool) -> None:
    from kvplan.errors import KVPlanError
    from kvplan.report.plots import plots
    from kvplan.report.plots.svg import SUFFIXES

    plots[plot]  # says which there are
    if not data and target is not None and target.suffix not in SUFFIXES:
        raise KVPlanError(f"{target}: pictures are written as {' or '.join(SUFFIXES)}")


def _sample(
    inputs: Inputs, prompt_file: Path | None, max_tokens: int, load: tuple[str | None, str | None, str, bool]
) -> Sample:
    """Run the model of the first policy on the prompt."""
    from kvplan.cli.console import note
    from kvplan.cli.run import load_for
    from kvplan.errors import ModelError
    from kvplan.report.sample import sample

    chosen = inputs.policies[0]
    name, dtype, device, trust = load
    note("running the model on a sample prompt")
    try:
        network, tokenizer, spec = load_for(chosen.path, chosen.policy, name, dtype, device, trust)
    except ModelError as error:
        raise ModelError(f"{error}; --no-sample makes the report without the model") from error
    limit = min(max_tokens, spec.max_context_tokens or max_tokens)
    ids, source = _prompt(tokenizer, prompt_file, limit)
    return sample(network, tokenizer, spec, chosen.policy, ids, source)


def _prompt(tokenizer: Any, prompt_file: Path | None, limit: int) -> tuple[list[int], str]:
    """The first `limit` tokens of a prompt, and what it is."""
    import sys

    from kvplan.calibrate.prompts import load_examples
    from kvplan.demo.data import calib_data_path
    from kvplan.errors import DataError
    from kvplan.files import read_text

    if prompt_file is None:
        example = load_examples([calib_data_path("heldout")], tokenizer, max_prompts=1)[0]
        ids, source = list(example.prompt_ids), f"Prompt {example.id} of the bundled held-out prompts"
    else:
        text = sys.stdin.read() if str(prompt_file) == "-" else read_text(prompt_file, "prompt")
        ids = list(tokenizer(text)["input_ids"])
        source = f"The prompt in {prompt_file.name}" if str(prompt_file) != "-" else "The prompt"
    if not ids:
        raise DataError(f"{prompt_file}: the prompt is empty")
    cut = f", its first {limit} of {len(ids)} tokens" if len(ids) > limit else ""
    return ids[:limit], source + cut


def _write_report(inputs: Inputs, target: Path) -> None:
    from kvplan.cli.console import note, out
    from kvplan.files import write_text
    from kvplan.report.html import render
    from kvplan.report.terminal import short_forms

    write_text(target, render(inputs))
    out.print(short_forms(inputs), soft_wrap=True)
    note(f"wrote {target}")


def _write_plot(inputs: Inputs, name: str, target: Path | None, data: bool) -> None:
    from kvplan.cli.console import note
    from kvplan.errors import KVPlanError
    from kvplan.files import write_text
    from kvplan.report.plots import plots
    from kvplan.report.plots.svg import save_plot

    chosen = plots[name]()
    found = chosen.data(inputs)
    if found is None:
        raise KVPlanError(f"'{name}' cannot be drawn from these files: it needs {chosen.needs}")
    if data:
        text = chosen.table(found).csv()
        if target is None:
            typer.echo(text, nl=False)
            return
        write_text(target, text)
    else:
        assert target is not None
        save_plot(chosen, found, target)
    note(f"wrote {target}")
