from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))
from search_fakes import FakeProfile, FakeScore

import kvplan
from kvplan.cli.exits import run_app
from kvplan.cli.search import parse_target
from kvplan.errors import TargetError
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import Policy, Target
from kvplan.policy.serialize import load_policy
from kvplan.report.search import LIVE_ROWS, live_table, name
from kvplan.search.compile import Params
from kvplan.search.confirm import SEARCHED, TrialRow
from kvplan.stats import PromptScores
from kvplan.units import parse_bytes

EXAMPLES = [
    SimpleNamespace(answers=(), id=str(i), task="ab"[i % 2], prompt_ids=(i, 1), continuation_ids=(1,) * (i < 9))
    for i in range(10)
]


@pytest.mark.parametrize(
    ("mem", "context", "batch", "target"),
    [
        ("40%", None, None, Target(share=4000)),
        ("0.4", None, None, Target(share=4000)),
        ("512MiB", 4096, None, Target(bytes=parse_bytes("512MiB"), context_tokens=4096)),
        ("1.5gib", 4096, 8, Target(bytes=parse_bytes("1.5GiB"), context_tokens=4096, batch=8)),
    ],
)
def test_targets(mem: str, context: int | None, batch: int | None, target: Target) -> None:
    assert parse_target(mem, context, batch) == target


