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

from kvplan.policy.schema import LayerPolicy, Policy
from kvplan.runtime.attach import Runtime, attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.prompt import prompt_view, row_lengths


@dataclass
class LayerCapture:
    """One layer's prompt: q [B, Hq, T, D] until scored, keys and values [B, Hkv, T, D], scores by evictor."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    args: AttentionArgs
    scores: dict[Any, Tensor] = field(default_factory=dict)


class _CapturingLayer(BudgetedLayer):
    captured: LayerCapture

    def store_prompt(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs) -> None:
        self.captured = LayerCapture(q, keys, values, args)
        self.prompt_tokens = row_lengths(valid)

    def bytes_by_kind(self) -> dict[str, int]:
        return {}


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

    def scores(self, layer: int, policy: LayerPolicy, native_window: bool) -> Tensor | None:
        """The evictor's prompt scores, computed when first asked for and then kept."""
        if policy.slots.is_full or native_window:
            return None
        captured, evictor = self.layers[layer], policy.evictor
        if evictor not in captured.scores:
            view = prompt_view(evictor, captured.queries, captured.keys, captured.values, self.valid, captured.args)
            captured.scores[evictor] = evictor.score(view)
        return captured.scores[evictor]


def capture(model: Any, policy: Policy, spec: Any, ids: Tensor, valid: Tensor) -> PromptCapture:
    """Prefill a left-padded batch with everything kept.

    Args:
        policy: A full policy of this model.
        ids: [B, T] int64; valid: [B, T] bool.
    """
    with attach(model, policy, spec) as runtime, torch.no_grad():
        cache = runtime.new_cache()
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


def replay(runtime: Runtime, prompt: PromptCapture) -> PolicyCache:
    """A cache as the attached policy would have left it after this prompt.

    Only for policies without sharing; see the module's docstring.
    """
    cache = runtime.new_cache()
    lengths = row_lengths(prompt.valid)
    for index, layer in enumerate(cache.layers):
        captured = prompt.layers[index]
        scores = prompt.scores(index, runtime.policy.layers[index], runtime.spec.layers[index].window is not None)
        layer.fill(captured.keys, captured.values, lengths, scores)
        layer.columns = captured.keys.shape[2]
    return cache
