"""What to type after a search, with the options that led to its policy."""

from __future__ import annotations

import shlex
from pathlib import Path

from kvplan.cli.console import note, note_command

HELD_OUT = "held-out.jsonl"


def commands(policy: Path, *, model: str | None, data: bool, device: str, trust_remote_code: bool) -> list[str]:
    """Run the policy, measure it, hold it to what was measured.

    Args:
        data: The search had prompts of its own, so judging takes others.
    """
    given = ["--policy", str(policy)]
    given += ["--model", model] if model is not None else []
    given += ["--device", device] if device != "cpu" else []
    given += ["--trust-remote-code"] if trust_remote_code else []
    prompts = ["--data", HELD_OUT] if data or model is not None else []
    steps = (
        ["run", *given, "--compare", "a prompt"],
        ["eval", *given, *prompts],
        ["check", *given, *prompts, "--baseline", "baseline.json", "--update"],
    )
    return [shlex.join(["kvplan", *step]) for step in steps]


def tell(found: list[str]) -> None:
    """The commands on stderr, one a line and never broken, to be copied."""
    fresh = f" ({HELD_OUT}: prompts that no step has seen)" if any(HELD_OUT in command for command in found) else ""
    note(f"next{fresh}:")
    for command in found:
        note_command(command)
