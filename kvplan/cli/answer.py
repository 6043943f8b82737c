"""`kvplan search --from-study`: another memory target, without new trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kvplan.policy.schema import Target


def answer_from(
    address: str,
    name: str | None,
    target: Target,
    output: Path,
    model: str | None,
    data: list[str] | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Load what the study was created with, choose a policy for the target, write it, and say how far off it may be."""
    import json

    from kvplan.cli.console import note, out, stages
    from kvplan.cli.next_steps import commands, tell
    from kvplan.cli.prompt_warnings import warn_of_few
    from kvplan.cli.study_inputs import found_on, load_inputs
    from kvplan.files import check_writable
    from kvplan.policy.serialize import save_policy
    from kvplan.report.policy import picture
    from kvplan.report.search import as_data, distance, summary
    from kvplan.search.shared import SharedStudy
    from kvplan.search.storage import open_storage

    check_writable(output, [address, *(data or [])])
    with open_storage(address, note, create=False) as opened:
        shared = SharedStudy.join(opened, name)
        inputs = load_inputs(shared, model, data, device, trust_remote_code)
        asked = shared.definition
        named = model or asked.inputs["model"]

        from kvplan.check.scoring import Scorer
        from kvplan.search.answer import answer
        from kvplan.search.confirm import hold_out
        from kvplan.search.seen import unpacked

        tasks = [example.task for example in inputs.examples]
        confirm_prompts = hold_out(tasks)[1]
        warn_of_few(len(confirm_prompts), asked.inputs["max_prompts"])
        scorer = Scorer(inputs.network, inputs.spec, inputs.examples)
        with stages() as report:
            scorer.prepare(confirm_prompts, lambda done, total: report("prefilling prompts", done, total))
            found = answer(
                shared,
                inputs.spec,
                target,
                scorer.score,
                confirm_prompts,
                tasks=tasks,
                seed=asked.seed,
                on_confirm=lambda done, total: report("confirming", done, total),
                provenance=found_on(
                    inputs,
                    asked.profile.data_fingerprint,
                    unpacked(asked.profile.prompt_hashes),
                    named,
                    {"study": shared.name},
                ),
            )
    result = found.result
    save_policy(result.policy, output)
    if as_json:
        gap = found.gap
        told = None if gap is None else gap.stated(len(confirm_prompts))
        typer.echo(json.dumps({**as_data(result), "at_most_off_by": told}, indent=2, allow_nan=False))
    else:
        out.print(picture(result.policy, result.context_tokens, result.bytes.ratio), soft_wrap=True)
        out.print(summary(result), soft_wrap=True)
        out.print(distance(found), soft_wrap=True)
    note(f"wrote {output}")
    has_data = bool(data or asked.inputs["data"])
    tell(commands(output, model=named, data=has_data, device=device, trust_remote_code=trust_remote_code))
