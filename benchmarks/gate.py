"""How often `kvplan check` is wrong: gates simulated over real scores of the bundled model, prompt by prompt.

Every policy is scored once on the 300 held-out prompts (kept in build/gate-scores.json; delete it to score anew). A
simulated gate then draws 250 of them with replacement and runs the command's own decision on what it drew.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvplan.check.adaptive import Asked, check, evenly
from kvplan.check.criteria import Limits
from kvplan.check.gate import State
from kvplan.check.results import PromptRow
from kvplan.cli.check import HELDOUT_PROMPTS, KL_RISE, RECOVERY, SCORE_LOSS

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "policies" / "bundled"
BASE = "40pct"
# The same plans again, each prompt alone instead of in a batch: other sums, so other rounding.
AGAIN = ("40pct", "10pct", "uniform snapkv 70%")
AGAIN_PROMPTS = 160
SHAPES = ("halved layer 3", "halved layer 4", "uniform snapkv 90%", "uniform streaming 70%", "uniform tova 70%",
          "uniform knorm 70%", "10pct")  # fmt: skip
ANSWER_SHAPES = SHAPES[:-1]  # at 10 % the answers are still right
LIMITS = Limits(max_kl_rise=KL_RISE, max_score_loss=SCORE_LOSS)
LOST_POINTS = 0.1
STRICT_RECOVERY = 0.97  # as strict as the score's limit beside a baseline

Rows = list[PromptRow]
Draw = Callable[[np.random.Generator], tuple[Rows, Rows | None]]  # the candidate's rows and the baseline's


@dataclass(frozen=True)
class Scenario:
    """One line of the table.

    Attributes:
        same_plan: As the gate sees it from the fingerprints.
    """

    title: str
    draw: Draw
    limits: Limits = LIMITS
    same_plan: bool = False


def policies() -> dict[str, Any]:
    """What is scored: the shipped plans, one of their layers halved, and simple policies that lose much."""
    from kvplan.methods.evictors import evictors
    from kvplan.policy.schema import LayerPolicy, Policy, Slots
    from kvplan.policy.serialize import load_policy

    made = {f"{share}pct": load_policy(SHIPPED / f"{share}pct.yaml") for share in (50, 40, 25, 10)}
    layers = made[BASE].layers
    for index in (0, 3, 4):
        half = replace(layers[index], slots=Slots(share=(layers[index].slots.share or 10_000) // 2))
        made[f"halved layer {index}"] = replace(made[BASE], layers=(*layers[:index], half, *layers[index + 1 :]))
    for evictor, share in (("snapkv", 90), ("snapkv", 70), ("streaming", 70), ("tova", 70), ("knorm", 70)):
        layer = LayerPolicy(slots=Slots(share=share * 100), evictor=evictors[evictor]())
        made[f"uniform {evictor} {share}%"] = Policy(layers=(layer,) * len(layers))
    return made


def score(path: Path) -> None:
    """Write the KL and the score of every policy on every prompt."""
    from kvplan.calibrate.prompts import load_examples
    from kvplan.check.scoring import Scorer
    from kvplan.demo.data import calib_data_path
    from kvplan.loading import load_model

    model, tokenizer, spec = load_model(None)
    examples = load_examples([calib_data_path("heldout")], tokenizer, context_limit=spec.max_context_tokens)
    made, found = policies(), {}

    def measured(names: Sequence[str], count: int, batch_tokens: int) -> dict[str, dict[str, list[float]]]:
        scorer = Scorer(model, spec, examples[:count], batch_tokens=batch_tokens, keep=False,
                        progress=lambda done, total: print(f"scored {done}/{total}", flush=True))  # fmt: skip
        told = scorer.measure_all([made[name] for name in names])
        return {n: {"kl": list(t.scores.kl), "score": list(t.scores.task)} for n, t in zip(names, told, strict=True)}

    found = measured(list(made), len(examples), 16384)
    again = measured(AGAIN, AGAIN_PROMPTS, 1)
    prompts = [[example.task, example.question_aware] for example in examples]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "prompts": prompts, "policies": found, "again": again}))


def load(path: Path) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Policy -> its rows, of all prompts and of the second run."""
    data = json.loads(path.read_text())
    assert data["format"] == FORMAT, f"{path}: of another version; delete it"
    return tuple(  # type: ignore[return-value]
        {name: _rows(data["prompts"], scores) for name, scores in data[kind].items()} for kind in ("policies", "again")
    )


