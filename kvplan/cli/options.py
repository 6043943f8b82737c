"""Options that several commands share, each spelled and told once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# The model, and where it runs.
PolicyModel = Annotated[
    str | None, typer.Option(help="A folder or a hub id.", show_default="the policy's, or the bundled one")
]
PoliciesModel = Annotated[
    str | None, typer.Option(help="A folder or a hub id.", show_default="the first policy's, or the bundled one")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... auto: split over all GPUs.")]
OneDevice = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
PolicyDType = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="the policy's")
]
PoliciesDType = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="the first policy's")
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the model.")]

# Policies.
PolicyFile = Annotated[Path, typer.Option(help="A policy file.")]
PolicyFiles = Annotated[list[Path] | None, typer.Option(help="A policy file; may be repeated.", show_default=False)]

# Prompts of files and datasets.
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Most tokens of a prompt.", show_default="the context")]
LastTokens = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of a prompt; the last are kept.", show_default="the context")
]
Column = Annotated[str | None, typer.Option(help="The column with text, in a dataset.", show_default="text")]
Split = Annotated[str | None, typer.Option(help="The split of a dataset.", show_default=False)]

# Prompts to judge on.
Tasks = Annotated[list[str] | None, typer.Option(help="A generated task, or all; may be repeated.", show_default=False)]
Suites = Annotated[
    list[str] | None,
    typer.Option(help="A public suite: NAME:FILE, or NAME from the hub; may be repeated.", show_default=False),
]
TaskContexts = Annotated[
    list[str] | None,
    typer.Option(
        help="With --task: tokens of a prompt with its answers, as 32k; may be repeated.",
        show_default="4k, or what the model reads",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Cases of each task and length, and of each suite.")]
Question = Annotated[
    str, typer.Option(help="With --task and --suite: cut before the question is known (agnostic), after, or both.")
]
ScorerName = Annotated[
    str | None, typer.Option(help="Judges all answers.", show_default="each prompt's own, or predicted")
]

# The work, and what is printed.
ReplayMemory = Annotated[
    str | None,
    typer.Option(
        help="Most memory for prefilled prompts, such as 4GiB; the rest lies in temporary files (TMPDIR).",
        show_default="half of what is free",
    ),
]
Timeout = Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial starts.", show_default="none")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
