"""The results file: what every policy did to every prompt, and with which model, data and tool it was measured.

No torch here, so that a gate in CI reads results without loading a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from kvplan.errors import NotComparableError, ResultsError
from kvplan.files import read_text, write_text
from kvplan.json_fields import Measure, Share

FORMAT_VERSION = 1
FULL_CACHE = "full cache"
RESULTS_KEY = "kvplan_results"
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One policy on one prompt.

    Attributes:
        context_tokens: Tokens that were prefilled and then compressed.
        question_aware: The prompt held the question when it was compressed.
        questions: Answers that are expected; 0: the text only goes on.
        tokens: Tokens of the continuation, over which `kl`, `top1` and the `nll`s are means.
        kl: KL(full || policy) of the next-token distributions, nats.
        top1: Share of the tokens at which both caches predict the same next token.
        nll, full_nll: Negative log-likelihood under the policy and under the full cache, nats.
        scorer: What judged the answers, or None where nothing was scored.
        score, full_score: 0 to 1, under the policy and under the full cache.
        planned_bytes, kv_bytes, full_bytes: After the prompt: promised, held, and what a full cache holds.
        answers: What was generated, where the scorer reads text.
    """

    __pydantic_config__ = _STRICT

    id: str
    task: str
    context_tokens: PositiveInt
    question_aware: bool
    tokens: PositiveInt
    kl: Measure
    top1: Share
    nll: Measure
    full_nll: Measure
    planned_bytes: NonNegativeInt
    kv_bytes: NonNegativeInt
    full_bytes: PositiveInt
    questions: NonNegativeInt = 1
    scorer: str | None = None
    score: Share | None = None
    full_score: Share | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One policy on the longest prompt alone, really prefilled and decoded.

    Attributes:
        planned_bytes, kv_bytes, full_bytes: After the prompt.
        peak_bytes: The most that was held at once while the prompt was read.
        tokens_per_second: Median, first and third quartile of the rounds; None where speed was not measured.
        speedup: Likewise, over transformers' full cache, round by round.
        new_tokens: Tokens that were decoded and timed in each round.
    """

    __pydantic_config__ = _STRICT

    context_tokens: PositiveInt
    planned_bytes: NonNegativeInt
    kv_bytes: NonNegativeInt
    full_bytes: PositiveInt
    peak_bytes: NonNegativeInt
    new_tokens: NonNegativeInt = 0
    tokens_per_second: tuple[Measure, Measure, Measure] | None = None
    speedup: tuple[Measure, Measure, Measure] | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """One policy on all prompts.

    Attributes:
        name: Unique in the file.
        source: The policy file, the baseline's spelling, or `full cache`.
        fingerprint: Of what the policy does; its provenance does not count.
        rows: In the order of the prompts, the same in every policy.
    """

    __pydantic_config__ = _STRICT

    name: str
    source: str
    fingerprint: str
    rows: tuple[PromptRow, ...]
    cost: Cost | None = None

    @property
    def kv_bytes(self) -> int:
        """Held after the prompts, summed over them."""
        return sum(row.kv_bytes for row in self.rows)

    @property
    def planned_bytes(self) -> int:
        return sum(row.planned_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        return sum(row.full_bytes for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The model that was measured."""

    __pydantic_config__ = _STRICT

    name: str
    type: str
    fingerprint: str | None
    dtype: str
    layers: PositiveInt


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """The prompts: `fingerprint` is over their tokens, answers and scorers, whatever the files they came from."""

    __pydantic_config__ = _STRICT

    fingerprint: str
    sources: tuple[str, ...]
    prompts: PositiveInt


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that one `kvplan eval` measured.

    Attributes:
        tool: Versions of kvplan and of what it ran on.
        seed: Of the generated prompts and of the bootstrap.
        device: As torch names it.
        policies: The full cache first.
    """

    __pydantic_config__ = _STRICT

    tool: Mapping[str, str]
    model: ModelIdentity
    data: DataIdentity
    policies: tuple[PolicyResult, ...]
    seed: NonNegativeInt = 0
    device: str = "cpu"
    settings: Mapping[str, str | int | bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        if FULL_CACHE not in names:
            raise ResultsError(f"no policy is named '{FULL_CACHE}'; the others are compared with it")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ResultsError(f"two policies are named '{twice}'")
        prompts = [_prompt(row) for row in self.policies[0].rows]
        for policy in self.policies:
            if [_prompt(row) for row in policy.rows] != prompts or len(prompts) != self.data.prompts:
                raise ResultsError(
                    f"policy '{policy.name}' has rows of other prompts than '{self.policies[0].name}' or not "
                    f"{self.data.prompts} of them; scores are compared prompt by prompt"
                )

    @property
    def full(self) -> PolicyResult:
        return self.policy(FULL_CACHE)

    def policy(self, name: str) -> PolicyResult:
        """Raises: ResultsError: no policy has this name."""
        found = next((policy for policy in self.policies if policy.name == name), None)
        if found is None:
            raise ResultsError(
                f"no results of a policy '{name}' (there are: {', '.join(p.name for p in self.policies)})"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {RESULTS_KEY: FORMAT_VERSION, **asdict(self)}


def _prompt(row: PromptRow) -> tuple[Any, ...]:
    """What a row says of its prompt, whatever the policy."""
    return (row.id, row.task, row.context_tokens, row.question_aware, row.questions, row.tokens, row.full_bytes)


_ADAPTER = TypeAdapter(Results)


def save_results(results: Results, path: str | Path) -> None:
    """Write the file whole or not at all; one line a prompt, so that two files can be compared by eye.

    Raises:
        KVPlanError: it cannot be written.
    """
    data = results.to_json()
    policies = data.pop("policies")
    head = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1)[:-2]
    blocks = ",\n".join(_policy_text(policy) for policy in policies)
    write_text(Path(path), f'{head},\n "policies": [\n{blocks}\n ]\n}}\n')


def _policy_text(policy: dict[str, Any]) -> str:
    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    rows = ",\n".join(f"    {line(_without_defaults(row))}" for row in policy.pop("rows"))
    fields = "".join(f"   {line(name)}: {line(value)},\n" for name, value in policy.items())
    return f'  {{\n{fields}   "rows": [\n{rows}\n   ]\n  }}'


def _without_defaults(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, ())}


def load_results(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        NotComparableError: it is of another version.
        ResultsError: a field is missing, unknown or of the wrong type.
        KVPlanError: it cannot be read.
    """
    text = read_text(Path(path), "results file")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not JSON ({error})") from error
    version = data.pop(RESULTS_KEY, None) if isinstance(data, dict) else None
    if version is None:
        raise ResultsError(f"{path}: not a results file (no '{RESULTS_KEY}' in it); kvplan eval writes one")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise NotComparableError(
            f"{path}: results of format {version!r}, this kvplan reads format {FORMAT_VERSION}; "
            "measure again, or use the kvplan that wrote it"
        )
    try:
        return _ADAPTER.validate_json(json.dumps(data))
    except ValidationError as error:
        raise ResultsError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    told = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {told}{more}" if where else f"{told}{more}"
