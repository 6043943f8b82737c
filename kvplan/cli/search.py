"""`kvplan search`: from a profile and a memory target to a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvplan.cli.console import MAX_SEED, MAX_TOKENS
from kvplan.cli.options import AsJson, Column, Device, DType, MaxTokens, ReplayMemory, Split, Timeout, TrustRemoteCode

if TYPE_CHECKING:
    from kvplan.cli.front import TimedFront
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Target
    from kvplan.search.confirm import SearchResult


def command(
    mem: Annotated[str, typer.Option(help="Memory target: 40% or 0.4 of the full cache, or 512MiB with --context.")],
    profile: Annotated[Path, typer.Option(help="What kvplan calibrate wrote.")] = Path("profile.json"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the policy.")] = Path("policy.yaml"),
    context: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_TOKENS, help="Prompt tokens per row, for a target in bytes.", show_default=False),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows, for a target in bytes.", show_default="1 row")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or a hub id; without it, the bundled model.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Prompts to search on; may be repeated. Without it, the bundled ones.", show_default=False),
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=3, help="Most prompts.", show_default="all")] = None,
    max_tokens: MaxTokens = None,
    column: Column = None,
    split: Split = None,
    trials: Annotated[int, typer.Option(min=0, help="Trials in all. 0: what the profile alone suggests.")] = 60,
    timeout: Timeout = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampler, and of the rows of a dataset.")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            help="The study's file, or a server: postgresql+psycopg://user@host/database. A killed search goes on from "
            "it, and workers join it.",
            show_default="a file beside the policy",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Name of the study on a server, for workers.", show_default="one that follows from the inputs"
        ),
    ] = None,
    stale_after: Annotated[
        float, typer.Option(min=1, help="Seconds without a sign of life after which a trial is tried again.")
    ] = 180,
    evictor: Annotated[
        list[str] | None, typer.Option(help="An evictor to choose from; may be repeated.", show_default="all measured")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A codec to choose from beside plain slots; may be repeated. dense: none.", show_default="all measured"
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Decide only these, by commas: budget, evictor, codec, sharing, heads, channels, params.",
            show_default="as many as the trials can explore",
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave these decisions out, by commas.", show_default=False)
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Layers that are decided together: 0-3/4-7, or how many groups of alike sensitivity, like 3.",
            show_default="from the profile",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="kl, task (share of answers that are wrong) or mixed (their sum).")
    ] = "kl",
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="A task's smallest share of right answers, like fact=0.95; may be repeated.", show_default=False
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto", help="Search all smaller memory targets too; keep the best plan at each beside the policy."
        ),
    ] = False,
    from_study: Annotated[
        str | None,
        typer.Option(
            help="Answer from this finished study (its file or URL) without new trials, for another --mem.",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="auto, gp, tpe or random.")] = "auto",
    sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that every layer keeps.")] = 4,
    recent_tokens: Annotated[int, typer.Option(min=1, help="Last tokens that every layer keeps.")] = 16,
    min_slots: Annotated[int, typer.Option(min=1, help="Fewest slots of a layer.")] = 64,
    replay_memory: ReplayMemory = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Search the best policy under a memory target, and keep the best so far on disk."""
    from kvplan.files import check_writable, sole_writer
    from kvplan.units import parse_bytes

    target = parse_target(mem, context, batch)
    replay_bytes = None if replay_memory is None else parse_bytes(replay_memory)
    if from_study is not None:
        from kvplan.cli.answer import answer_from

        return answer_from(from_study, study, target, output, model, data, device, trust_remote_code, as_json)
    check_writable(output, [profile, storage, *(data or [])])
    address = storage or output.with_name(f"{output.stem}.{mem.strip().replace('%', 'pct')}.journal")

    from kvplan.calibrate.profile import Profile
    from kvplan.cli.front import front_path, front_shares, time_and_keep
    from kvplan.search.budget import Protection
    from kvplan.search.compile import budget_for
    from kvplan.search.decisions import decisions, names
    from kvplan.search.layer_groups import parse_groups
    from kvplan.search.objective import Judge, Objective, parse_floors
    from kvplan.search.samplers import check_name
    from kvplan.search.space import space_for

    check_name(sampler)
    goal = Objective(objective, parse_floors(floor or []))
    chosen = decisions(trials, names(only), names(without))
    measured = Profile.load(profile)
    protection = Protection(sink_tokens=sink_tokens, recent_tokens=recent_tokens, min_slots=min_slots)
    evictors = evictor or []
    # Says at once what cannot be, before the model is loaded.
    planned = budget_for(measured, measured.spec, target, protection)
    together = parse_groups(groups, planned.layers)

    def compiled(at: Target, shares: Sequence[int] = ()) -> object:
        return space_for(measured, budget_for(measured, measured.spec, at, protection), chosen, evictors, together,
                         codec, shares)  # fmt: skip

    compiled(target)
    shares = front_shares(target, compiled) if pareto else ()

    from kvplan.check.scoring import Scorer
    from kvplan.cli.console import note, stages
    from kvplan.cli.next_steps import commands, tell
    from kvplan.cli.prompt_warnings import warn_of_calibration, warn_of_few, warn_of_twins
    from kvplan.cli.study_inputs import found_on, new_inputs
    from kvplan.cli.watch import Watch
    from kvplan.policy.memory import plan
    from kvplan.search.confirm import hold_out
    from kvplan.search.storage import where
    from kvplan.search.study import search

    told = {"model": model, "data": data, "max_prompts": max_prompts, "max_tokens": max_tokens, "column": column,
            "split": split}  # fmt: skip
    inputs = new_inputs(told, seed, dtype, device, trust_remote_code, made_for=(profile, measured.spec))
    spec, examples = inputs.spec, inputs.examples
    tasks = [example.task for example in examples]
    search_prompts, confirm_prompts = hold_out(tasks)
    for part in (search_prompts, confirm_prompts):
        goal.check([tasks[i] for i in part], [bool(examples[i].answers) for i in part])
    warn_of_calibration(examples, measured.statistics.prompt_hashes)
    warn_of_twins(examples, search_prompts, confirm_prompts)
    warn_of_few(len(confirm_prompts), max_prompts)
    scorer = Scorer(inputs.network, spec, examples, sharing="sharing" in chosen, replay_memory=replay_bytes)
    watch: Watch | None = None
    try:
        with sole_writer(output, str(address)), stages() as report:
            watch = Watch(report, output, trials, lambda policy: plan(policy, spec, [planned.context_tokens]).ratio,
                          scorer.prepare, search_prompts)  # fmt: skip
            result = search(
                measured,
                spec,
                target,
                scorer.score,
                search_prompts=search_prompts,
                confirm_prompts=confirm_prompts,
                trials=trials,
                timeout=timeout,
                seed=seed,
                storage=address,
                study=study,
                stale_after=stale_after,
                evictors=evictors,
                codecs=codec,
                groups=together,
                decisions=chosen,
                judge=Judge(goal, tasks),
                sampler=sampler,
                shares=shares,
                protection=protection,
                identity=inputs.known,
                inputs=told,
                provenance=found_on(
                    inputs, measured.data_fingerprint, measured.statistics.prompt_hashes, model, {"seed": seed}
                ),
                **watch.callbacks(),
            )
    except KeyboardInterrupt:
        if watch is not None and watch.saved:
            note(f"the best policy so far is in {output}; the same command goes on from {where(address)}")
        raise
    if result.resumed:
        note(f"{result.resumed} trials are from earlier runs ({where(address)})")
    if result.by_others:
        note(f"trials run by other processes: {result.by_others}")
    front = None
    if pareto:
        prompt = examples[confirm_prompts[0]].prompt_ids
        front = time_and_keep(front_path(output), inputs.network, spec, prompt, result, seed)
    print_answer(result, spec, front, as_json)
    if pareto:
        note(f"wrote {front_path(output)}: {len(result.front)} plans, none beaten in both bytes and KL")
    note(f"wrote {output} ({where(address)} keeps the trials)")
    tell(commands(output, model=model, data=bool(data), device=device, trust_remote_code=trust_remote_code))


