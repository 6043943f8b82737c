"""The whole story on the bundled model: calibrate, search, run, compare. `make demo` runs it in demo-out/."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvplan.calibrate.precision import CODECS, Precision, storable
from kvplan.calibrate.profile import Profile
from kvplan.calibrate.prompts import load_examples
from kvplan.calibrate.records import read_records
from kvplan.check.baselines import Baseline
from kvplan.check.comparison import Row, compare
from kvplan.check.scoring import Scorer
from kvplan.cli.app import app
from kvplan.cli.console import err, out, progress
from kvplan.cli.exits import run_app
from kvplan.demo.data import calib_data_path
from kvplan.files import write_text
from kvplan.loading import load_model
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import FULL, LayerPolicy, Policy
from kvplan.policy.serialize import load_policy
from kvplan.report.comparison import markdown, table
from kvplan.search.allocators import allocators
from kvplan.search.allocators.knapsack import ranked_evictors
from kvplan.search.compile import mean_prompt_tokens
from kvplan.search.method import joined
from kvplan.units import parse_share

TARGET = "40%"
HELDOUT_PROMPTS = 90
# Every one more costs the demo time.
COMPARED_SPLITS = ("squeeze", "pyramid")
SPLIT_EVICTORS = 3  # those with the smallest damage in the profile


def kvplan(*args: str) -> None:
    """Run a command as a user would type it; in this process, so that torch and the model's code are imported once."""
    err.print(f"\n$ kvplan {' '.join(a if ' ' not in a else repr(a[:60] + '...') for a in args)}", style="bold")
    code = run_app(app, args)
    if code:
        sys.exit(code)


def heldout_rows(profile: Profile, policy: Policy, share: int, max_prompts: int = HELDOUT_PROMPTS) -> list[Row]:
    """Full cache, the policy, and every recipe at the same bytes, on prompts that no step has seen."""
    model, tokenizer, spec = load_model(None)
    examples = load_examples(
        [calib_data_path("heldout")], tokenizer, max_prompts=max_prompts, context_limit=spec.max_context_tokens
    )
    policies = {"full cache": Policy(layers=(LayerPolicy(slots=FULL),) * spec.num_layers), "kvplan": policy}
    # An evictor without a fixed budget holds what it likes: it has no policy of the same bytes.
    budgeted = [name for name in evictors if evictors[name]().forgets_after is None]
    baselines = {f"uniform {name}": Baseline("uniform", name, share) for name in budgeted}
    baselines |= {
        f"uniform {codec}": Baseline("uniform", joined("streaming", both), share)
        for codec in CODECS
        if storable(both := Precision(codec, codec), spec)
    }
    best = ranked_evictors(profile.sensitivity, range(spec.num_layers), share)[:SPLIT_EVICTORS]
    labels = [allocators[name].title for name in COMPARED_SPLITS]
    baselines |= {
        f"{label} {name}": Baseline(allocator, name, share)
        for allocator, label in zip(COMPARED_SPLITS, labels, strict=True)
        for name in best
    }
    context = mean_prompt_tokens(profile)
    policies |= {name: made.policy(spec, context, profile.facts) for name, made in baselines.items()}
    with progress("policies on held-out prompts", len(policies)) as advance:
        rows = compare(Scorer(model, spec, examples), policies, "kvplan", progress=lambda name: advance(1, note=name))
    splits = [
        min((row for row in rows if row.name.startswith(label)), key=lambda row: row.scores.mean_kl) for label in labels
    ]
    # Every uniform policy is shown; the layer splits with the evictor that suits each best on these prompts.
    return [row for row in rows if row.name in ("full cache", "kvplan") or row.name.startswith("uniform")] + splits


def main(arguments: Sequence[str] | None = None) -> None:
    trials = (arguments or sys.argv[1:] or ["40"])[0]
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kvplan("calibrate", "-o", "profile.json")
    kvplan("search", "--mem", TARGET, "--trials", trials, "-o", "policy.yaml")
    record = next(r for r in read_records(calib_data_path("heldout")) if r.question_aware and r.prompt)
    assert record.prompt is not None
    kvplan("run", "--policy", "policy.yaml", "--compare", record.prompt)
    err.print(f"expected: {record.answer}")
    profile, policy = Profile.load(Path("profile.json")), load_policy(Path("policy.yaml"))
    rows = heldout_rows(profile, policy, parse_share(TARGET))
    seconds = time.monotonic() - started
    out.print()
    out.print(table(rows, f"{len(rows[0].scores)} held-out prompts, KV cache at {TARGET} of full"))
    out.print(
        "score: answers exactly right. KL: nats from the full cache's next-token distribution. Last column: paired\n"
        "difference with its 95% interval at equal bytes; above 0 means worse than the found policy. What does not\n"
        f"fit under a codec is dropped by streaming; a codec that fits whole holds less. {seconds:.0f} s in all."
    )
    write_text(Path("table.md"), markdown(rows) + "\n")


if __name__ == "__main__":
    main()
