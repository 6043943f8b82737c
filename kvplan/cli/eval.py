"""`kvplan eval`: policies and baselines side by side with the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.console import MAX_SEED
from kvplan.cli.options import (
    Column,
    Device,
    LastTokens,
    PoliciesDType,
    PoliciesModel,
    PolicyFiles,
    Question,
    Samples,
    ScorerName,
    Split,
    Suites,
    TaskContexts,
    Tasks,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from kvplan.calibrate.examples import Example
    from kvplan.check.baselines import Baseline
    from kvplan.model_spec import ModelSpec

HELDOUT_PROMPTS = 90


def command(
    policy: PolicyFiles = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="ALLOCATOR:EVICTOR@SHARE, as uniform:snapkv@40% or uniform:streaming+int8@40%; may be repeated.",
            show_default=False,
        ),
    ] = None,
    model: PoliciesModel = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts: .jsonl, .txt or a dataset; may be repeated.",
            show_default=f"for the bundled model, {HELDOUT_PROMPTS} of its own that no other step reads",
        ),
    ] = None,
    task: Tasks = None,
    suite: Suites = None,
    context: TaskContexts = None,
    samples: Samples = 8,
    question: Question = "both",
    scorer: ScorerName = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Most prompts of --data.", show_default="all")] = None,
    max_tokens: LastTokens = None,
    column: Column = None,
    split: Split = None,
    profile: Annotated[
        Path | None, typer.Option(help="For baselines that go by the layers' importance.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the results file.")] = Path(
        "results.json"
    ),
    speed_tokens: Annotated[int, typer.Option(min=0, help="Tokens decoded to time each policy; 0: no timing.")] = 32,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most prompt tokens that run together.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of tasks, rows of a dataset and the bootstrap.")] = 0,
    device: Device = "cpu",
    dtype: PoliciesDType = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON instead of tables.")] = False,
) -> None:
    """Measure policies and baselines beside the full cache: KL, top-1, perplexity, scores, bytes and speed."""
    from kvplan.cli.console import note, out, stages
    from kvplan.cli.prompt_warnings import warn_of_found_on
    from kvplan.cli.prompts import Prompts, labels, load_all_fit, refuse_twice

    _check_options(policy, baseline, profile)
    prompts = Prompts(
        data=data or [], tasks=task or [], suites=suite or [], contexts=context or [], samples=samples,
        question=question, scorer=scorer, max_prompts=max_prompts, heldout_prompts=HELDOUT_PROMPTS,
        max_tokens=max_tokens, column=column, split=split, seed=seed,
    )  # fmt: skip
    prompts.check_options()

    from kvplan.files import check_writable
    from kvplan.policy.serialize import load_policy

    files = policy or []
    check_writable(output, [*files, profile, *(data or [])])
    plans = [load_policy(path) for path in files]

    from kvplan.check.baselines import Baseline

    asked = [Baseline.parse(text) for text in baseline or []]

    prompts.check_names()
    network, tokenizer, spec, bundled = load_all_fit(files, plans, model, dtype, device, trust_remote_code)
    examples, sources = prompts.load(tokenizer, spec, bundled)
    warn_of_found_on(examples, dict(zip(labels(files), plans, strict=True)))

    from kvplan.check.evaluate import Candidate, evaluate
    from kvplan.check.results import save_results

    candidates = [
        Candidate(name=label, source=str(path), policy=plan)
        for label, path, plan in zip(labels(files), files, plans, strict=True)
    ]
    candidates += _baselines(asked, spec, examples, profile)
    refuse_twice([candidate.name for candidate in candidates])
    with stages() as report:
        results = evaluate(
            network,
            tokenizer,
            spec,
            examples,
            candidates,
            model_name="bundled" if bundled else str(model or network.config._name_or_path),
            sources=sources,
            scorer=scorer,
            seed=seed,
            batch_tokens=batch_tokens,
            speed_tokens=speed_tokens,
            settings=prompts.settings(),
            progress=report,
        )
    save_results(results, output)

    from kvplan.report.eval import as_data, notes, tables

    if as_json:
        import json

        typer.echo(json.dumps(as_data(results), indent=2, allow_nan=False))
    else:
        for table in tables(results):
            out.print(table, soft_wrap=True)
        for line in notes(results):
            out.print(line, soft_wrap=True)
    note(f"wrote {output}")


def _check_options(policy: Sequence[Path] | None, baseline: Sequence[str] | None, profile: Path | None) -> None:
    from kvplan.errors import KVPlanError

    if not policy and not baseline:
        raise KVPlanError("nothing to measure; give --policy FILE, or --baseline such as uniform:snapkv@40%")
    if profile and not baseline:
        raise KVPlanError("--profile is for baselines that go by the layers' importance; give a --baseline")


def _baselines(asked: Sequence[Baseline], spec: ModelSpec, examples: Sequence[Example], profile: Path | None) -> Any:
    """Their policies, for prompts of the examples' mean length."""
    from kvplan.check.evaluate import Candidate

    if not asked:
        return []
    context = -(-sum(len(e.prompt_ids) for e in examples) // max(len(examples), 1))
    facts = None
    if profile is not None:
        from kvplan.calibrate.profile import Profile
        from kvplan.errors import ProfileError

        measured = Profile.load(profile)
        if measured.spec.fingerprint != spec.fingerprint:
            raise ProfileError(
                f"{profile}: made for another model ({measured.spec.fingerprint}; this one is {spec.fingerprint})"
            )
        facts = measured.facts
    return [Candidate(name=one.name, source=one.name, policy=one.policy(spec, context, facts)) for one in asked]
