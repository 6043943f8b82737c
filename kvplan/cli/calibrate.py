"""`kvplan calibrate`: measure a model on prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvplan.cli.console import MAX_SEED
from kvplan.cli.options import AsJson, Column, Device, DType, MaxTokens, ReplayMemory, Split, TrustRemoteCode


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A folder or a hub id; without it, the bundled model.", show_default=False
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A .jsonl or .txt file, or a dataset; may be repeated. Without it, the bundled prompts.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile.")] = Path("profile.json"),
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Most prompts.", show_default="all")] = None,
    max_tokens: MaxTokens = None,
    column: Column = None,
    split: Split = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 4,
    sinks: Annotated[int, typer.Option(min=1, help="First tokens of a prompt that count as attention sinks.")] = 4,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="Cut each layer alone and see what it costs.")
    ] = True,
    evictor: Annotated[
        list[str] | None,
        typer.Option(
            help="An evictor to cut layers by; may be repeated. Each costs as much time as the next.",
            show_default="snapkv, knorm, h2o, tova, streaming, expected, keydiff",
        ),
    ] = None,
    sensitivity_prompts: Annotated[int, typer.Option(min=1, help="Prompts for that, from the tasks in turn.")] = 12,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Measure the I-th of N parts of the prompts; kvplan profile merge joins them.",
            show_default="all",
        ),
    ] = None,
    replay_memory: ReplayMemory = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Draws the rows of a dataset.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on prompts and write a profile: what each layer's attention does, and what cutting it costs."""
    import json
    import platform
    import time
    from dataclasses import replace

    from kvplan.calibrate.shards import Shard
    from kvplan.files import check_writable
    from kvplan.units import parse_bytes

    replay_bytes = None if replay_memory is None else parse_bytes(replay_memory)
    check_writable(output, data or ())
    part = Shard.parse(shard) if shard else Shard(1, 1)

    import torch
    import transformers

    from kvplan import __version__
    from kvplan.calibrate.collect import collect
    from kvplan.calibrate.profile import Profile
    from kvplan.calibrate.prompts import load_examples
    from kvplan.calibrate.sensitivity import EVICTORS, SHARES, measure, num_replays, stratified
    from kvplan.cli.console import note, out, progress, warn
    from kvplan.demo.data import calib_data_path
    from kvplan.loading import load_model
    from kvplan.methods.evictors import Signal
    from kvplan.methods.evictors import evictors as known_evictors
    from kvplan.report.profile import table
    from kvplan.runtime.rotary import unknown_rotation

    evictors = tuple(dict.fromkeys(evictor or EVICTORS))
    for name in evictors:
        known_evictors[name]  # an unknown name is better told before the work than after it
    torch.manual_seed(seed)
    start = time.perf_counter()
    network, tokenizer, spec = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if not evictor and (blind := unknown_rotation(network, spec)):
        left_out = [name for name in evictors if Signal.ROTATION in known_evictors[name].needs]
        evictors = tuple(name for name in evictors if name not in left_out)
        warn(f"how layers {blind} of this model rotate queries is not known: not measured: {', '.join(left_out)}")
    if model is not None and not data:
        warn("no --data: using the prompts of the bundled model, whose world this model may not know")
    examples = load_examples(
        data or [calib_data_path()],
        tokenizer,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        context_limit=spec.max_context_tokens,
        column=column,
        split=split,
        seed=seed,
    )
    loading = time.perf_counter() - start
    chosen = [examples[i] for i in stratified(examples, sensitivity_prompts)] if sensitivity else []
    chosen, examples = part.of(chosen, "prompts for sensitivity"), part.of(examples, "prompts")
    with progress("calibrating", len(examples)) as advance:
        statistics = collect(network, examples, batch_size=batch_size, sinks=sinks, progress=_steps(advance))
    statistics = replace(
        statistics,
        settings={**statistics.settings, "max_tokens": max_tokens},
        seconds={"load": loading, **statistics.seconds},
    )
    sums = None
    if sensitivity:
        from kvplan.check.scoring import Scorer

        if not chosen:
            warn("no prompt has a continuation, so sensitivity is not measured")
        else:
            start = time.perf_counter()
            scorer = Scorer(network, spec, chosen, replay_memory=replay_bytes)
            with progress("sensitivity", num_replays(spec, len(evictors) * len(SHARES))) as advance:
                sums = measure(scorer.score, spec, len(chosen), evictors=evictors, progress=_steps(advance))
            sums = replace(sums, seconds=time.perf_counter() - start)
    versions = {
        "kvplan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    profile = Profile(spec, statistics, sums, {"seed": seed}, versions)
    profile.save(output)
    if as_json:
        typer.echo(json.dumps(profile.summary(), indent=2))
    else:
        out.print(table(profile), soft_wrap=True)
    note(f"wrote {output}")


def _steps(advance: Callable[..., None]) -> Callable[[int, int], None]:
    """From counts so far to steps."""
    last = 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return progress
