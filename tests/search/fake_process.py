"""A search or a worker on a fake model, as a process: `fake_process.py search|worker STORAGE STUDY [options]`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from search_fakes import FakeProfile, FakeScore, spec_of

from kvplan.policy.schema import Policy, Target
from kvplan.search.budget import Protection
from kvplan.search.compile import budget_for
from kvplan.search.confirm import SearchResult
from kvplan.search.shared import SharedStudy
from kvplan.search.space import space_for
from kvplan.search.storage import open_storage
from kvplan.search.study import search
from kvplan.search.worker import work
from kvplan.stats import PromptScores

SEARCH, CONFIRM = list(range(8)), list(range(8, 12))


def num_starts(trials: int) -> int:
    """How many warm starts a study of so many trials tries."""
    profile = FakeProfile()
    budget = budget_for(profile, profile.spec, Target(share=4000), Protection())
    return min(trials, len(space_for(profile, budget)[1].warm_starts()))


def fake_search(
    storage: Path | str | None, trials: int, score: FakeScore | None = None, **options: Any
) -> SearchResult:
    """A search at 40 % on the fake profile."""
    profile = FakeProfile()
    return search(
        profile,
        profile.spec,
        Target(share=4000),
        score or FakeScore(),
        search_prompts=SEARCH,
        confirm_prompts=CONFIRM,
        trials=trials,
        storage=storage,
        **options,
    )


class SlowScore(FakeScore):
    """Takes its time, and writes its process and policy to a log."""

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__()
        self.seconds, self.log = seconds, log

    def __call__(self, policy: Policy, prompts: Sequence[int]) -> PromptScores:
        with self.log.open("a") as file:
            file.write(
                json.dumps([os.getpid(), hashlib.sha256(repr(policy.layers).encode()).hexdigest(), len(prompts)]) + "\n"
            )
        time.sleep(self.seconds)
        return super().__call__(policy, prompts)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("search", "worker"))
    parser.add_argument("storage")
    parser.add_argument("study")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--stale-after", type=float, default=180.0)
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    args = parser.parse_args()
    score = SlowScore(args.seconds, args.log)
    if args.role == "worker":
        with open_storage(args.storage, say, create=False) as storage:
            worked = work(SharedStudy.join(storage, args.study), spec_of(), score, say=say)
        print(json.dumps({"own": worked.own, "done": worked.done, "total": worked.total}))
        return
    options = {"study": args.study, "stale_after": args.stale_after, "say": say}
    result = fake_search(args.storage, args.trials, score, **options)
    rows = [[row.number, row.label] for row in result.trials]
    print(json.dumps({"rows": rows, "kl": result.winner.kl, "others": result.by_others}))


if __name__ == "__main__":
    main()
