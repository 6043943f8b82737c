"""What attention over encoded slots costs on a CPU: `make bench-quantized`.

One decode step of one layer (1 row, 8 query and 4 KV heads of 64 channels, float32, one thread) over encoded slots,
against the same path over dense slots and against SDPA. Then the decode step of a whole model. On a CPU encoding buys
memory, not time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from models import CPU, Decoding, Prompt, decoding, everything, quarter, small_llama
from torch import Tensor

from kvplan.check.timing import Spread, in_turn, ratio, seconds
from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.codecs.fp8 import FP8
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.codecs.turboquant import TurboQuant
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.parts import Part, Stored
from kvplan.runtime.kernels.stored import attend_parts

CODECS: dict[str, Codec] = {
    "int8": Int8(),
    "fp8": FP8(),
    "kivi 4": KIVI(bits=4),
    "kivi 2": KIVI(bits=2),
    "turboquant 4": TurboQuant(bits=4),
}
SDPA, DENSE = "SDPA", "dense"
AIM = 2.5
COPIES = 12  # as many layers as a model has, so that no layer's slots wait in a cache


def stored(codec: Codec, x: Tensor) -> Stored:
    return Stored(codec, codec.encode(x), x.shape[-1])


def attention(codec: Codec, slots: int, want_probs: bool) -> Callable[[], object]:
    """One call over the next of several layers."""
    parts = []
    for _ in range(COPIES):
        keys, values = torch.randn(1, 4, slots, 64), torch.randn(1, 4, slots, 64)
        parts.append(Part(stored(codec.for_keys(), keys), stored(codec.for_values(), values), slots))
    q, args, turn = torch.randn(1, 8, 1, 64), AttentionArgs(64**-0.5), itertools.cycle(parts)
    return lambda: attend_parts(q, (next(turn),), args, want_probs)


@torch.no_grad()
def layers(slots: int, rounds: int) -> None:
    runs = {SDPA: attention(Dense(), slots, False), DENSE: attention(Dense(), slots, True)}
    runs |= {name: attention(codec, slots, True) for name, codec in CODECS.items()}
    calls = 2 * COPIES

    def each(run: Callable[[], object]) -> float:
        return seconds(lambda: [run() for _ in range(calls)], CPU) / calls

    times = in_turn({name: lambda run=run: each(run) for name, run in runs.items()}, rounds)
    print(f"\n{slots} slots: one layer's attention (aim: at most {AIM} x dense)")
    print(f"{'':14}  {'us':>19}  {'it / dense':>17}  {'it / SDPA':>17}")
    for name, found in times.items():
        cost = Spread.of([1e6 * s for s in found]).text(0)
        print(f"{name:14}  {cost:>19}  {ratio(found, times[DENSE]).text():>17}  {ratio(found, times[SDPA]).text():>17}")


def steps(rounds: int, tokens: int) -> None:
    """Whole decode steps, every slot of the prompt kept and 25 % of them."""
    model = small_llama()
    prompt = Prompt.random(model, [tokens])
    full = everything(model)
    plans = {"dense, 25 %": quarter(model)}
    for name, codec in CODECS.items():
        plans[f"{name}, 25 %"] = quarter(model, key_codec=codec, value_codec=codec, min_slots=192)
    caches: dict[str, Decoding] = {"DynamicCache": decoding(model, prompt, None), "full": decoding(model, prompt, full)}
    caches |= {name: decoding(model, prompt, policy) for name, policy in plans.items()}
    times = in_turn({name: lambda cache=cache: cache.seconds(8) for name, cache in caches.items()}, rounds)
    print(f"\n1 row of {tokens} tokens: a whole decode step of 44 M parameters")
    print(f"{'':20}  {'ms':>17}  {'it / dense, 25 %':>17}  MiB held")
    for name, found in times.items():
        cost, held = Spread.of([1000 * s for s in found]).text(1), ""
        if name != "DynamicCache":
            held = f"{caches[name].cache.kv_bytes / 2**20:.1f}"
        print(f"{name:20}  {cost:>17}  {ratio(found, times['dense, 25 %']).text():>17}  {held:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="prompt of the whole decode step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for slots in args.slots:
        layers(slots, args.rounds)
    steps(args.rounds, args.tokens)


if __name__ == "__main__":
    main()
