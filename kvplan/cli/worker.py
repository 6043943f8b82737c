"""`kvplan worker`: add trials to a study, from any host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvplan.cli.options import Device, ReplayMemory, Timeout, TrustRemoteCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplan.search.confirm import TrialRow


def command(
    storage: Annotated[
        str, typer.Option(help="Where the study is: postgresql+psycopg://user@host/database, or a file on this host.")
    ],
    study: Annotated[
        str | None, typer.Option(help="The study's name; a file holds only one.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is on this host.", show_default="as the search was told")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Where the prompts are; may be repeated.", show_default="as the search was told"),
    ] = None,
    timeout: Timeout = None,
    replay_memory: ReplayMemory = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add trials to a study that kvplan search has created, until it has all of them.

    Start as many workers as there are devices; one that is killed loses only its trial. The search confirms the best
    policies and writes the winner.
    """
    from kvplan.cli.console import note, stages
    from kvplan.cli.study_inputs import load_inputs
    from kvplan.search.shared import SharedStudy
    from kvplan.search.storage import open_storage
    from kvplan.units import parse_bytes

    replay_bytes = None if replay_memory is None else parse_bytes(replay_memory)
    with open_storage(storage, note, create=False) as opened:
        shared = SharedStudy.join(opened, study)
        inputs = load_inputs(shared, model, data, device, trust_remote_code)

        from kvplan.check.scoring import Scorer
        from kvplan.search.worker import work

        examples = inputs.examples
        sharing = "sharing" in shared.definition.decisions
        scorer = Scorer(inputs.network, inputs.spec, examples, sharing=sharing, replay_memory=replay_bytes)
        note(f"joined study '{shared.name}' ({opened.where})")
        with stages() as report:

            def prepare(prompts: Sequence[int]) -> None:
                stage = "prefilling prompts"
                report(stage, 0, len(prompts))
                scorer.prepare(prompts, lambda done, total: report(stage, done, total))
                report("searching", 0, shared.total)

            def on_trial(row: TrialRow, best: TrialRow, done: int) -> None:
                report("searching", min(done, shared.total), shared.total, note=f"best KL {best.kl:.4f}")

            worked = work(
                shared,
                inputs.spec,
                scorer.score,
                identity=inputs.known,
                tasks=[example.task for example in examples],
                timeout=timeout,
                on_trial=on_trial,
                prepare=prepare,
                say=note,
            )
    left = worked.total - worked.done
    told = "all are done" if left <= 0 else f"{left} are left; start a worker or the search again"
    note(f"ran {worked.own} of {worked.total} trials; {told}")
