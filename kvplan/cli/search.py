"""`kvplan search`: from a profile and a memory target to a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvplan.cli.console import MAX_SEED, MAX_TOKENS
from kvplan.cli.options import AsJson, Column, Device, DType, MaxTokens, ReplayMemory, Split, Timeout, TrustRemoteCode

if TYPE_CHECKING:
    from kvplan.check.results import Cost
    from kvplan.check.step_costs import StepCosts
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Target
    from kvplan.search.confirm import SearchResult

COST_TOKENS, COST_ROUNDS = 24, 3
STEP_TOKENS, STEP_ROUNDS = 12, 2


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
    from kvplan.errors import DataError, ProfileError
    from kvplan.files import check_writable, sole_writer, write_text
    from kvplan.units import parse_bytes

    target = parse_target(mem, context, batch)
    replay_bytes = None if replay_memory is None else parse_bytes(replay_memory)
    if from_study is not None:
        from kvplan.cli.answer import answer_from

        return answer_from(from_study, study, target, output, model, data, device, trust_remote_code, as_json)
    check_writable(output, [profile, storage, *(data or [])])
    address = storage or output.with_name(f"{output.stem}.{mem.strip().replace('%', 'pct')}.journal")

    from kvplan.calibrate.profile import Profile
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

    import json

    from kvplan import __version__
    from kvplan.calibrate.collect import prompt_hash
    from kvplan.calibrate.prompts import data_fingerprint, load_examples
    from kvplan.check.scoring import Scorer
    from kvplan.cli.console import err, note, out, stages, warn
    from kvplan.cli.next_steps import commands, tell
    from kvplan.cli.prompt_warnings import warn_of_calibration, warn_of_few, warn_of_twins
    from kvplan.demo.data import calib_data_path
    from kvplan.loading import load_model
    from kvplan.policy.memory import plan
    from kvplan.policy.schema import Policy
    from kvplan.policy.serialize import save_policy
    from kvplan.report.front import front_data, front_notes, front_table, predictions
    from kvplan.report.policy import picture
    from kvplan.report.search import as_data, live_table, name_notes, summary, trial_line
    from kvplan.report.tables import wrapped
    from kvplan.search.confirm import TrialRow, hold_out
    from kvplan.search.seen import KEY, packed
    from kvplan.search.storage import where
    from kvplan.search.study import search

    network, tokenizer, spec = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if spec.fingerprint != measured.spec.fingerprint:
        raise ProfileError(
            f"{profile}: made for another model ({measured.spec.fingerprint}; this one is {spec.fingerprint}); "
            "give its --model, or calibrate this one"
        )
    if model is not None and not data:
        warn("no --data: using the prompts of the bundled model, whose world this model may not know")
    examples = load_examples(
        data or [calib_data_path("search")],
        tokenizer,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        context_limit=spec.max_context_tokens,
        column=column,
        split=split,
        seed=seed,
    )
    examples = [example for example in examples if example.continuation_ids]
    if len(examples) < 3:
        raise DataError(f"{len(examples)} prompts have a continuation; a search needs at least 3")
    tasks = [example.task for example in examples]
    search_prompts, confirm_prompts = hold_out(tasks)
    for part in (search_prompts, confirm_prompts):
        goal.check([tasks[i] for i in part], [bool(examples[i].answers) for i in part])
    warn_of_calibration(examples, measured.statistics.prompt_hashes)
    warn_of_twins(examples, search_prompts, confirm_prompts)
    warn_of_few(len(confirm_prompts))
    scorer = Scorer(network, spec, examples, sharing="sharing" in chosen, replay_memory=replay_bytes)
    fingerprint = data_fingerprint(examples)
    saved = False

    def on_best(policy: Policy) -> None:
        nonlocal saved
        save_policy(policy, output)
        saved = True

    try:
        with sole_writer(output, str(address)), stages() as report:

            def prepare(prompts: Sequence[int]) -> None:
                stage = "prefilling prompts"
                report(stage, 0, len(prompts))
                scorer.prepare(prompts, lambda done, total: report(stage, done, total))
                if prompts == search_prompts:
                    report("searching", 0, trials)

            def held(row: TrialRow) -> float:
                return plan(row.policy, spec, [planned.context_tokens]).ratio

            rows: list[TrialRow] = []

            def on_trial(row: TrialRow, best: TrialRow, count: int) -> None:
                if not rows:
                    for line in name_notes([row]):
                        note(line)
                rows.append(row)
                if not err.is_terminal:
                    note(trial_line(row, held(row), row is best))
                report("searching", count, trials, below=live_table(rows, held) if err.is_terminal else None)

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
                say=note,
                on_best=on_best,
                on_trial=on_trial,
                on_confirm=lambda done, total: report("confirming", done, total),
                prepare=prepare,
                evictors=evictors,
                codecs=codec,
                groups=together,
                decisions=chosen,
                judge=Judge(goal, tasks),
                sampler=sampler,
                shares=shares,
                protection=protection,
                identity={"data": fingerprint, "dtype": spec.dtype, "kvplan": __version__},
                inputs={
                    "model": model,
                    "data": data,
                    "max_prompts": max_prompts,
                    "max_tokens": max_tokens,
                    "column": column,
                    "split": split,
                },
                provenance={
                    "kvplan": __version__,
                    "profile": measured.data_fingerprint,
                    "data": fingerprint,
                    "seed": seed,
                    "model": model or "bundled",
                    KEY: packed([*measured.statistics.prompt_hashes, *map(prompt_hash, examples)]),
                },
            )
    except KeyboardInterrupt:
        if saved:
            note(f"the best policy so far is in {output}; the same command goes on from {where(address)}")
        raise
    if result.resumed:
        note(f"{result.resumed} trials are from earlier runs ({where(address)})")
    if result.by_others:
        note(f"trials run by other processes: {result.by_others}")
    found: dict[str, object] = as_data(result)
    if pareto:
        timed = examples[confirm_prompts[0]].prompt_ids
        steps = front_steps(network, spec, timed, result)
        costs = front_costs(network, spec, timed, result)
        front = front_data(result, spec, costs, seed, steps)
        write_text(front_path(output), json.dumps(front, indent=1, allow_nan=False) + "\n")
        found["front"] = front["points"]
        if steps is not None:
            found["predicted_speedups"] = predictions(result, spec, steps)
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        out.print(picture(result.policy, result.context_tokens, result.bytes.ratio), soft_wrap=True)
        out.print(summary(result), soft_wrap=True)
        if pareto:
            out.print(front_table(result, spec, costs, steps), soft_wrap=True)
            for line in front_notes(costs, steps):
                out.print(wrapped(line), soft_wrap=True)
    if pareto:
        note(f"wrote {front_path(output)}: {len(result.front)} plans, none beaten in both bytes and KL")
    note(f"wrote {output} ({where(address)} keeps the trials)")
    tell(commands(output, model=model, data=bool(data), device=device, trust_remote_code=trust_remote_code))


def front_path(output: Path) -> Path:
    """Where --pareto keeps its front: beside the policy."""
    return output.with_name(f"{output.stem}.front.json")


def front_shares(target: Target, compiled: Callable[[Target], object]) -> tuple[int, ...]:
    """The memory targets of --pareto.

    Raises:
        TargetError: the target is no share.
    """
    from kvplan.errors import TargetError
    from kvplan.search.front import feasible_shares

    if target.share is None:
        raise TargetError("--pareto needs a target in percent, like --mem 80%")
    return feasible_shares(target.share, compiled)


def front_costs(network: object, spec: ModelSpec, prompt: Sequence[int], result: SearchResult) -> dict[int, Cost]:
    """Decode speed of the front's plans, measured side by side on one prompt; by trial."""
    from kvplan.check.cost import costs
    from kvplan.cli.console import progress

    policies = {str(f.trial.number): f.trial.policy for f in result.front}
    steps = len(policies) + (len(policies) + 1) * (COST_ROUNDS + 1)
    tokens = min(COST_TOKENS, room_after(prompt, spec))
    with progress("timing the front", steps) as advance:
        found = costs(network, spec, policies, prompt, new_tokens=tokens, repeats=COST_ROUNDS, progress=advance)
    return {int(number): cost for number, cost in found.items()}


def front_steps(network: object, spec: ModelSpec, prompt: Sequence[int], result: SearchResult) -> StepCosts | None:
    """What predicts the decode speed of all trials, from what their layers do; None after a prompt without room."""
    from kvplan.check.step_probes import probes_for, step_costs
    from kvplan.cli.console import progress

    tokens = min(STEP_TOKENS, room_after(prompt, spec))
    if not tokens:
        return None
    probes = probes_for([row.policy for row in (*result.trials, *(f.trial for f in result.front))], spec, len(prompt))
    steps = (sum(len(probe.policies) for probe in probes) + 1) * (STEP_ROUNDS + 1)
    with progress("timing steps", steps) as advance:
        return step_costs(network, spec, probes, prompt, new_tokens=tokens, repeats=STEP_ROUNDS, progress=advance)


def room_after(prompt: Sequence[int], spec: ModelSpec) -> int:
    """Tokens that the model has positions for after a prompt."""
    return max(0, (spec.max_context_tokens or MAX_TOKENS) - len(prompt))


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
