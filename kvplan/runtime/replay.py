"""One prefill, many policies: a captured prompt from which any policy's pools can be filled.

One-shot prefill attends over the whole prompt before anything is evicted, so a prompt's keys, values and evictor
statistics do not depend on the policy. They are captured once; filling pools from them is the same code that a
real run uses (`BudgetedLayer.fill`). Sharing changes the hidden states of later layers: such policies run anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvplan.policy.schema import Policy
from kvplan.runtime.attach import Runtime, attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import NO_BYTES, PolicyLayer, PromptStats
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.prompt import row_lengths
from kvplan.runtime.rotary import find_rotaries


@dataclass
class LayerCapture:
    """One layer's prompt: q [B, Hq, T, D], keys and values [B, Hkv, T, D], and what policies asked of them."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    args: AttentionArgs
    stats: dict[Any, PromptStats] = field(default_factory=dict)


class _CapturingLayer(BudgetedLayer):
    captured: LayerCapture

    def observe_prompt(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> PromptStats:
        self.captured = LayerCapture(q, keys, values, args)
        return PromptStats()

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        self._prompt_tokens = lengths

    def bytes_by_kind(self) -> dict[str, int]:
        return dict(NO_BYTES)


@dataclass
class PromptCapture:
    """A batch of prompts, prefilled once. Rows are padded on the left.

    Attributes:
        valid: [B, T] bool.
        last_logits: [B, V] float32, the prediction after each prompt.
    """

    layers: list[LayerCapture]
    valid: Tensor
    last_logits: Tensor

    def stats(self, index: int, layer: PolicyLayer) -> PromptStats:
        """What a layer's policy asks of the prompt, computed when first asked for and then kept."""
        captured, policy = self.layers[index], layer.policy
        asked = (layer.evicts, policy.evictor, policy.protected_sinks, policy.channels, layer.heads_as_rows)
        if asked not in captured.stats:
            captured.stats[asked] = layer.observe_prompt(
                captured.queries, captured.keys, captured.values, self.valid.to(captured.keys.device), captured.args
            )
        return captured.stats[asked]


def must_prefill(policy: Policy) -> bool:
    """Whether a policy changes what its own prompt pass computes, so that no captured prompt can stand for it."""
    return policy.chunked or any(layer.shares is not None for layer in policy.layers)


def capture(model: Any, policy: Policy, spec: Any, ids: Tensor, valid: Tensor) -> PromptCapture:
    """Prefill a left-padded batch with everything kept.

    Args:
        policy: A full policy of this model.
        ids: [B, T] int64; valid: [B, T] bool.
    """
    with attach(model, policy, spec) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        cache.rotaries = find_rotaries(model, spec)  # a policy to come may ask
        cache.layers = [_CapturingLayer(p, s) for p, s in zip(policy.layers, spec.layers, strict=True)]
        logits = forward(runtime, cache, ids, positions_of(valid), valid, last_only=True)
    return PromptCapture([layer.captured for layer in cache.layers], valid, logits[:, -1])


def positions_of(valid: Tensor) -> Tensor:
    """[B, T] positions of a left-padded batch; padding gets 0."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def forward(
    runtime: Runtime, cache: PolicyCache, ids: Tensor, positions: Tensor, valid: Tensor | None, last_only: bool = False
) -> Tensor:
    """Logits [B, T or 1, V] float32 of one forward call on the cache."""
    out = runtime.model(
        input_ids=ids,
        attention_mask=None if valid is None or bool(valid.all()) else valid.long(),
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=1 if last_only else 0,
    )
    return out.logits.float()


def prefill(runtime: Runtime, cache: PolicyCache, ids: Tensor, valid: Tensor) -> Tensor:
    """Run a left-padded batch of prompts, in chunks where the policy says so: the logits [B, V] that follow."""
    chunk, positions = runtime.policy.prefill_chunk_tokens or ids.shape[1], positions_of(valid)
    for start in range(0, ids.shape[1], chunk):
        now = slice(start, start + chunk)
        # The mask covers all columns so far.
        logits = forward(runtime, cache, ids[:, now], positions[:, now], valid[:, : start + chunk], last_only=True)
    cache.close_prompt()
    return logits[:, -1]


def replay(runtime: Runtime, prompt: PromptCapture) -> PolicyCache:
    """A cache as the attached policy would have left it after this prompt.

    Only for policies without sharing and without chunked prefill; see the module's docstring.
    """
    cache = runtime.new_cache()
    lengths = row_lengths(prompt.valid)
    for index, layer in enumerate(cache.layers):
        captured = prompt.layers[index]
        layer.fill(captured.keys, captured.values, lengths, prompt.stats(index, layer))
        layer.columns = captured.keys.shape[2]
    return cache
