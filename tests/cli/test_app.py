import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import typer
from rich.console import Console

from kvplan import __version__
from kvplan.cli import console
from kvplan.cli.app import app as kvplan_app
from kvplan.cli.exits import hoist, run_app
from kvplan.errors import MemoryPlanExceeded, PolicyError, TargetError


def fake(body: Callable[[], object]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback()
    def options(debug: bool = False, quiet: bool = typer.Option(False, "-q", "--quiet")) -> None:
        console.set_quiet(quiet)

    @app.command()
    def go(count: int = 0) -> None:
        body()

    return app


def raising(error: BaseException) -> typer.Typer:
    def body() -> None:
        raise error

    return fake(body)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    yield
    console.set_quiet(False)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (TargetError("too small"), 2, "error: too small\n"),
        (PolicyError(["one", "two [b]"]), 2, "error: one\nerror: two [b]\n"),
        (MemoryPlanExceeded("5 bytes more"), 1, "error: 5 bytes more\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out.db"), 2, "error: no space left on the disk for out.db"),
        (RuntimeError("database or disk is full"), 2, "error: no space left on the disk;"),
        (RuntimeError("a\nb"), 70, "error: internal error: RuntimeError: a; rerun with --debug for the traceback\n"),
        (MemoryError(), 2, "error: out of memory; give fewer or shorter prompts, smaller batches or a lower --replay"),
        (KeyError(), 70, "error: internal error: KeyError; rerun with --debug"),
        (typer.Exit(1), 1, ""),
    ],
)
def test_failures_have_a_line_and_an_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(raising(error), ["go"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(text) and bool(captured.err) == bool(text)
    assert captured.out == ""


def test_a_long_error_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run_app(raising(TargetError("word " * 200)), ["go"])
    assert capsys.readouterr().err.count("\n") == 1


def test_success_is_zero() -> None:
    assert run_app(fake(lambda: None), ["go"]) == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("search --nope", "kvplan search has no option '--nope'; see kvplan search --help"),
        ("search --trails 3", "kvplan search has no option '--trails'; did you mean '--trials'?"),
        ("serch", "unknown command 'serch'; did you mean 'search'?"),
        ("policy shw", "unknown command 'shw'; did you mean 'show'?"),
        ("zzz", "unknown command 'zzz'; see kvplan --help"),
        ("--nope", "kvplan has no option '--nope'; see kvplan --help"),
        ("run", "kvplan run needs --policy (A policy file); see kvplan run --help"),
        ("policy show", "kvplan policy show needs FILE (A policy file); see kvplan policy show --help"),
        ("search --mem", "option '--mem' requires an argument; see kvplan search --help"),
        ("search --mem 4% --trials x", "--trials x: must be a valid integer; see kvplan search --help"),
        ("bench --policy p --batch 0", "--batch 0: must be greater than or equal to 1; see kvplan bench --help"),
        (
            "policy bytes a b",
            "kvplan policy bytes has no place for 'b'; quote what holds blanks; see kvplan policy bytes --help",
        ),
        (
            "run --policy p where is it",
            "kvplan run has no place for 'is it'; quote what holds blanks; see kvplan run --help",
        ),
        ("doctor --json=1", "option '--json' does not take a value; see kvplan doctor --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(kvplan_app, argv.split()) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")


def test_a_group_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(kvplan_app, ["policy"]) == 2
    assert "validate" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--debug", "go"], ["go", "--debug"]])
def test_debug_shows_the_traceback_on_either_side(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(raising(RuntimeError("boom")), argv) == 70
    assert "Traceback" in capsys.readouterr().err


def test_debug_can_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVPLAN_DEBUG", "1")
    run_app(raising(TargetError("boom")), ["go"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hoisted"),
    [
        ("run -q -- --debug", "-q run -- --debug"),
        ("run --policy p -- -q", "run --policy p -- -q"),
        ("search --debug --mem 40% -q", "--debug -q search --mem 40%"),
        ("search -o -q --mem --debug", "search -o -q --mem --debug"),
        ("search --output=x -q", "-q search --output=x"),
        ("search --json -q", "-q search --json"),
        ("calibrate --no-sensitivity --debug", "--debug calibrate --no-sensitivity"),
        ("profile merge a b -o -- -q", "-q profile merge a b -o --"),
        ("policy bytes a.yaml --context 9 --quiet", "--quiet policy bytes a.yaml --context 9"),
        ("nope --what -q", "-q nope --what"),
    ],
)
def test_only_flags_are_hoisted(argv: str, hoisted: str) -> None:
    assert hoist(argv.split(), typer.main.get_command(kvplan_app)) == hoisted.split()


def test_debug_after_a_double_dash_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def go(text: str) -> None:
        raise RuntimeError(text)

    assert run_app(app, ["--", "--debug"]) == 70
    assert "Traceback" not in capsys.readouterr().err


def test_quiet_keeps_errors_and_drops_talk(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        console.note("talk")
        console.out.print("data")
        with console.progress("work", 2) as advance:
            advance(2)
        console.warn("careful")

    assert run_app(fake(body), ["go", "-q"]) == 0
    assert capsys.readouterr() == ("data\n", "warning: careful\n")


def test_progress_off_a_terminal_is_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("search", 40) as advance:
        for _ in range(40):
            advance(note="best 0.1")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"search: 4/40 \(10%, \d+s, best 0\.1\)", lines[0])
    assert lines[-1].startswith("search: 40/40 (100%")


def test_stages_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stages() as report:
        for what, total in (("first", 2), ("second", 1), ("first", 1)):
            for done in range(total + 1):
                report(what, done, total, note="x" * done)
    told = [re.sub(r"\d+s", "0s", line) for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "first: 1/2 (50%, 0s, x)",
        "first: 2/2 (100%, 0s, xx)",
        "second: 1/1 (100%, 0s, x)",
        "first: 1/1 (100%, 0s, x)",
    ]


def test_stages_on_a_terminal_are_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=stream, force_terminal=True, width=80))
    with suppress(KeyboardInterrupt), console.stages() as report:
        report("first", 1, 1)
        report("second", 1, 2)
        raise KeyboardInterrupt
    assert not console.err._live_stack  # the last bar has been closed
    assert stream.getvalue().index("first") < stream.getvalue().index("second")


def test_talk_is_wrapped_on_a_terminal_and_commands_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=stream, force_terminal=True, no_color=True, width=40))
    console.note("words " * 12 + "/a/path-that-is-longer/than-the-terminal-is-wide.yaml")
    console.warn("words " * 12)
    console.note_command("kvplan run --policy a-long-name.yaml 'a prompt'")
    lines = stream.getvalue().splitlines()
    assert "  kvplan run --policy a-long-name.yaml 'a prompt'" in lines
    assert "  /a/path-that-is-longer/than-the-terminal-is-wide.yaml" in lines
    assert [line for line in lines if len(line) > 40 and "/" not in line and "kvplan" not in line] == []


