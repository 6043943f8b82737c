"""Run the command blocks of README and docs in order, a folder a section: python -m tests.docs.run_commands [PAGE ...]

The bundled model stands for every model, a few short prompts for every file of prompts, and the CPU for every device.
What cannot run here is named below, with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, Command, commands

from tests.forks import prepare, start, wait

SLOWEST = 120.0
# Beginnings of commands that are not run, and why.
SKIPPED = {
    "make": "installs, or is a step of .ci/run or longer than CI",
    "pip": "installs",
    "python -m kvplan.demo.train": "trains the bundled model for hours",
    "python -m kvplan.demo.evaluate": "a part of make demo, of minutes",
    "python benchmarks/": "a benchmark, of minutes",
    "apt-get": "installs", "initdb": "a server; make test-service starts one", "postgres": "a server",
    "createdb": "a server", "wait": "of the shell",
    "kvplan search --mem 40% --model ./model --data prompts.jsonl --study llama-40": "a server",
    "kvplan worker --study llama-40": "a server",
    "kvplan calibrate ./my-model --data some/dataset": "a dataset from the hub",
    "kvplan calibrate stories260K": "a model that is not shipped",
}  # fmt: skip
# What is said less of: options whose values would take long here.
SMALLER = {"--trials": "3", "--device": "cpu", "--max-new-tokens": "8", "--speed-tokens": "0", "--max-prompts": "6"}
SETTINGS = {
    "KVPLAN_MAX_TOKENS": "320", "KVPLAN_MAX_PROMPTS": "6", "KVPLAN_SENSITIVITY_PROMPTS": "4", "KVPLAN_TRIALS": "3",
    "KVPLAN_CALIBRATE_EVICTOR": "snapkv,streaming", "KVPLAN_MIN_SLOTS": "24", "KVPLAN_MAX_NEW_TOKENS": "8",
    "KVPLAN_SPEED_TOKENS": "0", "KVPLAN_STALE_AFTER": "5",
}  # fmt: skip
RECORDS = (
    "prompts.jsonl", "other-prompts.jsonl", "held-out.jsonl", "my.jsonl", "my-search.jsonl", "my-heldout.jsonl",
    "shard0.jsonl", "shard1.jsonl",
)  # fmt: skip
# What pages need that other pages make.
MADE = ("profile.json", "policy.yaml", "policy.40pct.journal", "results.json", "other.yaml", "part2.json", "part3.json",
        "part4.json")  # fmt: skip


def furnish(folder: Path) -> None:
    """Model, prompts and texts under the names that the pages use."""
    from kvplan.demo.data import calib_data_path
    from kvplan.loading import BUNDLED_FOLDER

    for name in ("my-model", "model"):
        (folder / name).symlink_to(BUNDLED_FOLDER)
    (folder / "policies").symlink_to(ROOT / "policies")
    (folder / "docs").mkdir()
    lines = calib_data_path("calibrate").read_text(encoding="utf-8").splitlines()
    for i, name in enumerate(RECORDS):  # shards may not overlap
        (folder / name).write_text("\n".join(lines[6 * i : 6 * i + 6]) + "\n", encoding="utf-8")
    text = " ".join(re.findall(r"[a-z]+", lines[0]))
    for name in ("long.txt", "prompt.txt", "book.txt"):
        (folder / name).write_text(text[:2000], encoding="utf-8")


def smaller(words: list[str]) -> list[str]:
    """The same command with less to do, and with what the shell would have expanded."""
    made: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        made.append(SMALLER.get(before, word))
    return made


def run(argv: list[str], folder: Path, told: str) -> None:
    expanded = [str(path.relative_to(folder)) for word in argv for path in sorted(folder.glob(word))] if "*" in "".join(
        argv
    ) else []  # fmt: skip
    argv = [word for word in argv if "*" not in word] + expanded
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    child = start(argv, folder)
    code = wait(child, SLOWEST)
    if code is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    if code != 0:
        raise SystemExit(f"{told}\n  run as kvplan {' '.join(argv)}\n  ended with {code}:\n{log.read_text()[-3000:]}")
    print(f"{time.monotonic() - began:5.1f} s  {told}", flush=True)


def make_files(folder: Path) -> None:
    """What one page needs of another."""
    run(["calibrate", "--data", "prompts.jsonl"], folder, "profile.json")
    run(["search", "--mem", "40%", "--data", "other-prompts.jsonl"], folder, "policy.yaml")
    argv = ["eval", "--policy", "policy.yaml", "--baseline", "uniform:snapkv@40%", "--data", "held-out.jsonl"]
    run(argv, folder, "results.json")
    for part in (2, 3, 4):
        shard = ["--shard", f"{part}/4", "-o", f"part{part}.json"]
        run(["calibrate", "./model", "--data", "prompts.jsonl", *shard], folder, f"part{part}.json")
    shutil.copy(folder / "policy.yaml", folder / "other.yaml")


def named(page: str) -> list[str]:
    """The files of other pages that a page's commands name."""
    words = {word for command in commands() if command.page == page for word in command.words}
    return [name for name in MADE if name in words]


def reason(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((why for begin, why in SKIPPED.items() if text.startswith(begin)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="such as README.md; all without")
    wanted = parser.parse_args().pages
    os.environ |= SETTINGS
    prepare()
    done = skipped = 0
    with tempfile.TemporaryDirectory() as root:
        first = Path(root, "first")
        first.mkdir()
        furnish(first)
        make_files(first)
        here, folder = ("", ""), first
        for command in commands():
            if wanted and command.page not in wanted:
                continue
            if reason(command) is not None:
                skipped += 1
                continue
            if (command.page, command.section) != here:
                here, folder = (command.page, command.section), Path(root, f"section{done}")
                folder.mkdir()
                furnish(folder)
                for name in named(command.page):
                    shutil.copy(first / name, folder)
            run(smaller(list(command.words[1:])), folder, str(command))
            done += 1
    print(f"{done} commands ran; {skipped} were not run, for the reasons in tests/docs/run_commands.py")


if __name__ == "__main__":
    main()
