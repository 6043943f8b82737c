"""Rules that span fields or layers, and whether a policy fits a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kvplan.errors import MethodError, PolicyError
from kvplan.model_spec import ModelSpec, layer_ranges
from kvplan.policy.compositions import chunk_problems, composition_problems
from kvplan.policy.layout import layout
from kvplan.policy.schema import LayerPolicy, Policy, stated_windows


def layer_problems(layers: Mapping[int, LayerPolicy]) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, field, message) for each broken rule. Layers that are absent from `layers` are not judged."""
    for index, layer in sorted(layers.items()):
        if layer.shares is not None:
            problem = _sharing_problem(index, layer.shares, layers)
            if problem:
                yield index, "shares", problem
        else:
            yield from ((index, name, problem) for name, problem in _protection_problems(layer))
            yield from ((index, name, problem) for name, problem in composition_problems(layer))


def _sharing_problem(index: int, source: int, layers: Mapping[int, LayerPolicy]) -> str | None:
    if source == index:
        return f"layer {index} cannot share its own cache"
    if source > index:
        return f"layer {index} cannot share the cache of layer {source}; only an earlier layer's exists by then"
    if source < 0:
        return f"layer {index} shares layer {source}; layers count from 0"
    root = source
    while root in layers and (further := layers[root].shares) is not None and further < root:
        root = further
    if root != source:
        return f"layer {index} shares layer {source}, which itself shares; name the layer that stores: {root}"
    return None


def _protection_problems(layer: LayerPolicy) -> Iterator[tuple[str, str]]:
    unit, recent = layer.stored_whole
    # Behind the tokens that are stored as they are, whole units leave.
    behind = recent + -(-max(0, layer.recent_tokens - recent) // unit) * unit
    # Encoded units that hold a sink are never overwritten; one more is, in turn.
    front = layer.protected_sinks if unit == 1 else (-(-layer.protected_sinks // unit) + 1) * unit
    front = front + 1 if recent and unit == 1 else front
    protected = front + behind
    told = f"{layer.protected_sinks} sink + {layer.recent_tokens} recent tokens"
    if recent:
        told = f"{front} slots for sinks and encoded tokens + {behind} recent tokens"
    for slots in layer.slots.heads or (layer.slots,):
        if slots.tokens is not None and protected > slots.tokens:
            yield "slots", f"{told} do not fit in {slots.tokens} slots; raise slots to at least {protected}"
    if any(slots.share is not None for slots in layer.slots.heads or (layer.slots,)) and protected > layer.min_slots:
        yield (
            "min_slots",
            f"{told} do not fit in {layer.min_slots} slots, the floor of the percentage; "
            f"raise min_slots to at least {protected}",
        )


def check_policy(policy: Policy) -> None:
    """Check a policy that was built in code, as a file is checked on reading.

    Raises:
        PolicyError: every broken rule, as `layers.4.shares: ...`.
    """
    problems = [f"layers.{i}.{name}: {told}" for i, name, told in layer_problems(dict(enumerate(policy.layers)))]
    if not policy.layers:
        problems.append("layers: a policy has at least one layer")
    problems += [f"layers.{i}.{name}: {told}" for i, name, told in chunk_problems(policy)]
    if policy.prefill_chunk_tokens is not None and policy.prefill_chunk_tokens < 2:
        problems.append(f"prefill.chunk_tokens: must be at least 2, not {policy.prefill_chunk_tokens}")
    stated = policy.model.get("layers")
    if stated is not None and stated != len(policy.layers):
        problems.append(f"layers: {len(policy.layers)} layers, but model.layers is {stated}")
    if problems:
        raise PolicyError(problems)


def check_model(policy: Policy, spec: ModelSpec) -> None:
    """Check that a policy was made for a model of this shape.

    Raises:
        PolicyError: every mismatch of shape, dtype or identity, and every layer that the model does not allow.
    """
    if len(policy.layers) != spec.num_layers:
        raise PolicyError(
            f"the policy has {len(policy.layers)} layers, the model {spec.num_layers}; "
            "use the model that the policy was made for, or search again"
        )
    problems = [*_identity_problems(policy, spec)]
    problems += [f"layers.{i}.{name}: {told}" for i, name, told in fit_problems(policy, spec)]
    if problems:
        raise PolicyError(problems)


def _identity_problems(policy: Policy, spec: ModelSpec) -> Iterator[str]:
    ours, theirs = policy.model, spec.policy_block()
    for name in ("layers", "kv_heads", "head_dim"):
        if name in ours and ours[name] != theirs[name]:
            yield f"model.{name}: the policy was made for {ours[name]}, the model has {theirs[name]}; search again"
    if "window" in ours and _window(ours) != _window(theirs):
        yield f"model.window: the policy was made for {_window(ours)}, the model has {_window(theirs)}; search again"
    if "dtype" in ours and ours["dtype"] != theirs["dtype"]:
        yield (
            f"model.dtype: the policy was made for {ours['dtype']}, the cache holds {theirs['dtype']}; "
            f"load the model in {ours['dtype']}, or search again"
        )
    if ours.get("fingerprint") and spec.fingerprint and ours["fingerprint"] != spec.fingerprint:
        yield (
            f"model.fingerprint: the policy was made for another model ({ours['fingerprint']}; this one is "
            f"{spec.fingerprint}); search again on this model, or delete the fingerprint from the policy "
            "to use it anyway"
        )


def _window(block: Mapping[str, Any]) -> str:
    layers = stated_windows(block)
    return f"a window of {block['window']} tokens in layers {layer_ranges(list(layers))}" if layers else "no window"


def fit_problems(policy: Policy, spec: ModelSpec) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, field, message) for every layer that a model of this shape does not allow."""
    for index in range(spec.num_layers):
        yield from ((index, name, told) for name, told in _fit_problems(policy, spec, index))


def _fit_problems(policy: Policy, spec: ModelSpec, index: int) -> Iterator[tuple[str, str]]:
    layer, shape = policy.layers[index], spec.layers[index]
    if layer.shares is None:
        if shape.window is not None and not layer.slots.is_full:
            yield (
                "slots",
                f"the model limits this layer to a window of {shape.window} tokens by itself; "
                f"write full, not {layer.slots}",
            )
        if shape.window is not None and layer.stored_whole[1]:
            yield (
                "codec",
                f"the model limits this layer to a window of {shape.window} tokens, whose slots "
                "are overwritten one by one; use a codec without groups and no pruned channels there",
            )
        if layer.slots.heads and len(layer.slots.heads) != shape.kv_heads:
            yield "slots", f"{len(layer.slots.heads)} numbers for {shape.kv_heads} KV heads; give one each"
        try:
            layout(layer, shape, getattr(torch, spec.dtype), policy.chunked)
        except MethodError as error:
            yield "codec", str(error)
        return
    source = spec.layers[layer.shares]
    if source == shape:
        return
    if source.window != shape.window:
        kinds = [f"window {w} tokens" if w else "full attention" for w in (shape.window, source.window)]
        yield (
            "shares",
            f"layer {index} ({kinds[0]}) cannot share the cache of layer {layer.shares} "
            f"({kinds[1]}); they must attend alike",
        )
    else:
        yield "shares", f"layers {index} and {layer.shares} have caches of different shape"
