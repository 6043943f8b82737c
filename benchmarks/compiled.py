"""How much a captured decode step gains over its eager self: `make bench-compiled`.

The same static step, run as it is and through torch.compile, on the same caches in turn. Compiling takes about a minute and
is told apart.
"""

from __future__ import annotations

import copy
import time

import torch
from models import CPU, Prompt, quarter, small_llama

from kvplan.check.timing import Spread, in_turn, seconds
from kvplan.methods.evictors import evictors
from kvplan.runtime.attach import attach
from kvplan.runtime.static import StaticCache, _Step, static_steps

CONTEXT, STEPS, ROUNDS = 2048, 16, 9


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

        def run(step: _Step) -> float:
            with static_steps(model, step._cache), torch.no_grad():
                return seconds(lambda: [step() for _ in range(STEPS)], CPU) / STEPS

        found = in_turn({"eager": lambda: run(eager), "compiled": lambda: run(compiled)}, ROUNDS)
        ratio = Spread.of([a / b for a, b in zip(found["eager"], found["compiled"], strict=True)])
        ms = {case: Spread.of([1e3 * t for t in times]).text(1) for case, times in found.items()}
        print(
            f"| {name} | {ms['eager']} | {ms['compiled']} | {ratio.text()} | {difference:.1e} | {took:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