SCRIPT = """
import sys, time, typer
from kvplan.cli import console
from kvplan.cli.exits import run_app
app = typer.Typer()
@app.command()
def go() -> None:
    {body}
sys.exit(run_app(app, []))
"""


SLOW_TO_END = """
import atexit, signal, threading, time
from kvplan.cli.exits import leave
def end(seconds):
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.01)
    print("ending", flush=True)
    time.sleep(seconds)
{slow}
leave(130)
"""


def start(body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_one_word(number: int, code: int) -> None:
    process = start("print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "error: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("slow", ["threading.Thread(target=end, args=[60]).start()", "atexit.register(end, 0.5)"])
def test_a_second_interrupt_during_the_shutdown_has_the_same_code(slow: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_TO_END.format(slow=slow)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@pytest.mark.parametrize("write", ["console.out.print('x' * 1000)", "sys.stdout.write('x' * 1000 + '\\\\n')"])
def test_a_reader_that_goes_away_is_no_error(write: str) -> None:
    process = start(f"[{write} for _ in range(100000)]".replace("\\\\n", "\\n"))
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=20) in (1, 141)
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_help_is_light() -> None:
    code = (
        "import sys\n"
        "from kvplan.cli.app import app\n"
        "from kvplan.cli.exits import run_app\n"
        "code = run_app(app, ['--help'])\n"
        "heavy = {'torch', 'transformers', 'optuna', 'datasets', 'scipy', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy or code else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("calibrate", "search", "run", "policy", "profile"):
        assert command in done.stdout


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kvplan", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 2  # about 0.3 s alone; the limit is for a busy machine


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "kvplan", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kvplan {__version__}\n"


def test_importing_kvplan_is_light() -> None:
    code = "import sys, kvplan; sys.exit(bool({'torch', 'transformers', 'typer', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import kvplan

    with pytest.raises(AttributeError, match="nothing"):
        kvplan.nothing  # noqa: B018


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_failure(closed: str) -> None:
    command = f'"{sys.executable}" -m kvplan policy schema {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_that_a_library_swallowed_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise PolicyError("could not import") from None

    assert run_app(fake(body), ["go"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
