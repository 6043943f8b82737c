"""`kvplan eval`: policies and baselines side by side with the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.console import MAX_SEED, MAX_TOKENS

if TYPE_CHECKING:
    from kvplan.calibrate.prompts import Example
    from kvplan.check.baselines import Baseline
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Policy

HELDOUT_PROMPTS = 90
DEFAULT_CONTEXT = 4096
WAYS = {"both": (False, True), "agnostic": (False,), "aware": (True,)}


def command(
    policy: Annotated[
        list[Path] | None, typer.Option(help="A policy file; may be repeated.", show_default=False)
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="ALLOCATOR:EVICTOR@SHARE, as uniform:snapkv@40% or uniform:streaming+int8@40%; may be repeated.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or a hub id.", show_default="the first policy's, or the bundled one")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts: .jsonl, .txt or a dataset; may be repeated.",
            show_default=f"for the bundled model, {HELDOUT_PROMPTS} of its own that no other step reads",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A generated task, or all; may be repeated.", show_default=False)
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="A public suite: NAME:FILE, or NAME from the hub; may be repeated.", show_default=False),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="With --task: tokens of a prompt with its answers, as 32k; may be repeated.",
            show_default="4k, or what the model reads",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Cases of each task and length, and of each suite.")] = 8,
    question: Annotated[
        str, typer.Option(help="With --task and --suite: cut before the question is known (agnostic), after, or both.")
    ] = "both",
    scorer: Annotated[
        str | None, typer.Option(help="Judges all answers.", show_default="each prompt's own, or predicted")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Most prompts of --data.", show_default="all")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt; the last are kept.", show_default="the context")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column with text, in a dataset.", show_default="text")] = None,
    split: Annotated[str | None, typer.Option(help="The split of a dataset.", show_default=False)] = None,
    profile: Annotated[
        Path | None, typer.Option(help="For baselines that go by the layers' importance.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the results file.")] = Path(
        "results.json"
    ),
    speed_tokens: Annotated[int, typer.Option(min=0, help="Tokens decoded to time each policy; 0: no timing.")] = 32,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most prompt tokens that run together.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of tasks, rows of a dataset and the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... auto: split over all GPUs.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="the first policy's")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON instead of tables.")] = False,
) -> None:
    """Measure policies and baselines beside the full cache: KL, top-1, perplexity, scores, bytes and speed."""
    ways = _check_options(policy, baseline, data, task, suite, context, question, profile, max_prompts, column, split)

    from kvplan.files import check_writable
    from kvplan.policy.serialize import load_policy

    files = policy or []
    check_writable(output, [*files, profile, *(data or [])])
    plans = [load_policy(path) for path in files]

    from kvplan.check.baselines import Baseline

    asked = [Baseline.parse(text) for text in baseline or []]

    from kvplan.check.scorers import PREDICTED, scorers
    from kvplan.check.suites import suites
    from kvplan.check.tasks import tasks
    from kvplan.errors import MethodError
    from kvplan.registry import unknown

    names = list(tasks) if task and "all" in task else list(dict.fromkeys(task or []))
    for name in names:
        if name not in tasks:
            raise MethodError(unknown("task", name, ["all", *tasks.names()]))
    for text in suite or []:
        suites[text.partition(":")[0]]  # raises where there is none
    if scorer is not None and scorer != PREDICTED and scorer not in scorers:
        raise MethodError(unknown("scorer", scorer, [PREDICTED, *scorers.names()]))

    network, tokenizer, spec, bundled = _load(files, plans, model, dtype, device, trust_remote_code)

    from kvplan.check.suites import suite_examples
    from kvplan.check.tasks import generated
    from kvplan.cli.console import note, out, stages
    from kvplan.errors import DataError

    chosen = bool(data or names or suite)
    if not chosen and not bundled:
        raise DataError("nothing to measure on; give --data, --task or --suite")
    examples, sources = ([], []) if chosen else _own_examples(tokenizer, spec, max_prompts)
    if data:
        limits = {"max_prompts": max_prompts, "max_tokens": max_tokens, "column": column, "split": split, "seed": seed}
        examples += _data_examples(data, tokenizer, spec, **limits)
        sources += data
    for length in _lengths(context, spec) if names else []:
        examples += [e for name in names for e in generated(name, tokenizer, length, samples, ways=ways, seed=seed)]
    for text in suite or []:
        examples += suite_examples(
            text, tokenizer, ways=ways, samples=samples, max_tokens=max_tokens, context_limit=spec.max_context_tokens
        )
    sources += [*(f"task {name}" for name in names), *(f"suite {text}" for text in suite or [])]
    examples = [example for example in examples if example.continuation_ids]

    from kvplan.check.evaluate import Candidate, evaluate
    from kvplan.check.results import save_results

    labels = _labels(files)
    candidates = [
        Candidate(name=label, source=str(path), policy=plan)
        for label, path, plan in zip(labels, files, plans, strict=True)
    ]
    candidates += _baselines(asked, spec, examples, profile)
    _refuse_twice([candidate.name for candidate in candidates])
    settings: dict[str, str | int | bool | None] = {
        "question": question,
        "samples": samples,
        "scorer": scorer,
        "max_tokens": max_tokens,
    }
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
            settings=settings,
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


def _check_options(
    policy: Sequence[Path] | None,
    baseline: Sequence[str] | None,
    data: Sequence[str] | None,
    task: Sequence[str] | None,
    suite: Sequence[str] | None,
    context: Sequence[str] | None,
    question: str,
    profile: Path | None,
    max_prompts: int | None,
    column: str | None,
    split: str | None,
) -> tuple[bool, ...]:
    """The ways of asking; refuses what cannot take effect."""
    from kvplan.errors import KVPlanError
    from kvplan.registry import unknown

    if not policy and not baseline:
        raise KVPlanError("nothing to measure; give --policy FILE, or --baseline such as uniform:snapkv@40%")
    if profile and not baseline:
        raise KVPlanError("--profile is for baselines that go by the layers' importance; give a --baseline")
    if context and not task:
        raise KVPlanError("--context is the length of generated prompts; give a --task, or --max-tokens for --data")
    if question not in WAYS:
        raise KVPlanError(f"--question: {unknown('way of asking', question, list(WAYS))}")
    if max_prompts and not data and (task or suite):
        raise KVPlanError("--max-prompts is of --data; --samples says how many cases of a task or suite")
    if not data and (column or split):
        raise KVPlanError("--column and --split choose inside a dataset; give it with --data")
    return WAYS[question]


def parse_tokens(text: str) -> int:
    """'32k' -> 32768.

    Raises:
        DataError: not a number of tokens.
    """
    import re

    from kvplan.errors import DataError

    match = re.fullmatch(r"(\d{1,12})([kKmM]?)", text.strip())
    tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0
    if not 0 < tokens <= MAX_TOKENS:
        raise DataError(f"--context {text}: not a number of tokens; write for example 4096 or 32k")
    return tokens


def _load(
    files: Sequence[Path], plans: Sequence[Policy], model: str | None, dtype: str | None, device: str, trust: bool
) -> tuple[Any, Any, ModelSpec, bool]:
    """The model, its tokenizer and shape, and whether it is the bundled one; every policy fits it."""
    from kvplan.cli.run import load_for
    from kvplan.errors import PolicyError
    from kvplan.loading import BUNDLED_FOLDER, load_model
    from kvplan.policy.serialize import check_model

    if plans:
        network, tokenizer, spec = load_for(files[0], plans[0], model, dtype, device, trust)
    else:
        network, tokenizer, spec = load_model(model, dtype=dtype or "auto", device=device, trust_remote_code=trust)
    for path, plan in zip(files, plans, strict=True):
        try:
            check_model(plan, spec)
        except PolicyError as error:
            raise PolicyError([f"{path}: {line}" for line in str(error).splitlines()]) from error
    return network, tokenizer, spec, Path(str(network.config._name_or_path)) == BUNDLED_FOLDER


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


def _own_examples(tokenizer: Any, spec: ModelSpec, max_prompts: int | None) -> tuple[list[Example], list[str]]:
    """Prompts of the bundled model that no other step reads, and what they are called."""
    from kvplan.calibrate.prompts import load_examples
    from kvplan.demo.data import calib_data_path

    most = max_prompts or HELDOUT_PROMPTS
    path = calib_data_path("heldout")
    found = load_examples([path], tokenizer, max_prompts=most, context_limit=spec.max_context_tokens)
    return found, ["bundled heldout prompts"]


def _data_examples(data: Sequence[str], tokenizer: Any, spec: ModelSpec, **limits: Any) -> list[Example]:
    from kvplan.calibrate.prompts import load_examples
    from kvplan.check.tasks.build import MAX_UNKNOWN, unknown_share
    from kvplan.cli.console import warn

    found = load_examples(data, tokenizer, context_limit=spec.max_context_tokens, **limits)
    if (share := unknown_share(found, tokenizer)) > MAX_UNKNOWN:
        warn(f"the tokenizer does not know {share:.0%} of the words in --data")
    return found


def _lengths(context: Sequence[str] | None, spec: ModelSpec) -> list[int]:
    """Of generated prompts. Raises: DataError: one is longer than the model reads."""
    from kvplan.errors import DataError

    limit = spec.max_context_tokens
    if not context:
        return [min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)]
    lengths = [parse_tokens(text) for text in context]
    if limit is not None and max(lengths) > limit:
        raise DataError(f"--context {max(lengths)} is more than the model's context of {limit} tokens")
    return lengths


def _labels(files: Sequence[Path]) -> list[str]:
    """The files' names without their suffix; whole paths where two are alike."""
    stems = [path.stem for path in files]
    return [str(path) if stems.count(stem) > 1 else stem for path, stem in zip(files, stems, strict=True)]


def _refuse_twice(names: Sequence[str]) -> None:
    from kvplan.errors import KVPlanError

    if twice := next((name for name in names if names.count(name) > 1), None):
        raise KVPlanError(f"{twice} is given twice; give each policy and baseline once")
