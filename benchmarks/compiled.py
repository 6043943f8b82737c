"""How much a captured decode step gains over its eager self: `make bench-compiled`.

The same static step, run as it is and through torch.compile, on equal caches in turn. Compiling takes about a minute
and is told apart.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from models import CPU, Prompt, quarter, small_llama

from kvplan.check.timing import Spread, in_turn, ratio, seconds
from kvplan.methods.evictors import evictors
from kvplan.runtime.attach import attach
from kvplan.runtime.static import StaticCache, _Step, static_steps

CONTEXT, STEPS, ROUNDS = 2048, 16, 9


def measure(model: Any, step: _Step) -> float:
    """CPU seconds of a step."""
    with static_steps(model, step._cache), torch.no_grad():
        return seconds(lambda: [step() for _ in range(STEPS)], CPU) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    model = small_llama()
    prompt = Prompt.random(model, [CONTEXT])
    print(f"torch {torch.__version__}, {CONTEXT} tokens, 25 % slots, 1 thread, {STEPS} steps a round, {ROUNDS} rounds")
    print("| evictor | eager ms | compiled ms | eager / compiled | largest difference of logits | compile s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in ("streaming", "h2o", "tova"):
        with attach(model, quarter(model, evictors[name]())) as runtime, torch.no_grad():
            cache = StaticCache(prompt.under(runtime.new_cache()), STEPS * (ROUNDS + 4))
        twin = copy.deepcopy(cache)
        eager, compiled = _Step(model, cache, 1), _Step(model, twin, 1)
        eager._compiled = eager._forward
        started = time.perf_counter()
        with static_steps(model, twin), torch.no_grad():
            second = compiled()
        took = time.perf_counter() - started
        with static_steps(model, cache), torch.no_grad():
            difference = (eager() - second).abs().max().item()

        cases = {"eager": partial(measure, model, eager), "compiled": partial(measure, model, compiled)}
        found = in_turn(cases, ROUNDS)
        gain = ratio(found["eager"], found["compiled"]).text()
        ms = {case: Spread.of([1e3 * t for t in times]).text(1) for case, times in found.items()}
        print(
            f"| {name} | {ms['eager']} | {ms['compiled']} | {gain} | {difference:.1e} | {took:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
