"""costs(): what policies hold and how fast they decode, on one prompt that is really prefilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvplan.check.results import Cost
from kvplan.check.timing import Spread, in_turn, ratio, seconds
from kvplan.model_spec import ModelSpec
from kvplan.placement import input_device
from kvplan.policy.schema import Policy
from kvplan.runtime.attach import Runtime, attach, full_policy
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import PromptCapture, capture, must_prefill, prefill, replay

REFERENCE = "DynamicCache"  # transformers' own full cache


@torch.no_grad()
def costs(
    model: Any,
    spec: ModelSpec,
    policies: Mapping[str, Policy],
    prompt_ids: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Cost]:
    """Bytes and, with new tokens, decode speed of every policy; speeds are taken in turn, beside transformers' cache.

    Args:
        new_tokens: Decoded in each round; 0: bytes only.
        repeats: Rounds, after one that warms up.
        progress: Called once a policy, and then `(len(policies) + 1) * (repeats + 1)` times if there are new tokens.

    Raises:
        MemoryPlanExceeded: a cache holds more than its policy plans.
    """
    ids = torch.tensor([prompt_ids], device=input_device(model))
    found = {}
    for name, policy in policies.items():
        found[name] = _bytes(model, spec, policy, ids)
        progress()
    if not new_tokens:
        return found
    times = decode_times(model, spec, policies, prompt_ids, new_tokens, repeats, progress)
    return {
        name: replace(
            held,
            new_tokens=new_tokens,
            tokens_per_second=_spread(Spread.of([new_tokens / s for s in times[name]])),
            speedup=_spread(ratio(times[REFERENCE], times[name])),
        )
        for name, held in found.items()
    }


@torch.no_grad()
def decode_times(
    model: Any,
    spec: ModelSpec,
    policies: Mapping[str, Policy],
    prompt_ids: Sequence[int],
    new_tokens: int,
    repeats: int,
    progress: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of every round of each policy and of `REFERENCE`, in turn, after a prompt of one row.

    Args:
        new_tokens, repeats: As in `costs`.
        progress: Called `(len(policies) + 1) * (repeats + 1)` times.
    """
    ids = torch.tensor([prompt_ids], device=input_device(model))
    prompt = capture(model, full_policy(model), spec, ids, torch.ones_like(ids, dtype=torch.bool))

    def under(policy: Policy) -> float:
        with attach(model, policy, spec) as runtime:
            return decode_seconds(model, prefilled(runtime, prompt, ids), ids, new_tokens)

    def reference() -> float:
        return decode_seconds(model, dynamic_cache(model, prompt, ids.shape[1]), ids, new_tokens)

    cases: dict[str, Callable[[], float]] = {name: partial(under, policy) for name, policy in policies.items()}
    return in_turn({REFERENCE: reference} | cases, repeats, progress)


def decode_seconds(model: Any, cache: Any, ids: Tensor, new_tokens: int) -> float:
    """How long single steps take after a prompt of ids [B, T], whose tokens are fed once more."""
    context = ids.shape[1]

    def run() -> None:
        for step in range(new_tokens):
            at = torch.full((ids.shape[0], 1), context + step, device=ids.device)
            model(input_ids=ids[:, step % context, None], position_ids=at, past_key_values=cache)

    return seconds(run, ids.device)


def prefilled(runtime: Runtime, prompt: PromptCapture, ids: Tensor) -> PolicyCache:
    """A cache of the attached policy after the prompt, prefilled anew only where the policy asks for it."""
    if not must_prefill(runtime.policy):
        return replay(runtime, prompt)
    cache = runtime.new_cache()
    prefill(runtime, cache, ids, prompt.valid)
    return cache


class HeldLayer(DynamicLayer):
    """A layer of transformers' cache that holds so many tokens and no more: the oldest go."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, [B, Hkv, at most `tokens` behind a single step, D]."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        first = max(keys.shape[-2] - (self.tokens - 1), 0)  # room for the token that comes next
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]
        return keys, values


def dynamic_cache(model: Any, prompt: PromptCapture, tokens: int, *, held: bool = False) -> DynamicCache:
    """Transformers' own cache with the last tokens of the prompt.

    Args:
        held: It never holds more than `tokens`; a layer with a window of its own keeps that.
    """
    cache = DynamicCache(config=model.config)
    if held:
        cache.layers = [layer if layer.is_sliding else HeldLayer(tokens) for layer in cache.layers]
    for index, layer in enumerate(prompt.layers):
        cache.update(layer.keys[:, :, -tokens:].clone(), layer.values[:, :, -tokens:].clone(), index)
    return cache


def _bytes(model: Any, spec: ModelSpec, policy: Policy, ids: Tensor) -> Cost:
    with attach(model, policy, spec) as runtime:
        cache = runtime.new_cache()
        prefill(runtime, cache, ids, torch.ones_like(ids, dtype=torch.bool))
        told = cache.report()
    return Cost(
        context_tokens=ids.shape[1],
        planned_bytes=told["kv_bytes_planned"],
        kv_bytes=told["kv_bytes"],
        full_bytes=told["kv_bytes_full"],
        peak_bytes=told["peak_kv_bytes"],
    )


def _spread(found: Spread) -> tuple[float, float, float]:
    return found.median, found.low, found.high
