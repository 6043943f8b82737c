"""What a plan is worth: kvplan's policies against every simpler one, at the same measured bytes, on held-out prompts.

Each share of the full cache gives one table: the full cache; every evictor, uniform; each published layer split on the
evictor that suits the profile best; one evictor everywhere, tuned with as many trials as kvplan; random search in
kvplan's space with as many trials; the knapsack alone; kvplan with tokens only, with sharing, and with precision. Plans
are searched and chosen on one split of the prompts; the table is measured on another.

Rows are kept in --out, so that a stopped run goes on where it was; shares can be run by several processes at once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from kvplan.calibrate.examples import Example
from kvplan.calibrate.profile import Profile
from kvplan.calibrate.prompts import load_examples
from kvplan.check.scoring import Scorer
from kvplan.demo.data import calib_data_path
from kvplan.errors import TargetError
from kvplan.files import write_text
from kvplan.loading import load_model
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Target
from kvplan.policy.serialize import dump_policy
from kvplan.search.budget import Protection
from kvplan.search.compile import Compiler, Params, budget_for
from kvplan.search.confirm import SEARCHED, TrialRow, confirm, hold_out
from kvplan.search.decisions import BASIC, Decisions
from kvplan.search.objective import Judge
from kvplan.search.space import SearchSpace, space_for
from kvplan.search.study import search
from kvplan.stats import bootstrap
from kvplan.units import format_share, parse_share

FULL, KVPLAN = "full cache", "kvplan"
TUNED, RANDOM, SOLVED = "one evictor, tuned", "random search", "knapsack only"
TOKENS, SHARING = "kvplan, tokens only", "kvplan, tokens + sharing"


@dataclass(frozen=True)
class Made:
    """A row's policy, and what it took."""

    policy: Policy
    trials: int = 0
    searched: bool = False


class Bench:
    """Makes and measures the rows of one model on one set of prompts."""

    def __init__(
        self, model: Any, spec: ModelSpec, profile: Profile, searched: Sequence[Example], heldout: Sequence[Example],
        trials: int, seed: int, out: Path,
    ) -> None:  # fmt: skip
        self.spec, self.profile, self.trials, self.seed, self.out = spec, profile, trials, seed, out
        self.search_prompts, self.confirm_prompts = hold_out([example.task for example in searched])
        self.scorer = Scorer(model, spec, searched)
        self.heldout = Scorer(model, spec, heldout)

    def rows(self, share: int) -> list[dict[str, Any]]:
        """The rows of one table, made or read."""
        found = []
        for name, make in self._jobs(share):
            path = self.out / f"{share}" / f"{name.replace(' ', '-').replace(',', '')}.json"
            if not path.is_file():
                started = time.monotonic()
                try:
                    made = make()
                except TargetError as error:
                    print(f"{format_share(share)} {name}: left out, {error}", flush=True)
                    continue
                seconds = time.monotonic() - started
                measured = self.heldout.measure(made.policy)
                scores = measured.scores
                row = {
                    "name": name,
                    "trials": made.trials,
                    "seconds": seconds if made.searched else 0.0,
                    "kv_bytes": measured.kv_bytes,
                    "full_kv_bytes": measured.full_kv_bytes,
                    "kl": scores.kl,
                    "top1": scores.top1,
                    "task": [None if math.isnan(x) else x for x in scores.task],
                    "policy": dump_policy(made.policy),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(row))
                print(f"{format_share(share)} {name}: KL {scores.mean_kl:.4f}, {seconds:.0f} s", flush=True)
            found.append(json.loads(path.read_text()))
        return found

    def _jobs(self, share: int) -> Iterator[tuple[str, Callable[[], Made]]]:
        budget = budget_for(self.profile, self.spec, Target(share=share), Protection())
        tokens = Compiler(self.profile, budget, codecs=["dense"], groups=1)
        best = tokens.best_evictor()

        def recipe(split: str, evictor: str) -> Callable[[], Made]:
            params = Params(split=split, scales=(1.0,) * len(tokens.groups), evictors=(evictor,) * len(tokens.groups))
            return lambda: Made(tokens.compile(params))

        full = Policy(layers=(LayerPolicy(),) * self.spec.num_layers, model=self.spec.policy_block())
        yield FULL, lambda: Made(full)
        for evictor in tokens.names:
            yield f"uniform {evictor}", recipe("uniform", evictor)
        for split in tokens.allocators:
            if split != "uniform":
                yield f"{split} {best}", recipe(split, best)
        one = Decisions(("evictor", "params"))
        yield (
            TUNED,
            lambda: self._sampled(*space_for(self.profile, budget, one, groups=1, codecs=["dense"]), "gp", True),
        )
        yield RANDOM, lambda: self._sampled(*space_for(self.profile, budget), "random")
        yield SOLVED, lambda: self._searched(share, 0, BASIC)
        yield TOKENS, lambda: self._searched(share, self.trials, ("budget", "evictor"))
        yield SHARING, lambda: self._searched(share, self.trials, ("budget", "evictor", "sharing"))
        yield KVPLAN, lambda: self._searched(share, self.trials, BASIC)

    def _searched(self, share: int, trials: int, kinds: tuple[str, ...]) -> Made:
        found = search(
            self.profile,
            self.spec,
            Target(share=share),
            self.scorer.score,
            search_prompts=self.search_prompts,
            confirm_prompts=self.confirm_prompts,
            trials=trials,
            seed=self.seed,
            decisions=Decisions(kinds),
        )
        return Made(found.policy, trials, searched=True)

    def _sampled(self, compiler: Compiler, space: SearchSpace, sampler: str, from_recipes: bool = False) -> Made:
        """As many trials as kvplan, the first of them recipes or none; the winner chosen as kvplan chooses it."""
        samplers = {
            "random": lambda: optuna.samplers.RandomSampler(seed=self.seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=self.seed, warn_independent_sampling=False),
        }
        study = optuna.create_study(sampler=samplers[sampler]())
        for start in space.warm_starts() if from_recipes else ():
            if start.is_recipe:
                study.enqueue_trial(space.flat(start.params))
        judge, rows = Judge(), []
        for number in range(self.trials):
            trial = study.ask()
            params = space.suggest(trial)
            policy = compiler.compile(params)
            scores = self.scorer.score(policy, self.search_prompts)
            rank = judge.rank(scores, self.search_prompts)
            study.tell(trial, rank[1])
            rows.append(TrialRow(number, SEARCHED, params, policy, scores, rank))
        context = compiler.budget.context_tokens
        chosen = confirm(rows, [], self.scorer.score, self.confirm_prompts, context, self.seed, self.spec)
        return Made(chosen.policy, self.trials, searched=True)


