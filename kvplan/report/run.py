"""What `kvplan run` says about memory and speed: a line a run."""

from __future__ import annotations

from collections.abc import Sequence

from kvplan.model_spec import layer_ranges
from kvplan.policy.schema import Policy
from kvplan.runtime.generation import Generated, first_difference
from kvplan.units import format_bytes


def summary(rows: Sequence[Generated]) -> str:
    """Bytes against the plan and the full cache, tokens, and speed; sums over the prompts, where there are several."""
    held, planned, full = (sum(getattr(row, name) for row in rows) for name in _BYTES)
    peak = max(row.peak_kv_bytes for row in rows)
    several = len(rows) > 1
    highest = f"{'peak of a batch' if several else 'peak'} {format_bytes(peak)}"
    parts = [
        f"{f'{len(rows)} prompts: ' if several else ''}KV cache {format_bytes(held)} = {held / full:.1%} of full "
        f"{format_bytes(full)} (planned {format_bytes(planned)}, {highest})",
        f"{'prompts' if several else 'prompt'} {sum(row.prompt_tokens for row in rows)} + "
        f"{sum(row.new_tokens for row in rows)} tokens",
        _speed(rows),
    ]
    return " | ".join(parts)


_BYTES = ("kv_bytes", "kv_bytes_planned", "kv_bytes_full")


def _speed(rows: Sequence[Generated]) -> str:
    # A batch's prefill is shared by its rows.
    prefill = sum(row.prefill_seconds / row.batch_rows for row in rows)
    rates = [row.decode_tokens_per_second for row in rows if row.decode_tokens_per_second is not None]
    text = f"prefill {prefill:.2f} s"
    if not rates:
        return text
    return f"{text}, {sum(rates) / len(rates):.0f} tokens/s{' a row' if len(rows) > 1 else ''}"


def floor_note(policy: Policy, rows: Sequence[Generated]) -> str | None:
    """Says that `min_slots` binds: these prompts are so short that layers may hold more than their percentage."""
    bound = [row for row in rows if row.min_slots_binds]
    if not bound:
        return None
    layers = sorted({layer for row in bound for layer in row.min_slots_binds})
    floors = sorted({policy.layers[layer].min_slots for layer in layers})
    slots = str(floors[0]) if len(floors) == 1 else f"{floors[0]} to {floors[-1]}"
    lengths = [row.prompt_tokens for row in bound]
    if len(rows) == 1:
        what = f"this prompt of {lengths[0]} tokens"
    else:
        what = f"{len(bound)} of {len(rows)} prompts (at most {max(lengths)} tokens)"
    return f"min_slots binds for {what}: layers {layer_ranges(layers)} may hold {slots} tokens, above their percentage"


def room_note(*runs: Sequence[Generated]) -> str | None:
    """Says why a run can hold more than a full cache: rows grow by steps, and bytes are counted as allocated."""
    if all(sum(row.kv_bytes for row in rows) <= sum(row.kv_bytes_full for row in rows) for rows in runs):
        return None
    return "above 100%: growing layers hold room for the next tokens; full counts none"


def comparison(pairs: Sequence[tuple[Generated, Generated]]) -> list[str]:
    """Lines on (policy, full cache) runs of the same prompts."""
    mine, full = ([pair[i] for pair in pairs] for i in (0, 1))
    room = room_note(mine, full)
    lines = [f"policy: {summary(mine)}", f"full:   {summary(full)}", *([room] if room else [])]
    places = [first_difference(a, b) for a, b in pairs]
    if len(pairs) > 1:
        same = sum(place is None for place in places)
        return [*lines, f"{same} of {len(pairs)} prompts give the same tokens as with the full cache"]
    if places[0] is None:
        return [*lines, "the full cache gives the same tokens"]
    return [
        *lines,
        f"the full cache gives another text, from new token {places[0] + 1} on:",
        f"policy> {mine[0].text}",
        f"full>   {full[0].text}",
    ]
