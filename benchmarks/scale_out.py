"""A study of many workers on PostgreSQL, where a trial sleeps instead of scoring: what the storage costs, and how much
it can take. `make bench-scale-out`, or: python benchmarks/scale_out.py --workers 1,4,16,64 --seconds 5

Everything else is real: the search space, the sampler (random, so that no Gaussian process is timed), the claims, the
signs of life and the scores of 64 prompts in every trial. Workers are threads of a few processes, each with a storage
and connections of its own, as a process has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "service"), str(ROOT / "tests" / "search")]
PROMPTS = list(range(64))
NAME = "simulated"


def definition(profile: Any, trials: int) -> Any:
    from kvplan.policy.schema import Target
    from kvplan.search.budget import Protection
    from kvplan.search.decisions import Decisions
    from kvplan.search.definition import Definition, MeasuredProfile
    from kvplan.search.objective import Objective

    return Definition(
        profile=MeasuredProfile.of(profile),
        target=Target(share=4000),
        protection=Protection(),
        evictors=(),
        codecs=None,
        groups=None,
        decisions=Decisions(),
        objective=Objective(),
        sampler="random",
        search_prompts=tuple(PROMPTS),
        seed=0,
        stale_after=180.0,
    )


def score(seconds: float) -> Any:
    """Sleeps `seconds` on average, as trials of unequal policies take unequal times."""
    from kvplan.stats import PromptScores

    def of(policy: object, prompts: Sequence[int]) -> PromptScores:
        time.sleep(random.uniform(0.5, 1.5) * seconds)
        kl = random.random()
        return PromptScores(*[tuple(kl * random.random() for _ in prompts)] * 4)

    return of


def work(url: str, threads: int, seconds: float) -> None:
    """`threads` workers, begun together when a line comes on stdin."""
    from search_fakes import FakeProfile

    from kvplan.search.objective import Judge
    from kvplan.search.shared import SharedStudy
    from kvplan.search.storage import open_storage
    from kvplan.search.trial_run import TrialRun, quiet

    ready, go = threading.Barrier(threads + 1), threading.Event()
    own: list[int] = []

    def one() -> None:
        with open_storage(url) as storage:
            shared = SharedStudy.join(storage, NAME)
            run = TrialRun(shared.definition, FakeProfile().spec, score(seconds), Judge(), {})
            ready.wait()
            go.wait()
            run.work(shared, None, float("inf"), lambda rows, better: None, lambda line: None)
            own.append(run.num_own)

    with quiet():
        started = [threading.Thread(target=one) for _ in range(threads)]
        for thread in started:
            thread.start()
        ready.wait()
        print("ready", flush=True)
        if not sys.stdin.readline():  # the benchmark has gone
            os._exit(1)
        before = time.process_time()
        go.set()
        for thread in started:
            thread.join()
    print(json.dumps({"own": own, "cpu": time.process_time() - before}), flush=True)


def measure(server: Any, workers: int, processes: int, seconds: float, trials: int) -> dict[str, Any]:
    """One study: `trials` trials of `seconds` each by so many workers."""
    import psycopg
    from search_fakes import FakeProfile

    from kvplan.search.objective import Judge
    from kvplan.search.shared import SharedStudy
    from kvplan.search.storage import open_storage
    from kvplan.search.trial_run import TrialRun, quiet

    database = f"w{workers}t{trials}s{int(seconds * 1000)}"
    server.create_database(database)
    url = server.url(database=database)
    made = definition(FakeProfile(), trials)
    starts = TrialRun(made, FakeProfile().spec, score(0), Judge(), {}).starts
    with open_storage(url) as storage, quiet():
        SharedStudy.create(storage, NAME, made, {"kvplan": "simulated"}, trials, starts)
    count = min(processes, workers)
    threads = [workers // count + (i < workers % count) for i in range(count)]
    command = [sys.executable, __file__, "--join", url, "--seconds", str(seconds), "--threads"]
    children = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in threads
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        before = _server_cpu(server)
        start = time.perf_counter()
        for child in children:
            child.stdin.write("\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
        told = [json.loads(child.communicate()[0]) for child in children]
        wall = time.perf_counter() - start
        server_cpu = _server_cpu(server) - before
        rows = connection.execute("select state, count(*) from trials group by state").fetchall()
        commits = connection.execute(
            "select xact_commit from pg_stat_database where datname = current_database()"
        ).fetchone()
    done = dict(rows)
    assert sum(sum(t["own"]) for t in told) == trials == done["COMPLETE"], (told, done)
    ideal = trials * seconds / workers
    return {
        "workers": workers,
        "trials": trials,
        "seconds": seconds,
        "wall": round(wall, 2),
        "trials_per_s": round(trials / wall, 2),
        "ideal_per_s": round(workers / seconds, 2),
        "efficiency": round(ideal / wall, 3),
        "void": done.get("FAIL", 0),
        "commits_per_trial": round(commits[0] / trials, 1) if commits else None,
        "worker_cpu_per_trial_ms": round(1000 * sum(t["cpu"] for t in told) / trials, 1),
        "server_cpu_per_trial_ms": round(1000 * server_cpu / trials, 1),
    }


def _server_cpu(server: Any) -> float:
    """Seconds of the server's processes so far, those that have ended included (Linux)."""
    ticks, parents = 0, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = (int(fields[1]), fields)
    for pid, (parent, fields) in parents.items():
        if pid == server.process.pid:
            ticks += sum(map(int, fields[11:15]))  # its own and its ended children's
        elif parent == server.process.pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,4,16,32,64", help="numbers of workers, each a study of its own")
    parser.add_argument("--seconds", type=float, default=5.0, help="mean length of a trial")
    parser.add_argument("--rounds", type=float, default=4, help="trials per worker")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the rows there as JSON")
    parser.add_argument("--join", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.join:
        work(args.join, args.threads, args.seconds)
        return
    from postgres_server import running_server

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the server ends with the benchmark
    numbers = [int(n) for n in args.workers.split(",")]
    with running_server(f"max_connections={4 * max(numbers) + 20}") as server:
        version = subprocess.run([server.programs / "postgres", "--version"], capture_output=True, text=True).stdout
        print(f"{version.strip()}; {os.cpu_count()} cores, {platform.machine()}; load {os.getloadavg()[0]:.1f}")
        rows = []
        for workers in numbers:
            row = measure(server, workers, args.processes, args.seconds, max(int(args.rounds * workers), 12))
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