def table(share: int, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, best last, every KL with its interval and its paired difference to kvplan's."""
    ours = next(row for row in rows if row["name"] == KVPLAN)["kl"]
    lines = [
        "| policy | bytes | KL (95 %) | KL above kvplan's (95 %) | top-1 | score | trials | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        kl = bootstrap(row["kl"])
        gap = bootstrap([a - b for a, b in zip(row["kl"], ours, strict=True)])
        apart = "" if row["name"] in (FULL, KVPLAN) else f"{gap.mean:+.4f} [{gap.low:.4f}, {gap.high:.4f}]"
        answers = [x for x in row["task"] if x is not None]
        score = f"{sum(answers) / len(answers):.3f}" if answers else ""
        cost = f"{row['trials']} | {row['seconds']:.0f} s" if row["seconds"] else "|"
        lines.append(
            f"| {row['name']} | {row['kv_bytes'] / row['full_kv_bytes']:.1%} | {kl.mean:.4f} [{kl.low:.4f}, "
            f"{kl.high:.4f}] | {apart} | {sum(row['top1']) / len(row['top1']):.3f} | {score} | {cost} |"
        )
    return "\n".join([f"### {format_share(share)}, {len(ours)} held-out prompts", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; the bundled model without it")
    parser.add_argument("--profile", type=Path, required=True, help="what kvplan calibrate wrote for it")
    parser.add_argument("--search-data", help="prompts to search on; calib_data's search split without it")
    parser.add_argument("--heldout-data", help="prompts to measure on; calib_data's heldout split without it")
    parser.add_argument("--shares", default="50%,40%,25%,15%,10%")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--max-prompts", type=int, default=90, help="most held-out prompts")
    parser.add_argument("--max-tokens", type=int, help="most tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/plans"), help="where the rows are kept")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    model, tokenizer, spec = load_model(options.model)

    def prompts(data: str | None, split: str, most: int | None) -> list[Example]:
        source = data or calib_data_path(split)
        limit = spec.max_context_tokens
        found = load_examples([source], tokenizer, max_prompts=most, max_tokens=options.max_tokens, context_limit=limit)
        return [example for example in found if example.continuation_ids]

    searched = prompts(options.search_data, "search", None)
    heldout = prompts(options.heldout_data, "heldout", options.max_prompts)
    bench = Bench(
        model, spec, Profile.load(options.profile), searched, heldout, options.trials, options.seed, options.out
    )
    shares = [parse_share(text) for text in options.shares.split(",")]
    print("\n".join(table(share, bench.rows(share)) for share in shares))


if __name__ == "__main__":
    main()
