"""`kvplan report`, from files to files."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from report_fakes import policy, results

from kvplan.check.results import save_results
from kvplan.cli.app import app
from kvplan.errors import KVPlanError, MethodError
from kvplan.policy.serialize import save_policy


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    save_policy(policy(), "policy.yaml")
    save_results(results(), "results.json")
    return ["policy.yaml", "results.json"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments])
    if result.exception:
        raise result.exception
    return result.stdout


def test_a_report_of_files_alone(files: list[str]) -> None:
    told = run(*files, "--no-sample")
    assert "Quality against memory" in told and "Which tokens stay" not in told
    page = Path("report.html").read_text(encoding="utf-8")
    assert 'id="pareto"' in page and 'id="budgets"' in page and "needs a profile" in page


def test_the_kept_tokens_of_a_prompt_on_the_bundled_model(tmp_path: Path) -> None:
    bundled = Path(__file__).parents[2] / "policies" / "bundled" / "25pct.yaml"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The code of the red chest is 4711. " * 20)
    target = tmp_path / "kept.csv"
    run(
        str(bundled), "--plot", "kept", "--data", "--prompt-file", str(prompt), "--max-tokens", "150", "-o", str(target)
    )
    rows = list(csv.DictReader(io.StringIO(target.read_text(encoding="utf-8"))))
    assert len(rows) == 150
    assert "The code of the red chest is 4711." in "".join(row["token"] for row in rows)
    # The first and the last tokens are protected in every layer.
    assert {rows[i]["layers"] for i in (0, 1, 2, 3, -2, -1)} == {"8.0"}
    assert any(float(row["layers"]) < 8 for row in rows)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_one_picture(files: list[str], suffix: str) -> None:
    assert run(*files, "--plot", "pareto", "-o", f"p.{suffix}") == ""
    assert Path(f"p.{suffix}").stat().st_size > 5000


def test_a_picture_goes_to_a_file_of_its_name(files: list[str]) -> None:
    run(*files, "--plot", "bytes", "--no-sample")
    assert Path("bytes.svg").is_file()


def test_numbers_go_to_standard_output(files: list[str]) -> None:
    rows = list(csv.reader(io.StringIO(run(*files, "--plot", "budgets", "--data", "--context", "1000"))))
    assert rows[0][:3] == ["layer", "tokens", "share"]
    assert len(rows) == 9 and rows[2][1] == "100.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data"], "name it with --plot"),
        (["--plot", "pareto", "-o", "p.pdf"], r"p.pdf: pictures are written as .svg or .png"),
        (["--plot", "history"], "'history' cannot be drawn from these files: it needs a search's journal"),
        (["--prompt-file", "x.txt", "--no-sample"], "--prompt-file is for the kept tokens of a policy"),
        (["--model", "no/such/folder"], "no/such/folder: .*; --no-sample makes the report without the model"),
        (["--study", "mine"], "say with --storage where"),
        (["--storage", "none.journal"], "none.journal: no such file"),
        (["-o", "results.json"], "this command reads that file"),
    ],
)
def test_what_cannot_be_is_said(files: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(KVPlanError, match=message):
        run(*files, *arguments)


def test_nothing_to_report_on_is_said() -> None:
    with pytest.raises(KVPlanError, match="nothing to report on; name a profile"):
        run()


def test_an_unknown_picture_is_refused_before_anything_runs(files: list[str]) -> None:
    with pytest.raises(MethodError, match="unknown picture 'budget'; did you mean 'budgets'"):
        run(*files, "--plot", "budget")


def test_without_matplotlib_numbers_still_come_and_pictures_say_what_is_missing(files: list[str]) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['kvplan', 'report', 'policy.yaml', '--no-sample', "
        "*sys.argv[1:]]; from kvplan.cli.app import main; main()"
    )

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    assert start("--plot", "budgets", "--data").stdout.startswith("layer,tokens,share")
    failed = start()
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines() == [
        "error: pictures are drawn by matplotlib, which is not installed: pip install matplotlib jinja2"
    ]
