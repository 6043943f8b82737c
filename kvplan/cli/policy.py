"""`kvplan policy`: look at policy files, check and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplan.cli.config import Command

if TYPE_CHECKING:
    from kvplan.policy.memory import BytesPlan
    from kvplan.policy.schema import Policy

CONTEXT = 1024  # prompt tokens, unless told

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, check and compare policy files.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]
Context = Annotated[int, typer.Option("--context", min=1, help="Prompt tokens of every row.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens appended after the prompt.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print(renderable: Any) -> None:
    from kvplan.cli.console import out

    out.print(renderable, soft_wrap=True)


def _print_json(data: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(data, indent=2))


def _plan(policy: Policy, context: int, new_tokens: int, batch: int) -> BytesPlan:
    from kvplan.policy.memory import plan, stated_spec
    from kvplan.policy.rules import check_model

    spec = stated_spec(policy)
    check_model(policy, spec)
    return plan(policy, spec, [context] * batch, new_tokens)


def _where(context: int, new_tokens: int, batch: int) -> str:
    rows = f"{batch} row{'s' if batch > 1 else ''}"
    return f"for {rows} of {context} prompt + {new_tokens} new tokens"


@app.command(cls=Command)
def show(
    file: File,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Prompt tokens.", show_default=f"the planned ones, or {CONTEXT}"),
    ] = None,
) -> None:
    """Draw how many slots each layer holds, who chooses them, and the share of bytes in all."""
    from kvplan.errors import KVPlanError
    from kvplan.policy.serialize import load_policy
    from kvplan.report.policy import picture

    policy = load_policy(file)
    tokens = context or _planned_tokens(policy) or CONTEXT
    try:
        held = _plan(policy, tokens, 0, 1).ratio
    except KVPlanError:  # the file does not say the model's shape
        held = None
    _print(picture(policy, tokens, held))


def _planned_tokens(policy: Policy) -> int | None:
    """The prompt that the policy was planned for, where its provenance states one."""
    planned = policy.provenance.get("planned")
    tokens = planned.get("prompt_tokens") if isinstance(planned, Mapping) else None
    return tokens if type(tokens) is int and tokens > 0 else None


@app.command(cls=Command)
def validate(files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Policy files.")]) -> None:
    """Check policy files; every problem in every file is reported."""
    from kvplan.errors import KVPlanError, PolicyError
    from kvplan.policy.serialize import load_policy

    problems: list[str] = []
    for file in files:
        try:
            load_policy(file)
        except PolicyError as error:
            problems += error.problems
        except KVPlanError as error:
            problems.append(str(error))
        else:
            typer.echo(f"{file}: ok")
    if problems:
        raise PolicyError(problems)


@app.command(cls=Command)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A policy file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    context: Context = CONTEXT,
    new_tokens: NewTokens = 0,
    batch: Batch = 1,
    as_json: AsJson = False,
) -> None:
    """Compare two policies by their layers: settings, slots and bytes."""
    from dataclasses import asdict

    from kvplan.policy.serialize import load_policy
    from kvplan.report import policy as report

    first, second = load_policy(a), load_policy(b)
    plan_a, plan_b = (_plan(policy, context, new_tokens, batch) for policy in (first, second))
    found = report.changes(first, second, plan_a, plan_b)
    if as_json:
        _print_json({"changes": [asdict(change) for change in found], "total": [plan_a.total, plan_b.total]})
    else:
        _print(report.diff(found, plan_a, plan_b, _where(context, new_tokens, batch)))


@app.command("bytes", cls=Command)
def bytes_(
    file: File, context: Context = CONTEXT, new_tokens: NewTokens = 0, batch: Batch = 1, as_json: AsJson = False
) -> None:
    """Print the exact bytes that the policy holds, by layer and kind."""
    from dataclasses import asdict

    from kvplan.policy.serialize import load_policy
    from kvplan.report.policy import byte_table

    held = _plan(load_policy(file), context, new_tokens, batch)
    if not as_json:
        _print(byte_table(held, _where(context, new_tokens, batch)))
        return
    rows = zip(held.layers, held.slots, strict=True)
    layers = [{"layer": i, "slots": n, **asdict(row), "total": row.total} for i, (row, n) in enumerate(rows)]
    _print_json(
        {
            "context_tokens": context,
            "new_tokens": new_tokens,
            "batch": batch,
            "layers": layers,
            "total": held.total,
            "full": held.full,
            "ratio": held.ratio,
            "min_slots_binds": list(held.min_slots_binds),
        }
    )


@app.command("from-front", cls=Command)
def from_front(
    front: Annotated[Path, typer.Argument(metavar="FRONT", help="What kvplan search --pareto wrote: x.front.json.")],
    mem: Annotated[str, typer.Option(help="Most bytes, as a share of the full cache: 25% or 0.25.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the policy.")] = Path("policy.yaml"),
) -> None:
    """Write the best plan of a front that holds at most --mem as a policy; nothing is run."""
    from kvplan.cli.console import note
    from kvplan.files import check_writable
    from kvplan.policy.serialize import save_policy
    from kvplan.search.front_file import choose, load_front
    from kvplan.units import parse_share

    share = parse_share(mem)
    check_writable(output, [front])
    point, policy = choose(load_front(front), share, str(front))
    save_policy(policy, output)
    note(f"wrote {output}: {point.share:.2%} of the full cache, KL {point.kl:.4f} on the confirmation prompts")


@app.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from kvplan.policy.json_schema import json_schema

    _print_json(json_schema())
