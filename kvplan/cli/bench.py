"""`kvplan bench`: how fast a model decodes under a policy."""

from __future__ import annotations

from typing import Annotated

import typer

from kvplan.cli.console import MAX_SEED, MAX_TOKENS
from kvplan.cli.options import AsJson, Device, PolicyDType, PolicyFile, PolicyModel, TrustRemoteCode


def command(
    policy: PolicyFile,
    model: PolicyModel = None,
    context: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Prompt tokens of a row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens that are decoded and timed.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one that warms up.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random prompt.")] = 0,
    device: Device = "cpu",
    dtype: PolicyDType = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Time decoding under a policy, beside transformers' cache (full, and cut) and a full policy.

    The cut cache holds as many last tokens as the policy's bytes after the prompt are worth; every new one pushes the
    oldest out. A random prompt; the four caches take turns, so that other programs slow all of them alike. On a CPU
    with one thread (OMP_NUM_THREADS=1) the clock is the thread's own CPU time.
    """
    from kvplan.policy.serialize import load_policy

    plan = load_policy(policy)

    from kvplan.cli.run import load_for
    from kvplan.policy.serialize import check_model

    network, _, spec = load_for(policy, plan, model, dtype, device, trust_remote_code)
    check_model(plan, spec)

    from kvplan.check.bench import bench
    from kvplan.cli.console import out, progress

    with progress("decoding", 4 * (repeats + 1)) as advance:
        rows = bench(
            network, plan, spec, context=context, batch=batch, new_tokens=new_tokens, repeats=repeats, seed=seed,
            progress=advance,
        )  # fmt: skip
    if as_json:
        import json

        settings = {"context": context, "batch": batch, "new_tokens": new_tokens, "repeats": repeats}
        typer.echo(json.dumps({**settings, "caches": [row.to_json() for row in rows]}, indent=2))
        return

    from kvplan.report.bench import notes, table

    rounds = f"{repeats} round{'s' if repeats > 1 else ''}"
    title = f"{batch} x {context} tokens, {new_tokens} new; medians of {rounds} (quartiles)"
    out.print(table(rows, title), soft_wrap=True)
    for line in notes(rows):
        out.print(line, soft_wrap=True)