def print_answer(result: SearchResult, spec: ModelSpec, front: TimedFront | None, as_json: bool) -> None:
    """The winner, what it was chosen among, and the front."""
    import json

    from kvplan.cli.console import out
    from kvplan.report.front import front_notes, front_table
    from kvplan.report.policy import picture
    from kvplan.report.search import as_data, summary
    from kvplan.report.tables import wrapped

    if as_json:
        found: dict[str, object] = as_data(result)
        if front is not None:
            found["front"] = front.points
            if front.predicted is not None:
                found["predicted_speedups"] = front.predicted
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    out.print(picture(result.policy, result.context_tokens, result.bytes.ratio), soft_wrap=True)
    out.print(summary(result), soft_wrap=True)
    if front is not None:
        out.print(front_table(result, spec, front.costs, front.steps), soft_wrap=True)
        for line in front_notes(front.costs, front.steps):
            out.print(wrapped(line), soft_wrap=True)


def parse_target(mem: str, context: int | None, batch: int | None) -> Target:
    """--mem with its --context and --batch.

    Raises:
        TargetError: not a share or a size, or an option that cannot take effect.
    """
    from kvplan.errors import TargetError
    from kvplan.policy.schema import Target
    from kvplan.units import is_size, parse_bytes, parse_share

    if not is_size(mem):
        share = parse_share(mem)
        if context is not None or batch is not None:
            raise TargetError(f"--mem {mem} holds for any context and batch; leave out --context and --batch")
        return Target(share=share)
    size = parse_bytes(mem)
    if context is None:
        raise TargetError(f"--mem {mem} is a size; say with --context for how many prompt tokens per row (and --batch)")
    return Target(bytes=size, context_tokens=context, batch=batch or 1)
