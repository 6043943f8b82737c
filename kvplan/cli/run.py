"""`kvplan run`: generate under a policy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.console import MAX_SEED
from kvplan.cli.options import Device, PolicyDType, PolicyFile, PolicyModel, TrustRemoteCode

if TYPE_CHECKING:
    from kvplan.calibrate.records import Record
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Policy
    from kvplan.runtime.generation import Generated

DEFAULT_NEW_TOKENS = 64
LEAST_TEMPERATURE = 1e-6  # below, the scores divided by it overflow


@dataclass(frozen=True)
class _Request:
    """A prompt as tokens, ready to run."""

    record: Record
    ids: list[int]
    max_new_tokens: int


def command(
    policy: PolicyFile,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - is standard input.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with the prompt; - is standard input.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A .jsonl file of prompts.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --data: where to write JSON lines.", show_default=False)
    ] = None,
    model: PolicyModel = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most new tokens of a prompt.", show_default=f"the record's, or {DEFAULT_NEW_TOKENS}"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: prompts that run together.")] = 8,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run the full cache and show the difference.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is made.")] = False,
    device: Device = "cpu",
    dtype: PolicyDType = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a prompt instead of the text.")] = False,
) -> None:
    """Generate text under a policy. The text goes to stdout, what it cost to stderr."""
    _check_options(prompt, prompt_file, data, output, stream, as_json, temperature)

    from kvplan.files import check_writable
    from kvplan.policy.serialize import load_policy

    plan = load_policy(policy)
    records = _read(prompt, prompt_file, data)
    if output is not None:
        check_writable(output, [policy, data])

    network, tokenizer, spec = load_for(policy, plan, model, dtype, device, trust_remote_code)
    requests = _requests(records, network, tokenizer, spec, max_new_tokens)

    from kvplan.cli.console import progress
    from kvplan.runtime.attach import attach, full_policy
    from kvplan.runtime.generation import generate

    def run(used: Policy, streamer: Any, advance: Callable[..., None]) -> list[Generated]:
        found: dict[int, Generated] = {}
        with attach(network, used, spec) as runtime:
            for number, group in enumerate(_batches(requests, batch_size)):
                rows = generate(
                    runtime,
                    tokenizer,
                    [requests[i].ids for i in group],
                    max_new_tokens=requests[group[0]].max_new_tokens,
                    temperature=temperature,
                    seed=seed + number,
                    streamer=streamer,
                )
                found.update(zip(group, rows, strict=True))
                advance(len(group))
        return [found[i] for i in range(len(requests))]

    def run_both(advance: Callable[..., None]) -> tuple[list[Generated], list[Generated] | None]:
        mine = run(plan, _streamer(tokenizer) if stream else None, advance)
        return mine, run(full_policy(network), None, advance) if compare else None

    if data is None:
        mine, full = run_both(lambda steps: None)
    else:
        with progress("running", len(requests) * (2 if compare else 1)) as advance:
            mine, full = run_both(advance)
    _emit(requests, mine, full, output, as_json=as_json, printed=stream, named=data is not None)
    _talk(plan, mine, full)


def _check_options(
    prompt: str | None,
    prompt_file: Path | None,
    data: Path | None,
    output: Path | None,
    stream: bool,
    as_json: bool,
    temperature: float,
) -> None:
    from math import isfinite

    from kvplan.errors import DataError, KVPlanError

    given = {"PROMPT": prompt, "--prompt-file": prompt_file, "--data": data}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise DataError(f"{' and '.join(sources)} both give prompts; keep one")
    if output is not None and data is None:
        raise KVPlanError("-o goes with --data; the text of a single prompt goes to stdout")
    if stream and (as_json or data is not None):
        raise KVPlanError(f"--stream prints the text of one prompt; leave out {'--json' if as_json else '--data'}")
    if not isfinite(temperature):
        raise KVPlanError(f"--temperature {temperature} is not a temperature; write for example 0.7")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise KVPlanError(f"--temperature {temperature} is too small; 0 takes the likeliest token")


def _read(prompt: str | None, prompt_file: Path | None, data: Path | None) -> list[Record]:
    """The records to run: those of --data, or one made of the prompt."""
    from kvplan.calibrate.records import Record, check_text, read_records
    from kvplan.errors import DataError
    from kvplan.files import read_text

    if data is not None:
        return read_records(data)
    where = "the prompt"
    if prompt is None or prompt == "-":
        if prompt_file is None or str(prompt_file) == "-":
            where, prompt = "standard input", _read_stdin(asked="-" in (prompt, str(prompt_file)))
        else:
            where, prompt = str(prompt_file), read_text(prompt_file, "prompt")
        # The end of the last line is the file's, not the prompt's.
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt.strip():
        raise DataError(f"{where}: the prompt is empty")
    check_text(prompt, where)
    return [Record(id="prompt", task="prompt", where=where, prompt=prompt)]


def _read_stdin(asked: bool) -> str:
    """All of standard input; what is typed at a terminal only where that was asked for."""
    from kvplan.cli.console import note
    from kvplan.errors import DataError

    if sys.stdin is None or (sys.stdin.isatty() and not asked):
        raise DataError("no prompt; give it as an argument, with --prompt-file, with --data or on standard input")
    if sys.stdin.isatty():
        note("type the prompt; Ctrl-D on a line of its own ends it")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError("standard input: not UTF-8 text") from error


def load_for(
    path: Path, policy: Policy, model: str | None, dtype: str | None, device: str, trust_remote_code: bool
) -> tuple[Any, Any, ModelSpec]:
    """The model to run: the one that was named, or that the policy names, or the bundled one if it is the policy's."""
    from kvplan.errors import ModelError, PolicyError
    from kvplan.loading import load_model
    from kvplan.policy.serialize import check_model

    told = [policy.provenance.get("model"), policy.model.get("name")]
    named = next((name for name in told if isinstance(name, str)), None)
    dtype = dtype or str(policy.model.get("dtype", "auto"))
    try:
        network, tokenizer, spec = load_model(
            model or named, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    except ModelError as error:
        if model is None and named is not None and str(error).startswith(named):
            raise ModelError(f"{error}; the policy names this model, --model takes another") from error
        raise
    wanted = policy.model.get("fingerprint")
    if model is None and wanted is not None and wanted != spec.fingerprint:
        this = named or "the bundled one"
        kind = f"{policy.model.get('type', 'unknown type')}, {len(policy.layers)} layers, {wanted}"
        raise ModelError(
            f"{path}: made for another model ({kind}) than {this} ({spec.fingerprint}); give it with --model"
        )
    try:
        check_model(policy, spec)
    except PolicyError as error:
        raise PolicyError([f"{path}: {line}" for line in str(error).splitlines()]) from error
    return network, tokenizer, spec


def _requests(
    records: Sequence[Record], network: Any, tokenizer: Any, spec: ModelSpec, max_new_tokens: int | None
) -> list[_Request]:
    from kvplan.calibrate.requests import request_ids
    from kvplan.loading import check_tokens

    requests = []
    for record in records:
        request = _Request(
            record, request_ids(record, tokenizer), max_new_tokens or record.max_new_tokens or DEFAULT_NEW_TOKENS
        )
        check_tokens(network, request.ids, record.where)
        _check_length(request, spec.max_context_tokens)
        requests.append(request)
    return requests


def _check_length(request: _Request, limit: int | None) -> None:
    from kvplan.errors import DataError

    length, new = len(request.ids), request.max_new_tokens
    if limit is None or length + new <= limit:
        return
    text = f"{request.record.where}: {length} prompt + {new} new tokens, but the model's context is {limit}"
    if length < limit:
        raise DataError(f"{text}; shorten the prompt, or give --max-new-tokens {limit - length}")
    raise DataError(f"{text}; shorten the prompt by {length + new - limit} tokens")


def _batches(requests: Sequence[_Request], batch_size: int) -> list[list[int]]:
    """Indices of requests that run together: equal in new tokens and, to save padding, near in length."""
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].ids)):
        groups.setdefault(requests[i].max_new_tokens, []).append(i)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _emit(
    requests: Sequence[_Request],
    mine: Sequence[Generated],
    full: Sequence[Generated] | None,
    output: Path | None,
    *,
    as_json: bool,
    printed: bool,
    named: bool,
) -> None:
    """Texts or JSON to stdout, JSON lines to the output file."""
    import json

    from kvplan.calibrate.requests import expected_answer
    from kvplan.files import write_text
    from kvplan.runtime.generation import first_difference

    objects = []
    for i, (request, row) in enumerate(zip(requests, mine, strict=True)):
        found: dict[str, Any] = {}
        if named:
            found = {"id": request.record.id, "task": request.record.task}
            answer = expected_answer(request.record)
            if answer is not None:
                found["answer"] = answer
        found.update(row.to_json())
        if full is not None:
            place = first_difference(row, full[i])
            found.update(full=full[i].to_json(), same_text=row.text == full[i].text, first_difference=place)
        objects.append(found)
    if output is not None:
        lines = [json.dumps(found, ensure_ascii=False, allow_nan=False) for found in objects]
        write_text(output, "\n".join(lines) + "\n")
    if as_json:
        for found in objects:
            typer.echo(json.dumps(found, allow_nan=False))
    elif output is None and not printed:
        for request, row in zip(requests, mine, strict=True):
            if named:
                typer.echo(f"== {request.record.id}", err=True)
            typer.echo(row.text)


def _talk(policy: Policy, mine: Sequence[Generated], full: Sequence[Generated] | None) -> None:
    from kvplan.cli.console import note
    from kvplan.report.run import comparison, floor_note, room_note, summary

    if full is None:
        lines = [summary(mine), room_note(mine)]
    else:
        lines = [*comparison(list(zip(mine, full, strict=True)))]
    for line in [*lines, floor_note(policy, mine)]:
        if line is not None:
            note(line)
