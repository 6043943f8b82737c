"""What reading a prompt in chunks saves: `make bench-chunked`.

A random Llama of 44 M parameters in float32, one thread, a prompt of 4096 tokens, 25 % of the slots, chunks of 512.
Peak memory is the most that a fresh process ever held (VmHWM) above what it held with the model loaded and warm; one
process per case and round, in turn. Time is CPU time of the prefill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from models import CPU, quarter, small_llama
from transformers import DynamicCache

from kvplan.check.timing import Spread, ratio, seconds
from kvplan.methods.evictors import evictors
from kvplan.runtime.attach import attach
from kvplan.runtime.replay import prefill

WHOLE, HF_CHUNKS = "DynamicCache", "DynamicCache, chunks"
EVICTORS = ("streaming", "snapkv", "h2o")
CASES = (WHOLE, HF_CHUNKS, *(f"{name}{how}" for name in EVICTORS for how in ("", ", chunks")))


def kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@torch.no_grad()
def run(case: str, context: int, chunk: int) -> tuple[int, float]:
    """(peak bytes above the loaded model, seconds) of one prefill in this process."""
    model = small_llama()
    ids = torch.randint(0, model.config.vocab_size, (1, context))
    valid = torch.ones_like(ids, dtype=torch.bool)
    model(input_ids=ids[:, :16])  # what a first forward allocates once
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    if case.startswith("DynamicCache"):
        step = chunk if case == HF_CHUNKS else context
        cache = DynamicCache()

        def plain() -> None:
            for start in range(0, context, step):
                model(input_ids=ids[:, start : start + step], past_key_values=cache, logits_to_keep=1)

        spent = seconds(plain, CPU)
    else:
        name, _, how = case.partition(", ")
        policy = replace(quarter(model, evictors[name]()), prefill_chunk_tokens=chunk if how else None)
        with attach(model, policy) as runtime:
            spent = seconds(lambda: prefill(runtime, runtime.new_cache(), ids, valid), CPU)
    return (kib("VmHWM") - before) * 1024, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CASES, help="one case in this process; prints JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        print(json.dumps(run(args.only, args.context, args.chunk)))
        return
    times: dict[str, list[float]] = {case: [] for case in CASES}
    peaks: dict[str, list[float]] = {case: [] for case in CASES}

    for _, case in itertools.product(range(args.rounds), CASES):
        again = [sys.executable, __file__, "--only", case, "--context", str(args.context), "--chunk", str(args.chunk)]
        peak, spent = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        peaks[case].append(peak)
        times[case].append(spent)
    print(f"{args.context} tokens, chunks of {args.chunk}; aims: peak at most 0.30, time at most 1.05 (chunks)")
    print(f"{'':22}  {'peak MiB':>18}  {'/ DynamicCache':>17}  {'seconds':>17}  {'/ DynamicCache':>17}")
    for case in CASES:
        mib = Spread.of([peak / 2**20 for peak in peaks[case]]).text(0)
        size, pace = ratio(peaks[case], peaks[WHOLE]).text(), ratio(times[case], times[WHOLE]).text()
        print(f"{case:22}  {mib:>18}  {size:>17}  {Spread.of(times[case]).text():>17}  {pace:>17}")


if __name__ == "__main__":
    main()
