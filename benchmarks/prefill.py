"""What ranking a prompt costs over the prefill alone: `make bench-prefill`.

A random Llama of 44 M parameters in float32, one thread. `full` is the same prefill with every layer full;
transformers' own is beside it. Prompts run in turn in this process; ratios are medians of the rounds with quartiles.
"""

from __future__ import annotations

import argparse

import torch
from models import CPU, everything, quarter, small_llama
from transformers import DynamicCache

from kvplan.check.timing import Spread, in_turn, ratio, seconds
from kvplan.methods.evictors import evictors
from kvplan.runtime.attach import attach

AIMS = {"streaming": 1.03, "snapkv": 1.03, "tova": 1.03, "knorm": 1.03, "h2o": 1.6}
FULL, PLAIN = "full", "DynamicCache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--evictor", action="append", choices=AIMS, help="may be repeated; all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = small_llama()
    ids = torch.randint(0, model.config.vocab_size, (1, args.context))
    plans = {FULL: everything(model)} | {name: quarter(model, evictors[name]()) for name in args.evictor or AIMS}

    @torch.no_grad()
    def plain() -> float:
        return seconds(lambda: model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1), CPU)

    @torch.no_grad()
    def under(name: str) -> float:
        with attach(model, plans[name]) as runtime:
            return seconds(lambda: model(input_ids=ids, past_key_values=runtime.new_cache(), logits_to_keep=1), CPU)

    cases = {PLAIN: plain} | {name: lambda name=name: under(name) for name in plans}
    times = in_turn(cases, args.rounds)
    print(f"{args.context} tokens, 1 row")
    print(f"{'':14}  {'seconds':>17}  {'it / full':>19}  aim")
    for name, found in times.items():
        print(
            f"{name:14}  {Spread.of(found).text():>17}  {ratio(found, times[FULL]).text(3):>19}  {AIMS.get(name, '')}"
        )


if __name__ == "__main__":
    main()