@pytest.mark.parametrize(
    ("mem", "context", "told"),
    [
        ("much", None, "'much' is not a share; write for example 40% or 0.4"),
        ("0%", None, "'0%' is not a share above 0% and at most 100%"),
        ("40", None, "'40' is not a share above 0% and at most 100%; did you mean 40%?"),
        ("400", None, "'400' is not a share above 0% and at most 100%"),
        ("512M", None, "'512M' is not a size; write for example 512MiB or 1.5GiB"),
        ("2 G", 4096, "'2 G' is not a size; write for example 512MiB or 1.5GiB"),
        ("3XB", None, "'3XB' is not a size; write for example 512MiB or 1.5GiB"),
        ("512MiB", None, "--mem 512MiB is a size; say with --context for how many prompt tokens per row (and --batch)"),
        ("40%", 4096, "--mem 40% holds for any context and batch; leave out --context and --batch"),
    ],
)
def test_bad_targets_are_refused(mem: str, context: int | None, told: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(mem, context, None)
    assert str(caught.value) == told


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeScore:
    """Everything around the search is fake: no model, no profile file."""
    import kvplan.calibrate.profile
    import kvplan.calibrate.prompts
    import kvplan.loading

    score = FakeScore()
    profile = FakeProfile()
    scoring: Any = ModuleType("kvplan.check.scoring")

    def scorer(
        model: Any, spec: ModelSpec, examples: Any, *, sharing: bool = False, replay_memory: int | None = None
    ) -> SimpleNamespace:
        score.replay_memory, score.sharing = replay_memory, sharing
        return SimpleNamespace(score=score, prepare=score.prepare)

    scoring.Scorer = scorer
    monkeypatch.setitem(sys.modules, "kvplan.check.scoring", scoring)
    monkeypatch.setattr(kvplan.calibrate.profile.Profile, "load", classmethod(lambda cls, path: profile))
    monkeypatch.setattr(kvplan.calibrate.prompts, "load_examples", lambda *args, **options: EXAMPLES)
    monkeypatch.setattr(kvplan.calibrate.prompts, "data_fingerprint", lambda examples: "sha256:search")

    def load_model(model: str | None, *, dtype: str, **options: object) -> tuple[None, None, ModelSpec]:
        return None, None, profile.spec if dtype == "auto" else replace(profile.spec, dtype=dtype)

    monkeypatch.setattr(kvplan.loading, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    return score


def kvplan_search(*argv: str) -> int:
    return kvplan_command("search", *argv)


def kvplan_command(*argv: str) -> int:
    import typer

    from kvplan.cli import search, worker

    app = typer.Typer()
    app.command("search")(search.command)
    app.command("worker")(worker.command)
    return run_app(app, [*argv])


def test_search_writes_a_policy_and_its_journal(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "4") == 0
    policy = load_policy(tmp_path / "policy.yaml")
    assert policy.target == Target(share=4000)
    assert policy.provenance["data"] == "sha256:search"
    assert (tmp_path / "policy.40pct.journal").exists()
    assert [len(prompts) for _, prompts in faked.calls[:4]] == [6] * 4
    assert len(faked.calls[-1][1]) == 3


def test_prompts_that_are_used_twice_are_told(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import kvplan.calibrate.profile
    import kvplan.calibrate.prompts
    from kvplan.calibrate.collect import prompt_hash
    from kvplan.search.seen import KEY, unpacked

    def warnings() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert kvplan_search("--mem", "40%", "--trials", "1") == 0
    assert not [line for line in warnings() if "equal" in line or "calibrated" in line]
    profile = FakeProfile(prompt_hashes=tuple(map(prompt_hash, EXAMPLES[:4])))
    monkeypatch.setattr(kvplan.calibrate.profile.Profile, "load", classmethod(lambda cls, path: profile))
    twins = [*EXAMPLES[:8], SimpleNamespace(**{**vars(EXAMPLES[4]), "id": "twin"})]
    monkeypatch.setattr(kvplan.calibrate.prompts, "load_examples", lambda *args, **options: twins)
    assert kvplan_search("--mem", "40%", "--trials", "1", "-o", "other.yaml") == 0
    told = warnings()
    assert told[0].startswith("warning: 4 of 9 prompts calibrated the profile too,") and told[0].endswith("with --data")
    assert told[1].startswith("warning: 1 of 3 prompts to confirm on equal a prompt to search on, under another id")
    kept = unpacked(load_policy(tmp_path / "other.yaml").provenance[KEY])
    assert kept == {prompt_hash(example)[:8] for example in twins}
    assert kvplan_search("--from-study", "other.40pct.journal", "--mem", "60%", "-o", "third.yaml") == 0
    assert unpacked(load_policy(tmp_path / "third.yaml").provenance[KEY]) == kept


@pytest.mark.parametrize(("given", "handed"), [((), None), (("--replay-memory", "1.5GiB"), 1610612736)])
def test_the_memory_of_captured_prompts_is_bounded(
    faked: FakeScore, given: tuple[str, ...], handed: int | None
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "1", *given) == 0
    assert faked.replay_memory == handed


@pytest.mark.parametrize(("given", "sharing"), [((), True), (("--without", "sharing"), False)])
def test_what_layers_hand_on_is_kept_where_layers_may_share(
    faked: FakeScore, given: tuple[str, ...], sharing: bool
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "1", *given) == 0
    assert faked.sharing is sharing


def test_a_memory_that_is_no_size_is_refused(faked: FakeScore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_search("--mem", "40%", "--replay-memory", "4") == 2
    assert capsys.readouterr().err == "error: '4' is not a size; write for example 512MiB or 1.5GiB\n"


def test_json_is_data_on_stdout(faked: FakeScore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_search("--mem", "96KiB", "--context", "600", "--trials", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["planned"] <= 98304
    assert len(found["trials"]) == 3 and found["winner"]["kl_95"] is None  # of three prompts


def test_every_stage_shows_its_progress_and_stdout_stays_data(
    faked: FakeScore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "3", "--json") == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    lines = [line for line in captured.err.splitlines() if "%" in line]
    trials = [line for line in lines if line.startswith("trial")]
    assert [line.split(":")[0] for line in trials] == ["trial   0", "trial   1", "trial   2"]
    assert trials[0].endswith("of full, knapsack (best so far)")
    stages = [line.split(":")[0] for line in lines if line not in trials]
    assert [name for name, _ in groupby(stages)] == [
        "prefilling prompts",
        "searching",
        "prefilling prompts",
        "confirming",
    ]
    assert [stages.count(name) for name in ("prefilling prompts", "searching", "confirming")] == [2, 3, 3]


@pytest.mark.parametrize(("calls", "prepared", "saved"), [(None, 1, False), (None, 2, True), (5, None, True)])
def test_an_interrupt_in_any_stage_is_one_word(
    faked: FakeScore,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    calls: int | None,
    prepared: int | None,
    saved: bool,
) -> None:
    faked.fail_at, faked.fail_at_prepare = calls, prepared
    assert kvplan_search("--mem", "40%", "--trials", "3") == 130
    captured = capsys.readouterr()
    talk = [line for line in captured.err.splitlines() if "%" not in line]
    kept = ["the best policy so far is in policy.yaml; the same command goes on from policy.40pct.journal"]
    assert captured.out == "" and talk[-1] == "error: interrupted"
    assert [line for line in captured.err.splitlines()[-2:-1] if "best policy" in line] == (kept if saved else [])
    assert (tmp_path / "policy.yaml").exists() == saved


def test_the_table_of_a_resumed_search_has_the_trials_before(
    faked: FakeScore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked.fail_at = 4
    assert kvplan_search("--mem", "40%", "--trials", "6") == 130
    faked.fail_at = None
    shown: list[tuple[int, int]] = []

    @contextmanager
    def stages() -> Iterator[Callable[..., None]]:
        def report(what: str, done: int, total: int, below: Any = None) -> None:
            if what == "searching":
                shown.append((done, below.row_count))

        yield report

    monkeypatch.setattr("kvplan.cli.console.stages", stages)
    monkeypatch.setattr("kvplan.cli.watch.err", SimpleNamespace(is_terminal=True))
    capsys.readouterr()
    assert kvplan_search("--mem", "40%", "--trials", "6") == 0
    first = shown[0][0]
    assert first >= 3 and shown == [(done, min(done, LIVE_ROWS)) for done in range(first, 7)]
    assert f"{first} trials are from earlier runs" in capsys.readouterr().err


def test_the_table_tells_the_candidates_apart(faked: FakeScore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "40") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.startswith("policy "))
    shown = [line[:27].strip() for line in lines[head + 1 :]]
    assert "search" not in shown and any("/" in name for name in shown[:7])
    told = " ".join(lines)
    assert "winner: the smallest KL on the 3 confirmation prompts (first line)" in told


@pytest.mark.parametrize(
    ("evictors", "shared", "told"),
    [
        ("tova tova", 0, "knapsack tova"),
        ("tova tova", 2, "knapsack tova +2"),
        ("profile snapkv", 0, "knapsack profile/snapkv"),
        ("streaming snapkv h2o", 0, "knapsack str/sna/h2o"),
        ("streaming snapkv h2o tova", 2, "knapsack str/sna/h2o/tov +2"),
    ],
)
def test_names_of_found_policies(evictors: str, shared: int, told: str) -> None:
    chosen = tuple(evictors.split())
    params = Params(split="knapsack", scales=(1.0,) * len(chosen), evictors=chosen, shared_layers=shared)
    row = TrialRow(7, SEARCHED, params, Policy(layers=()), None)
    assert name(row) == told
    assert name(replace(row, label="uniform tova")) == "uniform tova"


def test_few_prompts_have_no_interval_and_the_names_are_told(
    faked: FakeScore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "4") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("knapsack  ")]
    assert row.split()[4] == "-" and "[" not in captured.out.partition("policy ")[2]
    assert "knapsack: each layer's slots and methods as the profile predicts them best" in lines
    assert any(line.startswith("95 % -: fewer than 5 prompts") for line in lines)
    assert any("of slots, 40.0% of bytes of a full cache, after a prompt" in line for line in lines)
    talk = captured.err.splitlines()
    assert talk.index("knapsack: each layer's slots and methods as the profile predicts them best") < next(
        i for i, line in enumerate(talk) if line.startswith("trial   0")
    )
    (warning,) = [line for line in talk if line.startswith("warning: only 3 prompts to confirm on")]
    assert warning.endswith("; give 30 prompts or more with --data")
    assert kvplan_search("--mem", "40%", "--trials", "1", "--max-prompts", "12", "-o", "b.yaml") == 0
    assert "only 3 prompts to confirm on" in (told := capsys.readouterr().err)
    assert "; search with --max-prompts 30\n" in told and "with --data" not in told.partition("next")[0]


def test_the_next_commands_have_the_options_of_the_search(faked: FakeScore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "1") == 0
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "next:",
        "  kvplan run --policy policy.yaml --compare 'a prompt'",
        "  kvplan eval --policy policy.yaml",
        "  kvplan check --policy policy.yaml --baseline baseline.json --update",
    ]
    given = ("--model", "my model", "--data", "x.jsonl", "--device", "cuda:1", "-o", "b.yaml")
    assert kvplan_search("--mem", "40%", "--trials", "1", *given) == 0
    told = capsys.readouterr().err.splitlines()[-4:]
    assert told[0] == "next (held-out.jsonl: prompts that no step has seen):"
    options = "--policy b.yaml --model 'my model' --device cuda:1"
    assert told[2] == f"  kvplan eval {options} --data held-out.jsonl"
    assert kvplan_search("--from-study", "b.40pct.journal", "--mem", "60%", "-o", "c.yaml") == 0
    assert "  kvplan eval --policy c.yaml --model 'my model' --data held-out.jsonl" in capsys.readouterr().err


def test_a_plan_that_no_trial_made_has_no_number(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "1") == 0
    capsys.readouterr()
    again = ("--from-study", "policy.40pct.journal", "--mem", "60%", "-o", "c.yaml")
    assert kvplan_search(*again) == 0
    told = capsys.readouterr().out
    assert " -1 " not in told and "trial -: made for this target; no trial of the study had it." in told
    assert "trial" not in load_policy(tmp_path / "c.yaml").provenance["search"]
    assert kvplan_search(*again, "--json") == 0
    assert json.loads(capsys.readouterr().out)["winner"]["trial"] is None


def test_an_interrupted_search_leaves_its_best_and_resumes(faked: FakeScore, tmp_path: Path) -> None:
    faked.fail_at = 4
    assert kvplan_search("--mem", "40%", "--trials", "5") == 130
    assert load_policy(tmp_path / "policy.yaml").provenance["search"]["prompts"] == "search"
    assert kvplan_search("--mem", "40%", "--trials", "5") == 0
    assert load_policy(tmp_path / "policy.yaml").provenance["search"]["prompts"] == "confirmation"
    assert len([prompts for _, prompts in faked.calls if len(prompts) == 6]) == 6


@pytest.mark.parametrize("argv", [("--mem", "3%"), ("--mem", "40%", "--evictor", "nope"), ("--mem", "40%", "-o", ".")])
def test_what_cannot_be_fails_before_any_score(faked: FakeScore, argv: tuple[str, ...]) -> None:
    assert kvplan_search(*argv) == 2
    assert not faked.calls


@pytest.mark.parametrize("what", ["dtype", "kvplan"])
def test_a_search_of_another_dtype_or_version_is_not_resumed(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert kvplan_search("--mem", "40%", "--trials", "3") == 0
    if what == "kvplan":
        monkeypatch.setattr(kvplan, "__version__", "9.9")
    capsys.readouterr()
    assert kvplan_search("--mem", "40%", "--trials", "3", *(("--dtype", "float64") if what == "dtype" else ())) == 2
    assert f"policy.40pct.journal: holds a search that differs in {what};" in capsys.readouterr().err


def test_a_worker_does_the_rest_and_the_search_confirms(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    faked.fail_at = 3
    assert kvplan_search("--mem", "40%", "--trials", "5", "--storage", "s") == 130
    assert kvplan_command("worker", "--storage", "s") == 0
    told = capsys.readouterr().err
    assert "joined study 'kvplan-" in told and "ran 3 of 5 trials; all are done" in told
    assert load_policy(tmp_path / "policy.yaml").provenance["search"]["prompts"] == "search"
    assert kvplan_command("worker", "--storage", "s") == 0
    assert "ran 0 of 5 trials; all are done" in capsys.readouterr().err
    assert kvplan_search("--mem", "40%", "--trials", "5", "--storage", "s") == 0
    assert "5 trials are from earlier runs (s)" in capsys.readouterr().err
    assert load_policy(tmp_path / "policy.yaml").provenance["search"]["prompts"] == "confirmation"


@pytest.mark.parametrize("what", ["kvplan", "dtype", "model", "data"])
def test_a_worker_of_another_version_model_or_data_is_refused(
    faked: FakeScore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import kvplan.calibrate.prompts
    import kvplan.loading

    assert kvplan_search("--mem", "40%", "--trials", "2", "--storage", "s") == 0
    spec = FakeProfile().spec
    if what == "kvplan":
        monkeypatch.setattr(kvplan, "__version__", "9.9")
    elif what == "data":
        monkeypatch.setattr(kvplan.calibrate.prompts, "data_fingerprint", lambda examples: "sha256:other")
    else:
        other = {"dtype": replace(spec, dtype="float32"), "model": replace(spec, fingerprint="sha256:other")}[what]
        monkeypatch.setattr(kvplan.loading, "load_model", lambda *args, **options: (None, None, other))
    calls = len(faked.calls)
    capsys.readouterr()
    assert kvplan_command("worker", "--storage", "s") == 2
    assert re.search(rf"was created with {what} \S+ \(here \S+\)", capsys.readouterr().err)
    assert len(faked.calls) == calls


def test_prompts_are_cut_and_chosen_as_told(faked: FakeScore, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvplan.calibrate.prompts

    told: dict[str, object] = {}

    def load_examples(*args: object, **options: object) -> list[SimpleNamespace]:
        told.update(options)
        return EXAMPLES

    monkeypatch.setattr(kvplan.calibrate.prompts, "load_examples", load_examples)
    argv = ("--max-tokens", "50", "--column", "body", "--split", "test")
    assert kvplan_search("--mem", "40%", "--trials", "1", *argv) == 0
    assert (told["max_tokens"], told["column"], told["split"]) == (50, "body", "test")


def options_of(name: str) -> set[str]:
    import typer

    from kvplan.cli.app import app

    command: Any = typer.main.get_command(app)
    return {option for param in command.commands[name].params for option in param.opts}


@pytest.mark.parametrize(
    ("command", "sources"),
    [
        (
            "calibrate",
            [
                "calibrate/prompts.py",
                "calibrate/examples.py",
                "calibrate/shards.py",
                "calibrate/collect.py",
                "loading.py",
            ],
        ),
        (
            "search",
            [
                "calibrate/prompts.py",
                "calibrate/examples.py",
                "loading.py",
                "search/budget.py",
                "search/journal.py",
                "search/storage.py",
            ],
        ),
        ("run", ["cli/run.py", "calibrate/requests.py", "loading.py", "policy/rules.py"]),
    ],
)
def test_a_command_has_the_options_that_its_errors_suggest(command: str, sources: list[str]) -> None:
    package = Path(kvplan.__file__).parent
    hinted = {hint for source in sources for hint in re.findall(r"--[a-z][a-z-]+", (package / source).read_text())}
    assert hinted <= options_of(command)


def test_the_profile_is_not_written_over(faked: FakeScore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("--profile", "x", "-o", "x"), ("--storage", "x", "-o", "./x")):
        assert kvplan_search("--mem", "40%", *argv) == 2
        assert "x: this command reads that file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [("--seed", "-1"), ("--seed", str(2**32)), ("--context", "9" * 23)])
def test_numbers_out_of_range_are_usage_errors(faked: FakeScore, argv: tuple[str, ...]) -> None:
    assert kvplan_search("--mem", "1GiB", *argv) == 2


def test_the_live_table_shows_the_best_trials_with_interval_and_bytes() -> None:
    def row(number: int, kl: float, repeats: int = 3) -> TrialRow:
        scores = PromptScores((kl, 2 * kl) * repeats, *((1.0,) * 2 * repeats,) * 3)
        params = Params(split="uniform", scales=(1.0,), evictors=("tova",))
        return TrialRow(number, SEARCHED, params, Policy(layers=()), scores, (0.0, kl))

    written = io.StringIO()
    screen = Console(width=80, file=written)
    screen.print(live_table([row(n, (n + 3) % 8 / 10) for n in range(8)], lambda row: row.number / 100))
    lines = written.getvalue().splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["5", "6", "7", "0", "1"]
    assert lines[2].split() == ["uniform", "tova", "6", "0.1500", "[0.1162,", "0.1833]", "6.0%"]
    screen.print(live_table([row(6, 0.1, repeats=2)], lambda row: 0.06))
    last = written.getvalue().splitlines()[-1]
    assert last.split() == ["uniform", "tova", "6", "0.1500", "-", "6.0%"]
