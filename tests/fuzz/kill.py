"""kill -9 at random moments of `kvplan calibrate`, `search` and `eval`: python -m tests.fuzz.kill --kills 10

After every kill each file that is there must be whole; the same command, run again, must end as if it was never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import prepare, start, wait

TRIALS = 6  # all of them warm starts, so that an interrupted search must find what an unbroken one finds
SHORT = ["--max-tokens", "96"]
SLOWEST = 300.0


@dataclass(frozen=True)
class Job:
    """A command, what it reads, and what it leaves.

    Attributes:
        needs: Files of jobs before it.
        outcome: What must be equal after an unbroken run and after a broken one.
    """

    argv: list[str]
    needs: list[str]
    outcome: Callable[[Path], Any]


def profile_of(folder: Path) -> Any:
    data = json.loads((folder / "profile.json").read_text())
    data["seconds"] = data["sensitivity"]["seconds"] = None
    return data


def policy_of(folder: Path) -> Any:
    """The policy, its scores and how many trials the study has; a trial that was interrupted has another number."""
    from kvplan.policy.serialize import load_policy

    policy = load_policy(folder / "policy.yaml")
    found = {**policy.provenance["search"], "trial": None}
    return policy.layers, policy.target, found, trials_of(folder / "policy.60pct.journal")


def results_of(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


JOBS = {
    "calibrate": Job(
        ["calibrate", "--data", "a.jsonl", *SHORT, "--sensitivity-prompts", "2", "--evictor", "knorm", "--evictor",
         "streaming", "-o", "profile.json"],
        ["a.jsonl"], profile_of,
    ),
    "search": Job(
        ["search", "--mem", "60%", "--data", "b.jsonl", *SHORT, "--min-slots", "24", "--trials", str(TRIALS), "-o",
         "policy.yaml"],
        ["b.jsonl", "profile.json"], policy_of,
    ),
    "eval": Job(
        ["eval", "--policy", "policy.yaml", "--data", "b.jsonl", *SHORT, "--speed-tokens", "0", "-o", "results.json"],
        ["b.jsonl", "policy.yaml"], results_of,
    ),
}  # fmt: skip


def run(argv: list[str], folder: Path) -> float:
    """Run to the end; returns the seconds."""
    began = time.monotonic()
    child = start(argv, folder)
    code = wait(child, SLOWEST)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if code != 0:
        raise SystemExit(f"kvplan {' '.join(argv)} ended with {code}:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def trials_of(journal: Path) -> int:
    """How many trials are done; the file must be readable."""
    import optuna

    from kvplan.search.claims import Ledger
    from kvplan.search.storage import open_storage

    with open_storage(journal, print, create=False) as storage:
        names = storage.study_names()
        if not names:
            return 0
        return len(Ledger.read(optuna.load_study(study_name=names[0], storage=storage.backend), TRIALS).done)


def check_files(folder: Path) -> int:
    """Load all that is there; returns how many temporary files a kill left."""
    from kvplan.calibrate.profile import Profile
    from kvplan.check.results import load_results
    from kvplan.policy.serialize import load_policy

    readers: dict[str, Callable[[Path], Any]] = {
        "profile.json": Profile.load, "policy.yaml": load_policy, "results.json": load_results,
        "policy.60pct.journal": trials_of, "log.txt": Path.read_bytes, "a.jsonl": Path.read_bytes,
        "b.jsonl": Path.read_bytes,
    }  # fmt: skip
    left = 0
    for path in folder.iterdir():
        if path.name in readers:
            readers[path.name](path)
        elif path.name.startswith("."):
            left += 1  # a name that nothing reads and nobody's listing shows
        else:
            raise SystemExit(f"{path}: nobody knows this file")
    return left


def write_prompts(folder: Path) -> None:
    from kvplan.demo.data import calib_data_path

    for name, data, count in (("a.jsonl", "calibrate", 3), ("b.jsonl", "search", 6)):
        lines = calib_data_path(data).read_text(encoding="utf-8").splitlines()[:count]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; printed when it is drawn")
    given = parser.parse_args()
    prepare()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        kill_all(Path(root), given.kills, draw, seed)


def kill_all(root: Path, kills: int, draw: random.Random, seed: int) -> None:
    unbroken = root / "unbroken"
    unbroken.mkdir()
    write_prompts(unbroken)
    wanted, seconds = {}, {}
    for name, job in JOBS.items():
        seconds[name] = run(job.argv, unbroken)
        wanted[name] = job.outcome(unbroken)
    assert wanted["search"][-1] == TRIALS
    done = left = turn = 0
    while done < kills:
        name = list(JOBS)[turn % len(JOBS)]
        turn += 1
        job, folder = JOBS[name], root / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for needed in job.needs:
            shutil.copy(unbroken / needed, folder)
        for again in range(min(draw.choice((1, 1, 2)), kills - done)):
            began = time.monotonic()
            child = start(job.argv, folder)
            if wait(child, draw.uniform(0, seconds[name])) is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
            elif not again:  # faster than the unbroken run: not a kill, and the next ones come earlier
                seconds[name] = min(seconds[name], time.monotonic() - began)
            left += check_files(folder)
        run(job.argv, folder)
        check_files(folder)
        if (found := job.outcome(folder)) != wanted[name]:
            shown = f"{str(found)[:1500]}\n\ninstead of\n\n{str(wanted[name])[:1500]}"
            raise SystemExit(f"kvplan {name}, killed (seed {seed}, kill {done}), then run again, left\n\n{shown}")
        print(f"{done}/{kills} kills (seed {seed})", flush=True)
    told = f"{done} kills (seed {seed}): every file whole, every rerun as unbroken"
    print(f"{told}; {left} hidden temporary files left")


if __name__ == "__main__":
    sys.exit(main())
