"""What a decode step costs with a quarter of the slots: `make bench-decode`.

A random Llama of 44 M parameters in float32, one thread. A fresh process per case: a real prefill into transformers'
own cache, whose keys and values all other caches are filled with. All are then decoded in turn, a few steps at a time;
times are the thread's own CPU time per step, ratios are medians of the rounds with quartiles.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from models import Decoding, Prompt, decoding, everything, padding, quarter, small_llama

from kvplan.check.timing import Spread, in_turn, ratio
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import Policy

FULL, POOL, CUT, FLOOR = "DynamicCache, full", "pool, full", "DynamicCache, last 25 %", "DynamicCache, empty"
EVICTORS = ("streaming", "snapkv", "knorm", "h2o", "tova")
SHARE = 0.25
WARM_UP_STEPS = 24  # until the allocator has settled


@dataclass(frozen=True)
class Case:
    """A batch of prompts, by their lengths in tokens, and the speed-up over the full cache that is aimed at."""

    name: str
    lengths: tuple[int, ...]
    streaming: float | None = None
    scored: float | None = None
    pool: float | None = None

    def target(self, row: str) -> float | None:
        if row == POOL:
            return self.pool
        if row in ("streaming", "snapkv", "knorm"):
            return self.streaming
        return self.scored if row in EVICTORS else None


CASES = {
    case.name: case
    for case in (
        Case("8x2k", (2048,) * 8, 4.0, 3.8, 2.2),
        Case("1x8k", (8192,), 3.4, 3.4),
        Case("4x2k", (2048,) * 4),
        Case("ragged", (1540, 1685, 1830, 1975, 2121, 2266, 2411, 2556)),
    )
}


def policies(model: Any, names: Sequence[str], encoded: bool) -> dict[str, Policy]:
    found = {POOL: everything(model)} | {name: quarter(model, evictors[name]()) for name in names}
    if encoded:
        found["streaming, int8"] = quarter(model, key_codec=Int8(), value_codec=Int8())
        found["streaming, kivi 4"] = quarter(model, key_codec=KIVI(), value_codec=KIVI(), min_slots=192)
    return found


def measure(model: Any, case: Case, plans: Mapping[str, Policy], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step and round."""
    prompt, full = Prompt.prefilled(model, case.lengths)
    own = Decoding(model, full, None, list(case.lengths), padding(case.lengths))
    caches = {FULL: own, CUT: decoding(model, prompt, None, SHARE)}
    caches |= {name: decoding(model, prompt, policy) for name, policy in plans.items()}
    del prompt, full
    for cache in caches.values():
        cache.seconds(WARM_UP_STEPS)
    cases = {name: lambda cache=cache: cache.seconds(steps) for name, cache in caches.items()}
    # A cache of a few tokens, made anew each round.
    cases[FLOOR] = lambda: decoding(model, Prompt.random(model, [1] * len(case.lengths)), None).seconds(steps)
    times = in_turn(cases, rounds)
    for name, cache in caches.items():
        tell_faults(name, cache)
    return times


def tell_faults(name: str, cache: Decoding, steps: int = 8) -> None:
    """Pages that a step touches first, and what the kernel takes for them: of `DynamicCache` they differ by process."""
    before = resource.getrusage(resource.RUSAGE_THREAD)
    cache.seconds(steps)
    after = resource.getrusage(resource.RUSAGE_THREAD)
    user, system = (1000 * (b - a) / steps for a, b in zip(before[:2], after[:2], strict=True))
    faults = (after.ru_minflt - before.ru_minflt) / steps
    print(f"{name:24}  {user:5.0f} ms user, {system:5.0f} ms kernel, {faults:8.0f} page faults a step", flush=True)


def show(case: Case, times: Mapping[str, list[float]]) -> None:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{case.name}: {len(case.lengths)} rows, {sum(case.lengths)} tokens; {versions}")
    print(f"{'':24}  {'ms a step':>19}  {'DynamicCache / it':>19}  {'aim':>4}  ideal / it")
    for name, seconds in times.items():
        speedup, aim = ratio(times[FULL], seconds), case.target(name)
        ideal = [f + SHARE * (p - f) for f, p in zip(times[FLOOR], times[POOL], strict=True)]
        near = f"{ratio(ideal, seconds).text()}" if name not in (FULL, POOL, CUT, FLOOR) else ""
        cost = Spread.of([1000 * s for s in seconds]).text(1)
        print(f"{name:24}  {cost:>19}  {speedup.text():>19}  {aim or '':>4}  {near}", flush=True)


def compare_ragged(model: Any, plans: Mapping[str, Policy], rounds: int, steps: int) -> None:
    """The same policies on as many tokens, in rows of different and of equal lengths, in turn."""
    print("\nragged against uniform rows of as many tokens (aim: at most 1.03)")
    for name, policy in plans.items():
        uneven = decoding(model, Prompt.random(model, CASES["ragged"].lengths), policy)
        even = decoding(model, Prompt.random(model, CASES["8x2k"].lengths), policy)
        times = in_turn({"ragged": partial(uneven.seconds, steps), "uniform": partial(even.seconds, steps)}, rounds)
        print(f"{name:24}  {ratio(times['ragged'], times['uniform']).text(3)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; all by default")
    parser.add_argument("--evictor", action="append", choices=EVICTORS, help="may be repeated; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="decode steps of a round")
    parser.add_argument("--encoded", action="store_true", help="with rows for int8 and kivi")
    args = parser.parse_args()
    chosen = args.case or list(CASES)
    if len(chosen) > 1:
        rest = [a for a in sys.argv[1:] if a not in ("--case", *CASES)]
        for name in chosen:
            subprocess.run([sys.executable, __file__, "--case", name, *rest], check=True)
        return
    torch.set_num_threads(1)
    model = small_llama()
    plans = policies(model, args.evictor or EVICTORS, args.encoded)
    show(CASES[chosen[0]], measure(model, CASES[chosen[0]], plans, args.rounds, args.steps))
    if chosen == ["ragged"]:
        compare_ragged(model, plans, args.rounds, args.steps)


if __name__ == "__main__":
    main()
