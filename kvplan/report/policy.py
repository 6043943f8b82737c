"""Policies for people: budgets as a picture, what differs between two, bytes by layer. 80 columns, readable in grey."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from kvplan.errors import PolicyError
from kvplan.methods.params import settings
from kvplan.model_spec import LayerSpec, layer_ranges
from kvplan.policy.memory import BytesPlan, LayerBytes, allocated_slots, floor_binds
from kvplan.policy.schema import LayerPolicy, Policy
from kvplan.units import format_bytes, format_share

WIDTH = 80
_BAR = 28
_COLOURS = ("cyan", "magenta", "yellow", "blue", "green", "red")
_BESIDE = ("positions", "scores", "counts", "channels")
_FIELDS = ("slots", "sink_tokens", "recent_tokens", "min_slots")
_METHODS = ("evictor", "head_split", "merger", "channels", "key_codec", "value_codec")


def method_text(method: Any) -> str:
    """'snapkv(window_tokens=16)'."""
    if method is None:
        return "none"
    params = ", ".join(f"{name}={value}" for name, value in settings(method).items())
    return f"{method.name}({params})" if params else str(method.name)


def layer_text(layer: LayerPolicy) -> str:
    """'tova, int8': what is at work in a layer, the evictor first."""
    told = [] if layer.slots.is_full else [method_text(layer.evictor)]
    told += [method_text(m) for m in (layer.head_split, layer.merger, layer.channels) if m is not None]
    keys, values = method_text(layer.key_codec), method_text(layer.value_codec)
    if keys == values:
        told += [keys] if keys != "dense" else []
    else:
        told.append(f"keys {keys}, values {values}")
    return ", ".join(told)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def picture(policy: Policy, context_tokens: int, held_bytes: float | None = None) -> Text:
    """A bar per layer: slots held after a prompt of that many tokens, where the whole bar is the whole prompt.

    Args:
        held_bytes: As a share of the full cache's, where it is known.
    """
    text = Text(no_wrap=True)
    for line in _heading(policy):
        text.append(line + "\n")
    scale = f"0{f'{context_tokens} tokens':>{_BAR - 1}}"
    text.append(f"\nlayer    slots  {scale}   how\n", "bold")
    names = sorted({layer.evictor.name for layer in policy.layers})
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    held = 0
    for index, layer in enumerate(policy.layers):
        slots = _slots(layer, context_tokens)
        held += slots
        text.append_text(_layer_line(index, layer, slots / context_tokens, context_tokens, colours))
    share = held / (context_tokens * len(policy.layers))
    stored = "" if held_bytes is None else f", {held_bytes:.1%} of bytes"
    text.append(f"\n{share:.1%} of slots{stored} of a full cache, after a prompt of {context_tokens} tokens")
    return text


def _slots(layer: LayerPolicy, context_tokens: int) -> int:
    """Slots of one row after its prompt, in a layer with full attention of its own."""
    return allocated_slots(layer, LayerSpec(1, 1, 1), context_tokens, 0)


def _heading(policy: Policy) -> list[str]:
    model = policy.model
    told = [str(model[name]) for name in ("name", "type", "dtype") if model.get(name)]
    lines = [_clip(f"model   {', '.join([*told, f'{len(policy.layers)} layers'])}", WIDTH)]
    target = policy.target
    if target is not None and target.share is not None:
        lines.append(f"target  {format_share(target.share)} of the full cache")
    elif target is not None and target.bytes is not None:
        at = f" at {target.context_tokens} tokens" if target.context_tokens else ""
        lines.append(f"target  {format_bytes(target.bytes)}{at}, batch {target.batch}")
    return lines


def _layer_line(index: int, layer: LayerPolicy, share: float, context_tokens: int, colours: dict[str, str]) -> Text:
    line = Text(f"{index:>5} ")
    if layer.shares is not None:
        return line.append(f"{'-':>8}  -> layer {layer.shares}\n")
    filled = min(_BAR, round(share * _BAR)) or 1
    line.append(f"{layer.slots!s:>8}  [")
    line.append("#" * filled, colours[layer.evictor.name])
    line.append("." * (_BAR - filled) + "]")
    told = layer_text(layer)
    if not told:
        return line.append("\n")
    note = f" (min\N{NO-BREAK SPACE}{layer.min_slots})" if floor_binds(layer, [context_tokens]) else ""
    begin = len(line) + 2
    first, *rest = (part.replace("\N{NO-BREAK SPACE}", " ") for part in textwrap.wrap(told + note, WIDTH - begin))
    line.append("  ").append(first + "\n", colours[layer.evictor.name])
    for more in rest:
        line.append(" " * begin + more + "\n", colours[layer.evictor.name])
    return line


@dataclass(frozen=True)
class LayerChange:
    """Layers in which two policies differ alike: slots and bytes over all rows, and the settings that changed."""

    layers: tuple[int, ...]
    slots: tuple[int, int]
    bytes: tuple[int, int]
    settings: tuple[str, ...]


def changes(a: Policy, b: Policy, plan_a: BytesPlan, plan_b: BytesPlan) -> list[LayerChange]:
    """The layers in which two policies differ, equal changes together.

    Raises:
        PolicyError: the policies have different numbers of layers.
    """
    if len(a.layers) != len(b.layers):
        raise PolicyError(f"the policies are for {len(a.layers)} and {len(b.layers)} layers; they cannot be compared")
    groups: dict[tuple[tuple[int, int], tuple[int, int], tuple[str, ...]], list[int]] = {}
    for i, (old, new) in enumerate(zip(a.layers, b.layers, strict=True)):
        told = tuple(_changed_settings(old, new))
        slots, held = (plan_a.slots[i], plan_b.slots[i]), (plan_a.layers[i].total, plan_b.layers[i].total)
        if told or slots[0] != slots[1] or held[0] != held[1]:
            groups.setdefault((slots, held, told), []).append(i)
    return [LayerChange(tuple(indices), *key) for key, indices in groups.items()]


def _changed_settings(old: LayerPolicy, new: LayerPolicy) -> list[str]:
    told = []
    if not (old.shares is not None and new.shares is not None):
        if old.shares is not None or new.shares is not None:
            return [f"shares: {_source(old)} -> {_source(new)}"]
        for name in _FIELDS:
            if getattr(old, name) != getattr(new, name):
                told.append(f"{name}: {getattr(old, name)} -> {getattr(new, name)}")
        for name in _METHODS:
            before, after = _at_work(old, name), _at_work(new, name)
            if before != after:
                told.append(f"{name.replace('_', ' ')}: {method_text(before)} -> {method_text(after)}")
    elif old.shares != new.shares:
        told.append(f"shares: {_source(old)} -> {_source(new)}")
    return told


def _at_work(layer: LayerPolicy, field: str) -> Any:
    """A method of the layer; a full layer evicts nothing, whatever its evictor."""
    return None if field == "evictor" and layer.slots.is_full else getattr(layer, field)


def _source(layer: LayerPolicy) -> str:
    if layer.shares is not None:
        return f"layer {layer.shares}"
    told = layer_text(layer)
    return f"{layer.slots} by {told}" if told else str(layer.slots)


def diff(found: list[LayerChange], plan_a: BytesPlan, plan_b: BytesPlan, where: str) -> Text:
    """What changes from the first policy to the second; `where` says at which context the bytes are meant."""
    text = Text(no_wrap=True)
    if not found:
        text.append("no layer differs\n")
    else:
        text.append(f"{'layers':12}{'slots':>22}{'bytes':>28}\n", "bold")
    for change in found:
        text.append(f"{_clip(layer_ranges(list(change.layers)), 16):16}{_arrow(*map(str, change.slots)):>18}")
        text.append(f"{_arrow(*map(format_bytes, change.bytes)):>28}{_percent(*change.bytes):>10}\n")
        for told in change.settings:
            for line in textwrap.wrap(told, WIDTH - 4, initial_indent="    ", subsequent_indent="      "):
                text.append(line + "\n", "dim")
    totals = (plan_a.total, plan_b.total)
    text.append(f"\n{'total':34}{_arrow(*map(format_bytes, totals)):>28}{_percent(*totals):>10}\n", "bold")
    return text.append(where)


def _arrow(old: str, new: str) -> str:
    return old if old == new else f"{old} -> {new}"


def _percent(old: int, new: int) -> str:
    if old == new:
        return "="
    return f"{(new - old) / old:+.1%}" if old else "new"


def byte_table(plan: BytesPlan, where: str) -> Text:
    """Bytes by layer and kind, and their sum against the full cache."""
    text = Text(no_wrap=True)
    kinds = ("keys", "values", "scales", "beside", "total")
    text.append(f"{'layer':>5}{'slots':>10}" + "".join(f"{kind:>13}" for kind in kinds) + "\n", "bold")
    for index, (held, slots) in enumerate(zip(plan.layers, plan.slots, strict=True)):
        text.append(f"{index:>5}{slots:>10}{_kinds(held)}\n")
    text.append(f"{'sum':>5}{sum(plan.slots):>10}{_kinds(plan.by_kind)}\n", "bold")
    text.append(f"\n{format_bytes(plan.total)} of {format_bytes(plan.full)} ({plan.ratio:.2%}) {where}")
    if plan.min_slots_binds:
        named = layer_ranges(list(plan.min_slots_binds))
        text.append(f"\nnote: min_slots raises the percentage in layers {_clip(named, 30)}", "yellow")
    return text


def _kinds(held: LayerBytes) -> str:
    """Beside: positions and scores of evictors, counts of mergers, channel numbers."""
    beside = sum(getattr(held, kind) for kind in _BESIDE)
    return "".join(f"{format_bytes(n):>13}" for n in (held.keys, held.values, held.scales, beside, held.total))