def _rows(prompts: Sequence[Any], scores: Mapping[str, Sequence[float]]) -> Rows:
    made = []
    for i, (kl, value) in enumerate(zip(scores["kl"], scores["score"], strict=True)):
        answer = None if math.isnan(value) else value
        made.append(
            PromptRow(
                id=str(i), task=prompts[i][0], question_aware=prompts[i][1], context_tokens=1, tokens=1, kl=kl,
                top1=1.0, nll=1.0, full_nll=1.0, planned_bytes=1, kv_bytes=1, full_bytes=1,
                questions=int(answer is not None), scorer="predicted", score=answer,
                full_score=None if answer is None else 1.0,
            )
        )  # fmt: skip
    return made


def mean(rows: Sequence[PromptRow], field: str) -> float:
    return float(np.mean([value for row in rows if (value := getattr(row, field)) is not None]))


def resampled(candidate: Rows, base: Rows | None) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Rows, Rows | None]:
        chosen = rng.integers(0, len(candidate), HELDOUT_PROMPTS)
        return [candidate[i] for i in chosen], None if base is None else [base[i] for i in chosen]

    return draw


def exchanged(one: Rows, other: Rows) -> Draw:
    """Which of the two is the candidate is drawn for each prompt: another policy that is no worse on average."""

    def draw(rng: np.random.Generator) -> tuple[Rows, Rows | None]:
        chosen, swap = rng.integers(0, len(one), HELDOUT_PROMPTS), rng.random(HELDOUT_PROMPTS) < 0.5
        pairs = [(other[i], one[i]) if s else (one[i], other[i]) for i, s in zip(chosen, swap, strict=True)]
        return [a for a, _ in pairs], [b for _, b in pairs]

    return draw


def losing_kl(base: Rows, worse: Rows, rise: float) -> Draw:
    """Every prompt loses in the proportions in which `worse` does, `rise` on average; the answers stay right."""
    step = rise / (mean(worse, "kl") - mean(base, "kl"))
    lost = [replace(b, kl=b.kl + step * (w.kl - b.kl)) for b, w in zip(base, worse, strict=True)]
    return resampled(lost, base)


def losing_answers(base: Rows, worse: Rows, points: float, *, kl_too: bool) -> Draw:
    """Some prompts get the answers of `worse`, so many that the score falls by `points` on average."""
    share = points / (mean(base, "score") - mean(worse, "score"))
    swapped = [w if kl_too else replace(w, kl=b.kl) for b, w in zip(base, worse, strict=True)]

    def draw(rng: np.random.Generator) -> tuple[Rows, Rows | None]:
        chosen, hit = rng.integers(0, len(base), HELDOUT_PROMPTS), rng.random(HELDOUT_PROMPTS) < share
        return [swapped[i] if h else base[i] for i, h in zip(chosen, hit, strict=True)], [base[i] for i in chosen]

    return draw


def losing_few(base: Rows, worse: Rows, rise: float) -> Draw:
    """A few prompts get the KL of `worse`, so many that it rises by so much on average; the others stay as they are."""
    share = rise / (mean(worse, "kl") - mean(base, "kl"))
    swapped = [replace(b, kl=w.kl) for b, w in zip(base, worse, strict=True)]

    def draw(rng: np.random.Generator) -> tuple[Rows, Rows | None]:
        chosen, hit = rng.integers(0, len(base), HELDOUT_PROMPTS), rng.random(HELDOUT_PROMPTS) < share
        return [swapped[i] if h else base[i] for i, h in zip(chosen, hit, strict=True)], [base[i] for i in chosen]

    return draw


def without_base(draw: Draw) -> Draw:
    return lambda rng: (draw(rng)[0], None)


