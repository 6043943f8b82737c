"""evaluate(): policies side by side with the full cache on the same prompts, prompt by prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from kvplan import __version__
from kvplan.calibrate.examples import Example
from kvplan.calibrate.prompts import data_fingerprint
from kvplan.check.cases import length_generated, most_new_tokens
from kvplan.check.cost import costs
from kvplan.check.results import FULL_CACHE, DataIdentity, ModelIdentity, PolicyResult, PromptRow, Results
from kvplan.check.scorers import PREDICTED, scorers
from kvplan.check.scoring import Measured, Scorer
from kvplan.errors import DataError, MemoryPlanExceeded, MethodError, RuntimeLimitError
from kvplan.model_spec import ModelSpec
from kvplan.placement import input_device
from kvplan.policy.schema import Policy
from kvplan.policy.serialize import policy_fingerprint
from kvplan.registry import unknown
from kvplan.runtime.attach import full_policy

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy to measure.

    Attributes:
        source: Its file, or a baseline's spelling.
    """

    name: str
    source: str
    policy: Policy


def evaluate(
    model: Any,
    tokenizer: Any,
    spec: ModelSpec,
    examples: Sequence[Example],
    candidates: Sequence[Candidate],
    *,
    model_name: str,
    sources: Sequence[str],
    scorer: str | None = None,
    seed: int = 0,
    batch_tokens: int = 16384,
    speed_tokens: int = 32,
    speed_rounds: int = 3,
    with_costs: bool = True,
    settings: Mapping[str, str | int | bool | None] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Results:
    """Measure every candidate, and the full cache first.

    KL, top-1 and perplexity are teacher-forced over each example's continuation. An example without a scorer is scored
    by the same pass: an answer counts when each of its tokens is the likeliest. Any other scorer reads text, which is
    generated greedily on the compressed cache.

    Args:
        sources: Where the examples came from, for the results.
        scorer: Judges all answers, whatever the examples say.
        batch_tokens: Most prompt tokens that are run together; prompts whose answers are generated run alone.
        speed_tokens: Decoded to measure speed after the longest prompt; 0: speed is not measured.
        speed_rounds: Of that, after one that warms up.
        with_costs: Measure bytes, peak and speed on the longest prompt.
        progress: Called with a stage, what is done of it and how much it is.

    Raises:
        DataError, MethodError: an example cannot be scored.
        MemoryPlanExceeded: a cache holds more than its policy plans.
        RuntimeLimitError: the model's predictions are not numbers.
    """
    if not examples:
        raise DataError("no prompts were given")
    judges = [_judge(example, scorer) for example in examples]
    full = Candidate(name=FULL_CACHE, source=FULL_CACHE, policy=full_policy(model))
    everything = [full, *candidates]
    runner = Scorer(
        model,
        spec,
        examples,
        batch_tokens=batch_tokens,
        keep=False,
        generate={
            i: _most_new(examples[i], spec.max_context_tokens) for i, judge in enumerate(judges) if judge is not None
        },
        progress=lambda done, total: progress("prompts", done, total),
    )
    measured = runner.measure_all([candidate.policy for candidate in everything])
    texts = [_texts(found, tokenizer) for found in measured]
    scores = [_scores(found, told, texts[0], examples, judges) for found, told in zip(measured, texts, strict=True)]
    longest = max(examples, key=lambda e: len(e.prompt_ids))
    steps = (speed_rounds + 1) * (len(everything) + 1) if speed_tokens else 0
    total, done = len(everything) + steps, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("bytes and speed", done, total)

    held = (
        {}
        if not with_costs
        else costs(
            model,
            spec,
            {candidate.name: candidate.policy for candidate in everything},
            longest.prompt_ids,
            new_tokens=speed_tokens,
            repeats=speed_rounds,
            progress=advance,
        )
    )
    results = []
    for candidate, found, told, values in zip(everything, measured, texts, scores, strict=True):
        _check(candidate, found)
        rows = _rows(examples, judges, found, measured[0], told, values, scores[0])
        results.append(
            PolicyResult(
                name=candidate.name,
                source=candidate.source,
                fingerprint=policy_fingerprint(candidate.policy),
                rows=rows,
                cost=held.get(candidate.name),
            )
        )
    return Results(
        tool={"kvplan": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        model=model_identity(spec, model_name),
        data=data_identity(examples, sources, scorer),
        policies=tuple(results),
        seed=seed,
        device=str(input_device(model)),
        settings=dict(settings or {}),
    )


def _judge(example: Example, chosen: str | None) -> str | None:
    """The scorer that reads the example's generated answers, or None: nothing is asked, or its tokens are predicted.

    Raises:
        MethodError: there is no such scorer.
    """
    name = chosen or example.scorer
    if name is None or name == PREDICTED:
        return None
    if name not in scorers:
        raise MethodError(f"prompt '{example.id}': {unknown('scorer', name, [PREDICTED, *scorers.names()])}")
    # A text to be continued is compared with the full cache's own continuation only where its record says how.
    return None if not example.answers and example.scorer is None else name


def _most_new(example: Example, limit: int | None) -> int:
    """Most new tokens of an answer. Raises: DataError: the model cannot read that many after the prompt."""
    most = most_new_tokens(example)
    if limit is not None and length_generated(example) > limit:
        raise DataError(
            f"prompt '{example.id}': {length_generated(example) - most} tokens and up to {most} new ones are more than "
            f"the model's context of {limit}; lower --max-tokens, or the record's max_new_tokens"
        )
    return most


def _texts(found: Measured, tokenizer: Any) -> list[tuple[str, ...]]:
    """The generated answers of each prompt."""
    return [tuple(tokenizer.decode(list(a), skip_special_tokens=True).strip() for a in one) for one in found.answers]


def _scores(
    found: Measured,
    texts: Sequence[tuple[str, ...]],
    full: Sequence[tuple[str, ...]],
    examples: Sequence[Example],
    judges: Sequence[str | None],
) -> list[float | None]:
    """One score a prompt: the mean over its answers."""
    scores: list[float | None] = []
    for i, (example, judge) in enumerate(zip(examples, judges, strict=True)):
        predicted = found.scores.task[i]
        if judge is None:
            scores.append(None if math.isnan(predicted) else predicted)
            continue
        # Without a true answer, what the full cache writes is the one to be kept.
        references = example.references or tuple((own,) for own in full[i])
        values = [_score(judge, t, r) for t, r in zip(texts[i], references, strict=True)]
        scores.append(sum(values) / len(values))
    return scores


def _score(judge: str, text: str, references: Sequence[str]) -> float:
    # Two empty texts are alike, which no scorer of words says.
    return 1.0 if text in references else scorers[judge]().score(text, references)


def _check(candidate: Candidate, found: Measured) -> None:
    for held in found.bytes:
        if held.held > held.planned:
            raise MemoryPlanExceeded(
                f"{candidate.source}: a cache holds {held.held} bytes after its prompt, the plan allows {held.planned}"
            )
    if not all(math.isfinite(value) for value in (*found.scores.kl, *found.scores.nll)):
        raise RuntimeLimitError(f"{candidate.source}: the model's predictions are nan or infinite; try another --dtype")


def _rows(
    examples: Sequence[Example],
    judges: Sequence[str | None],
    found: Measured,
    full: Measured,
    texts: Sequence[tuple[str, ...]],
    scores: Sequence[float | None],
    full_scores: Sequence[float | None],
) -> tuple[PromptRow, ...]:
    return tuple(
        PromptRow(
            id=example.id,
            task=example.task,
            context_tokens=len(example.prompt_ids),
            question_aware=example.question_aware,
            questions=len(example.answers),
            tokens=len(example.continuation_ids),
            kl=found.scores.kl[i],
            top1=found.scores.top1[i],
            nll=found.scores.nll[i],
            full_nll=full.scores.nll[i],
            planned_bytes=found.bytes[i].planned,
            kv_bytes=found.bytes[i].held,
            full_bytes=found.bytes[i].full,
            scorer=None if scores[i] is None else judges[i] or PREDICTED,
            score=scores[i],
            full_score=full_scores[i],
            answers=texts[i],
        )
        for i, example in enumerate(examples)
    )


def model_identity(spec: ModelSpec, name: str) -> ModelIdentity:
    return ModelIdentity(
        name=name, type=spec.model_type, fingerprint=spec.fingerprint, dtype=spec.dtype, layers=spec.num_layers
    )


def data_identity(examples: Sequence[Example], sources: Sequence[str], scorer: str | None = None) -> DataIdentity:
    """Of the prompts' tokens and what counts as right; where they came from is only told.

    Raises:
        MethodError: there is no such scorer.
    """
    judges = [_judge(example, scorer) for example in examples]
    told = [data_fingerprint(examples), [[judge, e.references] for judge, e in zip(judges, examples, strict=True)]]
    fingerprint = "sha256:" + hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    return DataIdentity(fingerprint=fingerprint, sources=tuple(sources), prompts=len(examples))
