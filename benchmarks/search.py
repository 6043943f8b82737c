"""What a trial of the search costs against running its policy from scratch: `make bench-search`.

A random Llama of 44 M parameters in float32, one thread. From scratch is what a user runs: the prompt is prefilled
under the policy, then the continuation is fed token by token. A trial is `Scorer.score` on prompts that were prefilled
before. Both run in turn in this process on the same prompts; ratios are medians of the rounds with quartiles. The last
line is a whole study: 100 random policies, all captures and the full cache's own run included, in full evaluations.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from models import CPU, quarter, small_llama
from torch import Tensor

from kvplan.calibrate.examples import Example
from kvplan.calibrate.prompts import load_examples
from kvplan.check.scoring import Scorer
from kvplan.check.timing import Spread, in_turn, ratio, seconds
from kvplan.demo.data import calib_data_path
from kvplan.loading import load_model
from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.codecs.turboquant import TurboQuant
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, full_policy, spec_of
from kvplan.runtime.replay import forward, positions_of, prefill

SHARES = {5: 2, 8: 4, 11: 7}  # reader: source, the most alike pairs of some ranking in its order
PAIRS = (11, 8, 5)
TRIALS = 100


@dataclass(frozen=True)
class Case:
    policy: Policy
    aim: float


def cases(model: Any) -> dict[str, Case]:
    def of(aim: float, name: str = "streaming", **layer: Any) -> Case:
        return Case(quarter(model, evictors[name](), **layer), aim)

    kivi = {"key_codec": KIVI(), "value_codec": KIVI(), "min_slots": 192}
    found = {name: of(25, name) for name in ("streaming", "snapkv", "knorm")}
    found |= {name: of(15, name) for name in ("h2o", "tova", "corm")}
    found["snapkv, int8"] = of(25, "snapkv", key_codec=Int8(), value_codec=Int8())
    found["snapkv, turboquant"] = of(25, "snapkv", key_codec=TurboQuant(), value_codec=TurboQuant())
    found["snapkv, kivi"] = of(25, "snapkv", **kivi)
    found["snapkv, adakv"] = of(25, "snapkv", head_split=head_splits["adakv"]())
    found["snapkv, kvmerger"] = of(25, "snapkv", merger=mergers["kvmerger"]())
    found["snapkv, think"] = of(25, "snapkv", channels=ThinK())
    found["streaming, cam"] = of(15, merger=mergers["cam"]())
    found["h2o, int8, think"] = of(15, "h2o", channels=ThinK(), key_codec=Int8(), value_codec=Int8())
    found["snapkv, 3 shared"] = Case(sharing(found["snapkv"].policy, 3), 5)
    return found


def sharing(policy: Policy, pairs: int) -> Policy:
    """The same with the first pairs shared."""
    layers = list(policy.layers)
    for reader in PAIRS[:pairs] if len(layers) > PAIRS[0] else ():
        layers[reader] = LayerPolicy(shares=SHARES[reader])
    return replace(policy, layers=tuple(layers))


def drawn(model: Any, draw: random.Random) -> Policy:
    """A trial as a search makes it: two groups of layers, each with its evictor, codec and share."""
    kinds = []
    for _ in range(2):
        codec = draw.choice([{}, {}, {"key_codec": Int8(), "value_codec": Int8()}])
        evictor = evictors[draw.choice(["streaming", "snapkv", "knorm", "h2o", "tova"])]()
        kinds.append(LayerPolicy(slots=Slots(share=draw.choice([1000, 2500, 5000])), evictor=evictor, **codec))
    layers = tuple(draw.choice(kinds) for _ in range(spec_of(model).num_layers))
    return sharing(replace(full_policy(model), layers=layers), draw.choice([0, 0, 1, 2, 3]))


def random_examples(model: Any, rows: int, tokens: int, continuation: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens + continuation), generator=generator).tolist()
    return [Example(str(i), "", tuple(x[:tokens]), tuple(x[tokens:]), (), False, "", None) for i, x in enumerate(ids)]


@torch.no_grad()
def from_scratch(model: Any, policy: Policy, examples: Sequence[Example]) -> Tensor:
    """Logits [B, C, V] that predict each token of the continuation."""
    ids = torch.tensor([e.prompt_ids for e in examples])
    continuation = torch.tensor([e.continuation_ids for e in examples])
    valid = torch.ones_like(ids, dtype=torch.bool)
    with attach(model, policy) as runtime:
        cache = runtime.new_cache()
        found = [prefill(runtime, cache, ids, valid)]
        at = positions_of(valid)[:, -1:]
        for step in range(continuation.shape[1] - 1):
            at = at + 1
            found.append(forward(runtime, cache, continuation[:, step, None], at, None)[:, 0])
    return torch.stack(found, 1)


def kl(model: Any, policy: Policy, full: Tensor, examples: Sequence[Example]) -> Tensor:
    found = from_scratch(model, policy, examples).log_softmax(-1)
    return (full.exp() * (full - found)).sum(-1).double().mean(-1)


def compare(model: Any, examples: list[Example], chosen: dict[str, Case], rounds: int) -> float:
    """Every policy from scratch and as a trial, in turn; the seconds of a run from scratch."""
    scorer = Scorer(model, spec_of(model), examples)
    scorer.prepare()
    full, costs = from_scratch(model, full_policy(model), examples).log_softmax(-1), []
    print(f"{'':20}  {'from scratch, s':>19}  {'a trial, s':>19}  {'ratio':>19}  aim  KL apart")
    for name, case in chosen.items():
        score = partial(scorer.score, case.policy)
        score()
        runs = {
            "scratch": lambda case=case: seconds(lambda: from_scratch(model, case.policy, examples), CPU),
            "trial": lambda score=score: seconds(lambda: [score() for _ in range(3)], CPU) / 3,
        }
        times = in_turn(runs, rounds)
        difference = (
            (kl(model, case.policy, full, examples) - torch.tensor(score().kl, dtype=torch.float64)).abs().max()
        )
        told = [Spread.of(times[run]).text(3 if run == "trial" else 2) for run in runs]
        speedup = ratio(times["scratch"], times["trial"])
        print(
            f"{name:20}  {told[0]:>19}  {told[1]:>19}  {speedup.text(1):>19}  {case.aim:3.0f}  {difference:.0e}",
            flush=True,
        )
        costs.append(statistics.median(times["scratch"]))
    return statistics.median(costs)


def first_of_its_kind(model: Any, examples: list[Example]) -> None:
    """Trials whose layers are shared as in none before."""
    base = quarter(model, evictors["snapkv"]())
    scorer = Scorer(model, spec_of(model), examples, sharing=True)
    scorer.prepare()
    print("\nthe first trial with these layers shared (prefilled from the first layer that shares otherwise)")
    for pairs in (1, 2, 3):
        policy = sharing(base, pairs)
        scratch = seconds(lambda policy=policy: from_scratch(model, policy, examples), CPU)
        first = seconds(lambda policy=policy: scorer.score(policy), CPU)
        readers = ", ".join(map(str, PAIRS[:pairs]))
        print(f"layers {readers:10}  {scratch:6.2f} s from scratch, {first:6.2f} s: {scratch / first:.1f}", flush=True)


def study(model: Any, examples: list[Example], scratch: float) -> None:
    draw = random.Random(0)
    policies = [drawn(model, draw) for _ in range(TRIALS)]

    def run() -> None:
        scorer = Scorer(model, spec_of(model), examples, sharing=True)
        for policy in policies:
            scorer.score(policy)

    spent = seconds(run, CPU)
    print(
        f"\n{TRIALS} trials of random policies, up to 3 layers shared: {spent:.1f} s, as much as {spent / scratch:.1f} "
        f"full evaluations of {scratch:.2f} s (aim: less than 8)"
    )


def apart(dtype: str) -> None:
    """KL of the bundled model by single steps and by replay, prompt by prompt: exact but for the order of sums."""
    model, tokenizer, spec = load_model(None, dtype=dtype)
    loaded = load_examples([calib_data_path("search")], tokenizer, context_limit=spec.max_context_tokens)
    examples = [e for e in loaded if e.continuation_ids][:8:7]
    scorer = Scorer(model, spec, examples)
    full = [from_scratch(model, full_policy(model), [e]).log_softmax(-1) for e in examples]
    print(f"the bundled model in {dtype}: KL by single steps - by replay")
    for name, case in cases(model).items():
        policy = replace(case.policy, model={})
        if "shared" in name:
            continue  # these are layers of the larger model
        replayed = scorer.score(policy).kl
        stepped = [kl(model, policy, f, [e]).item() for f, e in zip(full, examples, strict=True)]
        told = [f"{a:.5f} - {b:.5f} = {a - b:8.1e}" for a, b in zip(stepped, replayed, strict=True)]
        print(f"{name:20}  {',   '.join(told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1, help="prompts, run as one batch")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", help="may be repeated; all by default")
    parser.add_argument(
        "--apart", metavar="DTYPE", help="instead: how exact replay is on the bundled model, in a dtype"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.apart:
        return apart(args.apart)
    model = small_llama()
    found = cases(model)
    if unknown := set(args.case or ()) - set(found):
        parser.error(f"no case {sorted(unknown)[0]!r}; there are: {'; '.join(found)}")
    examples = random_examples(model, args.rows, args.tokens, args.continuation)
    print(f"{args.rows} prompts of {args.tokens} tokens, continuations of {args.continuation}")
    chosen = {name: case for name, case in found.items() if not args.case or name in args.case}
    scratch = compare(model, examples, chosen, args.rounds)
    if not args.case:
        first_of_its_kind(model, examples)
        study(model, examples, scratch)


if __name__ == "__main__":
    main()
