"""What `kvplan eval` and `kvplan check` are asked to measure, and on what: prompts from files, tasks and suites."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.cli.console import MAX_TOKENS, warn

if TYPE_CHECKING:
    from kvplan.calibrate.examples import Example
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Policy

DEFAULT_CONTEXT = 4096
WAYS = {"both": (False, True), "agnostic": (False,), "aware": (True,)}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The options that say which prompts, as they were given.

    Attributes:
        heldout_prompts: How many of the bundled ones, where nothing else is named.
        data_prompts: How many of `data`, where `max_prompts` does not say; None: all.
    """

    data: Sequence[str]
    tasks: Sequence[str]
    suites: Sequence[str]
    contexts: Sequence[str]
    samples: int
    question: str
    scorer: str | None
    max_prompts: int | None
    heldout_prompts: int
    max_tokens: int | None
    column: str | None
    split: str | None
    seed: int
    data_prompts: int | None = None

    def check_options(self) -> None:
        """Refuse what cannot take effect, before anything heavy is imported.

        Raises:
            KVPlanError: it says which option, and what to do.
        """
        from kvplan.errors import KVPlanError
        from kvplan.registry import unknown

        if self.contexts and not self.tasks:
            raise KVPlanError("--context is the length of generated prompts; give a --task, or --max-tokens for --data")
        if self.question not in WAYS:
            raise KVPlanError(f"--question: {unknown('way of asking', self.question, list(WAYS))}")
        if self.max_prompts and not self.data and (self.tasks or self.suites):
            raise KVPlanError("--max-prompts is of --data; --samples says how many cases of a task or suite")
        if not self.data and (self.column or self.split):
            raise KVPlanError("--column and --split choose inside a dataset; give it with --data")

    def check_names(self) -> None:
        """Raises: MethodError: a task, suite or scorer that there is not."""
        from kvplan.check.scorers import PREDICTED, scorers
        from kvplan.check.suites import suites
        from kvplan.check.tasks import tasks
        from kvplan.errors import MethodError
        from kvplan.registry import unknown

        for name in self.tasks:
            if name != "all" and name not in tasks:
                raise MethodError(unknown("task", name, ["all", *tasks.names()]))
        for text in self.suites:
            suites[text.partition(":")[0]]  # raises where there is none
        if self.scorer is not None and self.scorer != PREDICTED and self.scorer not in scorers:
            raise MethodError(unknown("scorer", self.scorer, [PREDICTED, *scorers.names()]))

    def load(self, tokenizer: Any, spec: ModelSpec, bundled: bool) -> tuple[list[Example], list[str]]:
        """The prompts that have something to score, and where they came from.

        Raises:
            DataError: there are none, or some cannot be read.
        """
        from kvplan.check.suites import suite_examples
        from kvplan.check.tasks import tasks

        names = list(tasks) if "all" in self.tasks else list(dict.fromkeys(self.tasks))
        examples, sources = self._files(tokenizer, spec, bundled)
        examples += self._generated(names, tokenizer, spec.max_context_tokens)
        for text in self.suites:
            examples += suite_examples(
                text, tokenizer, ways=WAYS[self.question], samples=self.samples, max_tokens=self.max_tokens,
                context_limit=spec.max_context_tokens,
            )  # fmt: skip
        sources += [*(f"task {name}" for name in names), *(f"suite {text}" for text in self.suites)]
        return [example for example in examples if example.continuation_ids], sources

    def settings(self) -> dict[str, str | int | bool | None]:
        """For the results file."""
        return {
            "question": self.question,
            "samples": self.samples,
            "scorer": self.scorer,
            "max_tokens": self.max_tokens,
        }

    def _files(self, tokenizer: Any, spec: ModelSpec, bundled: bool) -> tuple[list[Example], list[str]]:
        from kvplan.calibrate.prompts import load_examples
        from kvplan.check.tasks.build import MAX_UNKNOWN, unknown_share
        from kvplan.errors import DataError

        files, most, sources = list(self.data), self.max_prompts or self.data_prompts, list(self.data)
        if not (files or self.tasks or self.suites):
            if not bundled:
                raise DataError("nothing to measure on; give --data, --task or --suite")
            from kvplan.demo.data import calib_data_path

            files, most = [str(calib_data_path("heldout"))], self.max_prompts or self.heldout_prompts
            sources = ["bundled heldout prompts"]
        if not files:
            return [], sources
        found = load_examples(
            files, tokenizer, max_prompts=most, max_tokens=self.max_tokens, context_limit=spec.max_context_tokens,
            column=self.column, split=self.split, seed=self.seed,
        )  # fmt: skip
        if (share := unknown_share(found, tokenizer)) > MAX_UNKNOWN:
            warn(f"the tokenizer does not know {share:.0%} of the words in --data")
        return found, sources

    def _generated(self, names: Sequence[str], tokenizer: Any, limit: int | None) -> list[Example]:
        from kvplan.check.tasks import generated
        from kvplan.errors import DataError

        found: list[Example] = []
        default = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
        for length in [parse_tokens(text) for text in self.contexts] or [default]:
            if limit is not None and length > limit:
                raise DataError(f"--context {length} is more than the model's context of {limit} tokens")
            for name in names:
                found += generated(name, tokenizer, length, self.samples, ways=WAYS[self.question], seed=self.seed)
        return found


def parse_tokens(text: str) -> int:
    """'32k' -> 32768.

    Raises:
        DataError: not a number of tokens.
    """
    from kvplan.errors import DataError

    match = re.fullmatch(r"(\d{1,12})([kKmM]?)", text.strip())
    tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0
    if not 0 < tokens <= MAX_TOKENS:
        raise DataError(f"--context {text}: not a number of tokens; write for example 4096 or 32k")
    return tokens


def load_all_fit(
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


def labels(files: Sequence[Path]) -> list[str]:
    """The files' names without their suffix; whole paths where two are alike."""
    stems = [path.stem for path in files]
    return [str(path) if stems.count(stem) > 1 else stem for path, stem in zip(files, stems, strict=True)]


def refuse_twice(names: Sequence[str]) -> None:
    """Raises: KVPlanError: two things to measure have one name."""
    from kvplan.errors import KVPlanError

    if twice := next((name for name in names if names.count(name) > 1), None):
        raise KVPlanError(f"{twice} is given twice; give each policy and baseline once")
