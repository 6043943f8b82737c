"""One prefill, many policies: a captured prompt from which any policy's pools can be filled.

One-shot prefill attends over the whole prompt before anything is evicted, so a prompt's keys, values and evictor
statistics depend on nothing of a policy but which layers share. They are captured once for each such choice, from the
first layer that shares otherwise on; filling pools from them is the same code that a real run uses
(`BudgetedLayer.fill`). A prompt that comes in chunks is evicted from while it is read: such policies run anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvplan.methods.codecs import Codec
from kvplan.policy.schema import Policy
from kvplan.runtime.attach import Runtime, attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import NO_BYTES, PolicyLayer, PromptStats
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.prompt import row_lengths
from kvplan.runtime.restart import Output, recorded, started_at
from kvplan.runtime.rotary import find_rotaries

Keep = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def nothing_more(size: int) -> bool:
    return False


@dataclass
class LayerCapture:
    """One layer's prompt: q [B, Hq, T, D], keys and values [B, Hkv, T, D], and what policies asked of them.

    Tensors may lie in files, on the CPU, whatever the device of the layer.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    args: AttentionArgs
    device: torch.device
    stats: dict[Any, PromptStats] = field(default_factory=dict)
    codes: dict[tuple[str, Codec], dict[str, Tensor]] = field(default_factory=dict)


class _CapturingLayer(BudgetedLayer):
    captured: LayerCapture
    keep: Keep

    def observe_prompt(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> PromptStats:
        # In the order in which trials need them, should memory not do for all.
        kept = self.keep(keys), self.keep(values), self.keep(q)
        self.captured = LayerCapture(kept[2], kept[0], kept[1], args, keys.device)
        return PromptStats()

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        self._prompt_tokens = lengths

    def bytes_by_kind(self) -> dict[str, int]:
        return dict(NO_BYTES)


@dataclass
class PromptCapture:
    """A batch of prompts, prefilled once. Rows are padded on the left.

    Attributes:
        layers: By layer; for one that shares, its source's.
        valid: [B, T] bool.
        last_logits: [B, V] float32, the prediction after each prompt.
        shares: The source of each layer that shares, else None.
        outputs: What each decoder layer handed on, where that was recorded.
        keep: Where statistics go.
        has_room: Whether so many bytes more may be kept for policies to come: then what encodes each vector alone
            encodes the whole prompt once.
    """

    layers: list[LayerCapture]
    valid: Tensor
    last_logits: Tensor
    shares: tuple[int | None, ...] = ()
    outputs: dict[int, Output] = field(default_factory=dict)
    keep: Keep = as_it_is
    has_room: Callable[[int], bool] = nothing_more

    def stats(self, index: int, layer: PolicyLayer) -> PromptStats:
        """What a layer's policy asks of the prompt, computed when first asked for and then kept."""
        captured, policy = self.layers[index], layer.policy
        asked = (layer.evicts, policy.evictor, policy.protected_sinks, policy.channels, layer.heads_as_rows)
        if asked not in captured.stats:
            q, keys, values, valid = (
                x.to(captured.device) for x in (captured.queries, captured.keys, captured.values, self.valid)
            )
            found = layer.observe_prompt(q, keys, values, valid, captured.args)
            captured.stats[asked] = _stats(found, self.keep)
        found = _stats(captured.stats[asked], lambda x: x.to(captured.device))
        return replace(found, codes=self._codes(captured, layer))

    def _codes(self, captured: LayerCapture, layer: PolicyLayer) -> dict[str, Tensor]:
        """The whole prompt as the layer's codecs encode it, by column, where there is room to keep that.

        Row by row, to need little memory at a time.
        """
        found = {}
        for role, codec in layer.encoded_alone.items():
            if (role, codec) not in captured.codes:
                whole = captured.keys if role == "keys" else captured.values
                if not self.has_room(whole.numel() * whole.element_size()):
                    continue
                whole = whole.to(captured.device)
                rows = [codec.encode(row) for row in whole.split(1)]
                captured.codes[role, codec] = {
                    name: self.keep(torch.cat([row[name] for row in rows])) for name in rows[0]
                }
            for name, codes in captured.codes[role, codec].items():
                found[f"{role}.{name}"] = codes.to(captured.device)
        return found


def must_prefill(policy: Policy) -> bool:
    """Whether a policy changes its own prompt pass, so that no prompt captured under the full cache stands for it."""
    return policy.chunked or any(layer.shares is not None for layer in policy.layers)


def _stats(stats: PromptStats, each: Keep) -> PromptStats:
    scores, channels = stats.scores, stats.channels
    return PromptStats(None if scores is None else each(scores), None if channels is None else each(channels))


def capture(
    model: Any,
    policy: Policy,
    spec: Any,
    ids: Tensor,
    valid: Tensor,
    keep: Keep = as_it_is,
    decoder: Sequence[nn.Module] | None = None,
    start: PromptCapture | None = None,
    first: int = 0,
) -> PromptCapture:
    """Prefill a left-padded batch with everything kept.

    Args:
        policy: A full policy of this model, but for layers that share.
        ids: [B, T] int64; valid: [B, T] bool.
        keep: Given every captured tensor; what it returns is kept.
        decoder: The decoder layers, whose outputs (but the last one's) are then kept too.
        start: A capture of the same prompts whose layers before `first` are taken over, with their outputs.
    """
    with attach(model, policy, spec) as runtime, torch.no_grad(), ExitStack() as stack:
        cache = runtime.new_cache()
        cache.rotaries = find_rotaries(model, spec)  # a policy to come may ask
        layers = [_CapturingLayer(p, s) for p, s in zip(policy.layers, spec.layers, strict=True)]
        cache.layers = layers
        outputs = stack.enter_context(recorded(decoder and decoder[:-1], keep))
        for index, layer in enumerate(layers):
            layer.keep = keep
            if start is not None and index < first:
                layer.captured = start.layers[index]
                if policy.source(index) == index:
                    taken = layer.captured
                    cache.lend_prompt(index, taken.keys.to(taken.device), taken.values.to(taken.device))
        if start is not None:
            assert decoder is not None
            stack.enter_context(started_at(decoder, first, start.outputs[first - 1]))
        logits = forward(runtime, cache, ids, positions_of(valid), valid, last_only=True)
    if start is not None:
        outputs = {**outputs, **{i: start.outputs[i] for i in range(first)}}
    captured = [layers[policy.source(i)].captured for i in range(len(layers))]
    shares = tuple(layer.shares for layer in policy.layers)
    return PromptCapture(captured, valid, logits[:, -1], shares, outputs, keep)


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


def replay(runtime: Runtime, prompt: PromptCapture, first: int = 0) -> PolicyCache:
    """A cache as the attached policy would have left it after this prompt.

    Args:
        prompt: Captured with the same layers shared; the policy does not read prompts in chunks.
        first: Layers before it stay empty, for forwards that start there.
    """
    cache = runtime.new_cache()
    lengths = row_lengths(prompt.valid)
    for index, layer in enumerate(cache.layers):
        captured = prompt.layers[index]
        if index >= first and layer.policy.shares is None:
            stats = prompt.stats(index, layer)
            layer.fill(captured.keys.to(captured.device), captured.values.to(captured.device), lengths, stats)
        layer.columns = captured.keys.shape[2]
    return cache