def scenarios(rows: Mapping[str, Rows], again: Mapping[str, Rows]) -> dict[str, list[Scenario]]:
    base, snap = rows[BASE], rows["uniform snapkv 70%"]
    answers = [name for name in ANSWER_SHAPES if mean(base, "score") - mean(rows[name], "score") >= LOST_POINTS]
    return {
        "nothing is wrong: a regression is a false alarm": [
            Scenario("same plan, same numbers", resampled(base, base), same_plan=True),
            *(
                Scenario(f"same plan, other rounding: {name}", resampled(again[name], rows[name][:AGAIN_PROMPTS]),
                         same_plan=True)
                for name in AGAIN
            ),
            Scenario(f"another plan, as good: halved layer 0 for {BASE}", resampled(rows["halved layer 0"], base)),
            Scenario("another plan, no worse on average: snapkv and tova mixed",
                     exchanged(snap, rows["uniform tova 70%"])),
            *(
                Scenario(f"no baseline, --min-recovery {recovery}, {BASE}", resampled(base, None),
                         Limits(min_recovery=recovery))
                for recovery in (RECOVERY, STRICT_RECOVERY)
            ),
        ],
        **{
            f"KL rises by {times} x the limit, as under": [
                Scenario(name, losing_kl(base, rows[name], times * KL_RISE)) for name in SHAPES
            ]
            for times in (1, 2, 4)
        },
        "KL rises by 2 x the limit on average: a few prompts are lost, as under": [
            *(Scenario(name, losing_few(base, rows[name], 2 * KL_RISE)) for name in ANSWER_SHAPES),
            Scenario("uniform knorm 70%, same plan", losing_few(base, rows["uniform knorm 70%"], 2 * KL_RISE),
                     same_plan=True),
        ],
        "the score falls by 10 points and the KL stays, as under": [
            Scenario(name, losing_answers(base, rows[name], LOST_POINTS, kl_too=False)) for name in answers
        ],
        "the score falls by 10 points and the KL rises with it, as under": [
            Scenario(name, losing_answers(base, rows[name], LOST_POINTS, kl_too=True)) for name in answers
        ],
        **{
            f"the score falls by 10 points, no baseline, --min-recovery {recovery}": [
                Scenario(name, without_base(losing_answers(base, rows[name], LOST_POINTS, kl_too=False)),
                         Limits(min_recovery=recovery))
                for name in answers
            ]
            for recovery in (RECOVERY, STRICT_RECOVERY)
        },
        "real policies": [
            *(Scenario(f"{name} for {BASE}", resampled(rows[name], base)) for name in rows if name != BASE),
        ],
    }  # fmt: skip


def simulate(scenario: Scenario, gates: int, seed: int) -> tuple[Counter[State], float]:
    """Verdicts, and the prompts that a gate measured on average."""
    rng, found, prompts = np.random.default_rng(seed), Counter[State](), 0
    for _ in range(gates):
        rows, base = scenario.draw(rng)
        order = evenly([(row.task, row.question_aware) for row in rows], int(rng.integers(2**31)))
        asked = Asked(name="", limits=scenario.limits, base=base, same_plan=scenario.same_plan)
        (outcome,) = check(lambda names, indices, rows=rows: {"": [rows[i] for i in indices]}, [asked], order)
        found[outcome.state] += 1
        prompts += outcome.prompts
    return found, prompts / gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=500, help="simulated gates of each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", type=Path, default=Path("build/gate-scores.json"))
    args = parser.parse_args()
    if not args.scores.exists():
        score(args.scores)
    for title, group in scenarios(*load(args.scores)).items():
        print(f"\n{title}\n\n| | regression | inconclusive | pass | prompts |\n|---|---:|---:|---:|---:|")
        total: Counter[State] = Counter()
        for scenario in group:
            found, prompts = simulate(scenario, args.gates, args.seed)
            total += found
            print(line(scenario.title, found, f"{prompts:.0f}"), flush=True)
        if len(group) > 1 and title != "real policies":
            print(line("all of them", total, ""))


def line(title: str, found: Counter[State], prompts: str) -> str:
    shares = [found[s] / found.total() for s in (State.REGRESSION, State.INCONCLUSIVE, State.PASS)]
    return f"| {title} | {' | '.join(f'{share:.1%}' for share in shares)} | {prompts} |"


if __name__ == "__main__":
    main()
