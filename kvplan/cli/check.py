"""`kvplan check`: policies against limits and a baseline, for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.console import MAX_SEED
from kvplan.cli.options import (
    Column,
    LastTokens,
    OneDevice,
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
    from kvplan.check.adaptive import Asked, Measure, Outcome
    from kvplan.check.criteria import Limits
    from kvplan.check.evaluate import Candidate
    from kvplan.check.results import PromptRow, Results
    from kvplan.cli.prompts import Prompts
    from kvplan.model_spec import ModelSpec

HELDOUT_PROMPTS = 250
KL_RISE, SCORE_LOSS, RECOVERY = 0.02, 0.03, 0.95


def command(
    policy: PolicyFiles = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Results to compare with, of --update or kvplan eval.", show_default=False)
    ] = None,
    max_kl_rise: Annotated[
        float, typer.Option(min=0.0, help="With --baseline: most that the KL may be above it, nats.")
    ] = KL_RISE,
    max_score_loss: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --baseline: most that the score may be below it.")
    ] = SCORE_LOSS,
    min_recovery: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Least score, of the full cache's; 0: any.",
            show_default=f"{RECOVERY} without --baseline",
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="Most KL from the full cache, nats.", show_default=False)
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Most bytes after the prompts, of a full cache's: 40%.", show_default=False)
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Most seconds a token, of transformers' full cache's: 1.5.", show_default="not timed"
        ),
    ] = None,
    update: Annotated[bool, typer.Option(help="Measure all prompts and write the --baseline.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.", show_default=False)] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Append markdown, as for $GITHUB_STEP_SUMMARY.", show_default=False)
    ] = None,
    model: PoliciesModel = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts: .jsonl, .txt or a dataset; may be repeated.",
            show_default=f"for the bundled model, the baseline's number or {HELDOUT_PROMPTS} of its own",
        ),
    ] = None,
    task: Tasks = None,
    suite: Suites = None,
    context: TaskContexts = None,
    samples: Samples = 8,
    question: Question = "both",
    scorer: ScorerName = None,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Most prompts of --data.", show_default="the baseline's number, or all")
    ] = None,
    max_tokens: LastTokens = None,
    column: Column = None,
    split: Split = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the order of the prompts, and of tasks.")] = 0,
    device: OneDevice = "cpu",
    dtype: PoliciesDType = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Hold policies to limits and to a baseline: exit code 0 pass, 1 regression, 3 inconclusive, 4 not comparable.

    Prompts are measured one by one, in growing steps, until every criterion is clear or no prompts are left.
    """
    from kvplan.check.criteria import Limits
    from kvplan.cli.prompt_warnings import warn_of_found_on
    from kvplan.cli.prompts import Prompts, labels, load_all_fit, refuse_twice
    from kvplan.errors import KVPlanError
    from kvplan.units import parse_share

    files = policy or []
    if not files:
        raise KVPlanError("nothing to check; give --policy FILE")
    if update and baseline is None:
        raise KVPlanError("--update writes the --baseline; name its file")
    limits = Limits(
        max_kl_rise=None if baseline is None else max_kl_rise,
        max_score_loss=None if baseline is None else max_score_loss,
        max_kl=max_kl,
        # Of 0, every policy recovers as much.
        min_recovery=(RECOVERY if baseline is None and min_recovery is None else min_recovery) or None,
        max_bytes=None if max_bytes is None else parse_share(max_bytes),
    )
    names = labels(files)
    refuse_twice(names)
    before = _read_baseline(baseline, update)
    prompts = Prompts(
        data=data or [], tasks=task or [], suites=suite or [], contexts=context or [], samples=samples,
        question=question, scorer=scorer, max_prompts=max_prompts,
        heldout_prompts=before.data.prompts if before else HELDOUT_PROMPTS,
        data_prompts=before.data.prompts if before else None,
        max_tokens=max_tokens, column=column, split=split, seed=seed,
    )  # fmt: skip
    prompts.check_options()

    from kvplan.files import check_writable
    from kvplan.policy.serialize import load_policy

    for path in (junit, summary, baseline if update else None):
        if path is not None:
            check_writable(path, [*files, *(data or []), None if update else baseline])
    plans = [load_policy(path) for path in files]
    prompts.check_names()
    network, tokenizer, spec, bundled = load_all_fit(files, plans, model, dtype, device, trust_remote_code)
    examples, sources = prompts.load(tokenizer, spec, bundled)
    warn_of_found_on(examples, dict(zip(names, plans, strict=True)))

    from kvplan.check.evaluate import Candidate

    job = _Job(
        model=network,
        tokenizer=tokenizer,
        spec=spec,
        examples=examples,
        candidates=[
            Candidate(name=name, source=str(path), policy=plan)
            for name, path, plan in zip(names, files, plans, strict=True)
        ],
        model_name="bundled" if bundled else str(model or network.config._name_or_path),
        sources=sources,
        prompts=prompts,
    )
    if update:
        assert baseline is not None
        _update(job, baseline, as_json=as_json)
        return
    outcomes = _check(job, limits, before, str(baseline))
    if max_slowdown is not None:
        outcomes = _timed(job, outcomes, max_slowdown)
    _report(outcomes, junit, summary, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is measured, and with what."""

    model: Any
    tokenizer: Any
    spec: ModelSpec
    examples: Sequence[Example]
    candidates: Sequence[Candidate]
    model_name: str
    sources: Sequence[str]
    prompts: Prompts

    def evaluate(self, names: Sequence[str], indices: Sequence[int], progress: Any = lambda *told: None) -> Results:
        """Every prompt alone, so that its numbers do not depend on which others are measured with it."""
        from kvplan.check.evaluate import evaluate

        return evaluate(
            self.model,
            self.tokenizer,
            self.spec,
            [self.examples[i] for i in indices],
            [candidate for candidate in self.candidates if candidate.name in names],
            model_name=self.model_name,
            sources=self.sources,
            scorer=self.prompts.scorer,
            seed=self.prompts.seed,
            batch_tokens=1,
            with_costs=False,
            settings=self.prompts.settings(),
            progress=progress,
        )

    def measure(self) -> Measure:
        """For check()."""

        def rows(names: Sequence[str], indices: Sequence[int]) -> dict[str, Any]:
            found = self.evaluate(names, indices)
            return {name: found.policy(name).rows for name in names}

        return rows


def _read_baseline(path: Path | None, update: bool) -> Results | None:
    from kvplan.check.results import load_results
    from kvplan.errors import KVPlanError

    if path is None or update:
        return None
    if not path.exists():
        raise KVPlanError(f"{path}: no such baseline; write it with --update")
    return load_results(path)


def _check(job: _Job, limits: Limits, baseline: Results | None, where: str) -> list[Outcome]:
    from kvplan.check.adaptive import check, evenly
    from kvplan.check.criteria import check_comparable
    from kvplan.check.evaluate import data_identity, model_identity
    from kvplan.cli.console import progress
    from kvplan.errors import DataError

    if not job.examples:
        raise DataError("no prompts were given")
    if baseline is not None:
        data = data_identity(job.examples, job.sources, job.prompts.scorer)
        check_comparable(model_identity(job.spec, job.model_name), data, baseline, where)
    asked = [_asked(candidate, limits, baseline) for candidate in job.candidates]
    order = evenly([(e.task, e.question_aware) for e in job.examples], job.prompts.seed)
    with progress("prompts", len(order)) as advance:
        shown = 0

        def report(done: int, total: int) -> None:
            nonlocal shown
            advance(done - shown)
            shown = done

        return check(job.measure(), asked, order, report)


def _asked(candidate: Candidate, limits: Limits, baseline: Results | None) -> Asked:
    from kvplan.check.adaptive import Asked
    from kvplan.check.criteria import baseline_policy, without_scores
    from kvplan.policy.serialize import policy_fingerprint

    if baseline is None:
        return Asked(name=candidate.name, limits=limits)
    then = baseline_policy(baseline, candidate.name)
    return Asked(
        name=candidate.name,
        limits=without_scores(limits, then.rows),
        base=then.rows,
        same_plan=then.fingerprint == policy_fingerprint(candidate.policy),
    )


def _timed(job: _Job, outcomes: Sequence[Outcome], limit: float) -> list[Outcome]:
    from kvplan.check.gate import worst
    from kvplan.check.slowdown import ROUNDS, judge_slowdown, slowdown
    from kvplan.cli.console import progress

    longest = max(job.examples, key=lambda example: len(example.prompt_ids)).prompt_ids
    made = []
    with progress("timing", 2 * (ROUNDS + 1) * len(outcomes)) as advance:
        for outcome, candidate in zip(outcomes, job.candidates, strict=True):
            ratios = slowdown(job.model, job.spec, candidate.policy, longest, progress=advance)
            finding = judge_slowdown(ratios, limit)
            state = worst([outcome.state, finding.state])
            made.append(replace(outcome, state=state, findings=(*outcome.findings, finding)))
    return made


def _update(job: _Job, path: Path, *, as_json: bool) -> None:
    """Measure everything and write it, saying what changed."""
    from kvplan.check.results import load_results, save_results
    from kvplan.cli.console import note, out, stages
    from kvplan.errors import KVPlanError

    names = [candidate.name for candidate in job.candidates]
    with stages() as report:
        results = _rounded(job.evaluate(names, range(len(job.examples)), report))
    try:
        before = load_results(path) if path.exists() else None
    except KVPlanError:  # of another format: it is replaced
        before = None
    save_results(results, path)

    from kvplan.report.check import change_data, change_table

    if as_json:
        import json

        typer.echo(json.dumps(change_data(results, before), indent=2, allow_nan=False))
    else:
        out.print(change_table(results, before), soft_wrap=True)
    note(f"wrote {path}")


def _rounded(results: Results) -> Results:
    """Six digits: what tells prompts apart, in a file that is kept in a repository."""

    def short(value: float) -> float:
        return float(f"{value:.6g}")

    def row(one: PromptRow) -> PromptRow:
        return replace(one, kl=short(one.kl), top1=short(one.top1), nll=short(one.nll), full_nll=short(one.full_nll))

    policies = tuple(replace(policy, rows=tuple(map(row, policy.rows))) for policy in results.policies)
    return replace(results, policies=policies)


def _report(outcomes: Sequence[Outcome], junit: Path | None, summary: Path | None, *, as_json: bool) -> None:
    from kvplan.check.gate import State, worst
    from kvplan.cli.console import out
    from kvplan.cli.exits import FINDING_EXIT, INCONCLUSIVE_EXIT
    from kvplan.files import read_text, write_text
    from kvplan.report import check as told
    from kvplan.report.tables import wrapped

    if junit is not None:
        write_text(junit, told.junit(outcomes))
    if summary is not None:
        before = read_text(summary, "summary") if summary.exists() else ""
        write_text(summary, before + told.markdown(outcomes))
    if as_json:
        import json

        typer.echo(json.dumps(told.as_data(outcomes), indent=2, allow_nan=False))
    else:
        for outcome in outcomes:
            if outcome.findings:
                out.print(told.table(outcome), soft_wrap=True)
        for line in told.notes(outcomes):
            out.print(wrapped(line), soft_wrap=True)
        for outcome in outcomes:
            out.print(told.verdict(outcome), soft_wrap=True)
    state = worst(outcome.state for outcome in outcomes)
    if state is not State.PASS:
        raise typer.Exit(FINDING_EXIT if state is State.REGRESSION else INCONCLUSIVE_EXIT)
