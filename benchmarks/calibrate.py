"""What `kvplan calibrate` costs beyond the prompts' plain prefill, without sensitivity: `make bench-calibrate`.

Both run in this process, in turn, on the same batches; the ratio is of medians. Target: at most 1.3.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kvplan.calibrate.collect import collect
from kvplan.calibrate.examples import Example
from kvplan.calibrate.prompts import load_examples
from kvplan.check.scoring import pad
from kvplan.demo.data import calib_data_path
from kvplan.loading import load_model

BATCH_SIZE = 4


@torch.no_grad()
def prefill(model: torch.nn.Module, examples: list[Example]) -> None:
    """The same batches as `collect` makes, through the model as it is."""
    ordered = sorted(examples, key=lambda example: len(example.prompt_ids))
    for start in range(0, len(ordered), BATCH_SIZE):
        ids, valid = pad([e.prompt_ids for e in ordered[start : start + BATCH_SIZE]], left=True)
        model(input_ids=ids, attention_mask=valid.long(), use_cache=False, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", default=str(calib_data_path("calibrate")))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer, spec = load_model(args.model)
    examples = load_examples([args.data], tokenizer, context_limit=spec.max_context_tokens)
    seconds: dict[str, list[float]] = {"prefill": [], "calibrate": []}
    for _ in range(args.rounds + 1):
        for name, run in (
            ("prefill", lambda: prefill(model, examples)),
            ("calibrate", lambda: collect(model, examples, batch_size=BATCH_SIZE)),
        ):
            started = time.thread_time() if torch.get_num_threads() == 1 else time.monotonic()
            run()
            ended = time.thread_time() if torch.get_num_threads() == 1 else time.monotonic()
            seconds[name].append(ended - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first round warms up
    print(f"{len(examples)} prompts, {sum(len(e.prompt_ids) for e in examples)} tokens, {args.rounds} rounds")
    for name, times in seconds.items():
        print(f"{name:>9}: median {medians[name]:.2f} s, {min(times[1:]):.2f} to {max(times[1:]):.2f}")
    print(f"ratio of medians: {medians['calibrate'] / medians['prefill']:.2f}")


if __name__ == "__main__":
    main()
