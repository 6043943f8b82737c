"""A decode step of fixed shapes: torch.compile on a CPU, a captured graph on a GPU (not yet run on one).

After the prompt, each layer's slots are laid out once for the whole generation, lengths live on the device, and every
step runs the same operations: no Python number changes from token to token. So the step can be captured, and no token
waits for the host. It does what the step of `BudgetedLayer` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from kvplan.errors import MemoryPlanExceeded, RuntimeLimitError
from kvplan.methods.evictors import Step
from kvplan.policy.memory import plan
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.kernels.dense import AttentionArgs, attention_probs
from kvplan.runtime.layers.base import PolicyLayer
from kvplan.runtime.layers.budgeted import BudgetedLayer

IMPLEMENTATION = "kvplan_static"
WARM_UP_STEPS = 3
TOKENS_BETWEEN_CHECKS = 16


class StaticLayer(CacheLayerMixin):
    """The slots of one layer with room for every token to come.

    Args:
        layer: The layer after its prompt.
        slots: Slots per row, the same in all rows.
        lengths: [B] int64 tokens of each row so far, shared by all layers and advanced once a step.
        prompts: [B] int64 prompt tokens of each row.
    """

    is_sliding = False

    def __init__(self, layer: BudgetedLayer, slots: int, lengths: Tensor, prompts: Tensor) -> None:
        super().__init__()
        assert layer.pool is not None
        pool = layer.pool.resized([slots] * layer.num_rows)
        self.evictor, self.keeps_scores = layer.evictor, layer.keeps_scores
        self.sinks, self.recent_tokens = layer.sinks, layer.policy.recent_tokens
        self.lengths, self.prompts, self.slots = lengths, prompts, slots
        columns = pool.rows[0].columns
        self.slot_keys, self.slot_values = columns["keys.x"], columns["values.x"]  # [B, Hkv, S, D]
        self.positions, self.scores = columns.get("positions"), columns.get("scores")
        self.numbers = torch.arange(slots, device=lengths.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the step's token over its victim; returns the slots."""
        slot = self._victim() if self.keeps_scores else self._ring_slot()  # [B, H, 1]
        index = slot.expand(-1, self.slot_keys.shape[1], -1)[..., None]
        self.slot_keys.scatter_(2, index.expand(-1, -1, -1, key_states.shape[-1]), key_states)
        self.slot_values.scatter_(2, index.expand(-1, -1, -1, value_states.shape[-1]), value_states)
        if self.positions is not None and self.scores is not None:
            now = self.lengths[:, None, None].expand_as(slot)
            self.positions.scatter_(-1, slot, now.to(self.positions.dtype))
            self.scores.scatter_(-1, slot, torch.zeros_like(slot, dtype=self.scores.dtype))
        return self.slot_keys, self.slot_values

    def _ring_slot(self) -> Tensor:
        overwritten = self.lengths - self.prompts.clamp(min=self.slots)
        ring = self.sinks + overwritten % (self.slots - self.sinks)
        return torch.where(self.lengths < self.slots, self.lengths, ring)[:, None, None]

    def _victim(self) -> Tensor:
        assert self.positions is not None and self.scores is not None
        now = self.lengths[:, None, None]
        protected = (self.positions < self.sinks) | (self.positions > now - self.recent_tokens)
        victim = self.scores.masked_fill(protected, torch.inf).min(-1, keepdim=True).indices
        return torch.where(now < self.slots, now.expand_as(victim), victim)

    def attend(self, q: Tensor, args: AttentionArgs, observe: bool) -> Tensor:
        """[B, Hq, 1, D] -> [B, 1, Hq, Dv]; where `observe`, the scores learn from it."""
        held = (self.lengths + 1).clamp(max=self.slots)[:, None, None, None]
        mask = self.numbers < held  # [B, 1, 1, S]
        if args.plain and not (observe and self.keeps_scores):
            grouped = q.unflatten(1, (self.slot_keys.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
            out = F.scaled_dot_product_attention(
                grouped, self.slot_keys, self.slot_values, attn_mask=mask, scale=args.scaling
            )
            return out.flatten(1, 2)[:, None]
        probs = attention_probs(q, self.slot_keys, mask, args)[..., 0, :]  # [B, Hkv, G, S]
        if observe and self.keeps_scores:
            assert self.scores is not None
            step = Step(self.lengths[:, None, None], held[:, 0])
            self.scores.copy_(self.evictor.observe(self.scores, probs.float(), step))
        return (probs.to(q.dtype) @ self.slot_values).flatten(1, 2)[:, None]

    def get_seq_length(self) -> int:
        """A constant: positions are given to the model, and a number that changes would be captured."""
        return 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_max_length(self) -> int:
        return -1

    def bytes(self) -> int:
        buffers = (self.slot_keys, self.slot_values, self.positions, self.scores)
        return sum(0 if x is None else x.untyped_storage().nbytes() for x in buffers)


class _Reader(CacheLayerMixin):
    """A layer that attends over another one's slots."""

    is_sliding = False

    def __init__(self, source: StaticLayer) -> None:
        super().__init__()
        self.source = source

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self.source.slot_keys, self.source.slot_values

    def attend(self, q: Tensor, args: AttentionArgs, observe: bool) -> Tensor:
        return self.source.attend(q, args, observe=False)

    def get_seq_length(self) -> int:
        return 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.source.slots, 0

    def get_max_length(self) -> int:
        return -1


class StaticCache(Cache):
    """What a `PolicyCache` holds after a prompt, laid out for `max_new_tokens` more.

    Raises:
        RuntimeLimitError: a layer's storage cannot be of one fixed shape.
        MemoryPlanExceeded: it holds more than the policy plans for that many tokens.
    """

    def __init__(self, cache: PolicyCache, max_new_tokens: int) -> None:
        prompts = cache.prompt_lengths
        slots = common_slots(cache, prompts, max_new_tokens)
        device = next(layer.pool.device for layer in cache.layers if getattr(layer, "pool", None) is not None)
        self.lengths = torch.tensor(prompts, device=device)
        fixed = torch.tensor(prompts, device=device)
        layers: list[Any] = []
        for index, layer in enumerate(cache.layers):
            source = cache.policy.source(index)
            if source != index:
                layers.append(_Reader(layers[source]))
            else:
                layers.append(StaticLayer(layer, slots[index], self.lengths, fixed))
                layer.pool = None  # one copy is enough
        super().__init__(layers=layers)
        planned = plan(cache.policy, cache.spec, prompts, max_new_tokens).total
        if self.kv_bytes > planned:
            raise MemoryPlanExceeded(f"the cache holds {self.kv_bytes} bytes, the plan allows {planned}")

    @property
    def kv_bytes(self) -> int:
        """Storage bytes held."""
        return sum(layer.bytes() for layer in self.layers if isinstance(layer, StaticLayer))

    @property
    def is_compileable(self) -> bool:
        return False


def common_slots(cache: PolicyCache, prompts: Sequence[int], max_new_tokens: int) -> dict[int, int]:
    """Slots of every row in each layer that stores its own; told before the prompt is read, too.

    Args:
        cache: Empty, or after its prompt.
        prompts: Prompt tokens of each row.

    Raises:
        RuntimeLimitError: a layer's storage cannot be of one fixed shape.
    """
    layers = enumerate(cache.layers)
    return {i: _layer_slots(i, x, prompts, max_new_tokens) for i, x in layers if cache.policy.source(i) == i}


def _layer_slots(index: int, layer: PolicyLayer, prompts: Sequence[int], max_new_tokens: int) -> int:
    plain = type(layer) is BudgetedLayer
    if not plain or layer.policy.merger is not None or {layer.key_codec.name, layer.value_codec.name} != {"dense"}:
        raise RuntimeLimitError(
            f"layer {index}: a compiled decode step needs plain slots; codecs, mergers, pruned channels and budgets "
            "that differ between heads run without compiled=True"
        )
    wanted = {
        n + max_new_tokens if cap is None else min(n + max_new_tokens, cap)
        for n, cap in zip(prompts, layer.capacities_for(prompts), strict=True)
    }
    if len(wanted) > 1:
        raise RuntimeLimitError(
            f"layer {index}: the rows of this batch hold {min(wanted)} to {max(wanted)} slots, but a compiled decode "
            "step needs one number; use prompts of one length, a fixed number of slots, or leave out compiled=True"
        )
    return wanted.pop()


class _Running:
    """The cache that the attention function below works on."""

    cache: StaticCache | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache = _Running.cache
    assert cache is not None
    args = AttentionArgs(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )
    return cache.layers[module.layer_idx].attend(query, args, observe=True), None


@contextmanager
def static_steps(model: Any, cache: StaticCache) -> Iterator[None]:
    """Let the model's forwards decode on `cache` inside the `with` block."""
    # Without a mask function of this name the models build no mask: validity comes from the lengths.
    AttentionInterface.register(IMPLEMENTATION, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    _Running.cache = cache
    try:
        yield
    finally:
        _Running.cache = None
        model.set_attn_implementation(before)


class _Step:
    """One forward of one token per row: compiled on a CPU, a captured graph on a GPU.

    The first steps run eagerly: they warm up what a capture must not see.
    """

    def __init__(self, model: Any, cache: StaticCache, rows: int) -> None:
        self._model, self._cache = model, cache
        device = cache.lengths.device
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._compiled = None if device.type == "cuda" else torch.compile(self._forward, fullgraph=True, dynamic=False)
        self._steps = 0

    def _forward(self) -> Tensor:
        out = self._model(
            input_ids=self.tokens,
            position_ids=self._cache.lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache.lengths.add_(1)
        return out.logits[:, -1]

    def __call__(self) -> Tensor:
        self._steps += 1
        if self._compiled is not None:
            return self._compiled()
        if self._steps <= WARM_UP_STEPS:
            return self._warm_up()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, runs nothing
                self._logits = self._forward()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _warm_up(self) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits = self._forward()
        torch.cuda.current_stream().wait_stream(side)
        return logits


def decode(
    model: Any,
    cache: StaticCache,
    first: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    ends: Tensor | None = None,
) -> Tensor:
    """Decode on a static cache.

    Args:
        first: [B] int64 tokens that the prompt's own pass chose.
        choose: [B, V] logits -> [B] int64 next tokens.
        ends: End tokens; whether all rows have met one is asked every few tokens, so a few more may come.

    Returns:
        [B, n] int64 new tokens, `first` included.
    """
    tokens, step = [first], _Step(model, cache, len(first))
    with static_steps(model, cache), torch.no_grad():
        while len(tokens) < max_new_tokens:
            if ends is not None and len(tokens) % TOKENS_BETWEEN_CHECKS == 0:
                met = torch.isin(torch.stack(tokens, 1), ends).any(1)
                if bool(met.all()):
                    break
            step.tokens.copy_(tokens[-1][:, None])
            tokens.append(choose(step().float()))
    return torch.stack(tokens, 1)
