"""A random model, and caches that hold random prompts: a decode step costs what it would cost after a real prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvplan.check.timing import seconds
from kvplan.methods.evictors import Evictor, evictors
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, full_policy, spec_of
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.layers.base import PromptStats

CPU = torch.device("cpu")


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """12 layers, 8 query and 4 KV heads of 64 channels, 44 M parameters, float32."""
    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "vocab_size": 8192,
        "max_position_embeddings": 16384,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
    assert model.config._attn_implementation == "sdpa", "the baseline is transformers' default"
    return model


def quarter(model: Any, evictor: Evictor | None = None, **layer: Any) -> Policy:
    """25 % of the prompt in every layer."""
    every = LayerPolicy(slots=Slots(share=2500), evictor=evictor or evictors["streaming"](), **layer)
    spec = spec_of(model)
    return Policy(layers=(every,) * spec.num_layers, model=spec.policy_block())


@dataclass
class Prompt:
    """Keys and values [B, Hkv, T, D] of every layer, padded on the left."""

    lengths: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def random(cls, model: Any, lengths: Sequence[int]) -> Prompt:
        shapes = [(len(lengths), s.kv_heads, max(lengths, default=0), s.key_dim) for s in spec_of(model).layers]
        return cls(list(lengths), [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes])

    @classmethod
    @torch.no_grad()
    def prefilled(cls, model: Any, lengths: Sequence[int]) -> tuple[Prompt, DynamicCache]:
        """What a real prefill of random tokens leaves, and the cache that it left them in.

        What `DynamicCache` costs afterwards hinges on the allocator, and so on what ran before.
        """
        ids = torch.randint(0, model.config.vocab_size, (len(lengths), max(lengths)))
        mask, cache = padding(lengths), DynamicCache(config=model.config)
        at = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, logits_to_keep=1)
        return cls(list(lengths), [x.keys for x in cache.layers], [x.values for x in cache.layers]), cache

    @property
    def columns(self) -> int:
        return max(self.lengths)

    def dynamic(self, share: float = 1.0) -> DynamicCache:
        """Transformers' own cache; of less than all, with the last tokens alone."""
        cache, kept = DynamicCache(), round(self.columns * share)
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys[:, :, -kept:].clone(), values[:, :, -kept:].clone(), index)
        return cache

    def under(self, cache: PolicyCache) -> PolicyCache:
        """A policy's cache, with what it keeps drawn at random where the evictor asks for the prompt's attention."""
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            scores = None
            if layer.evicts:
                heads = 1 if layer.policy.evictor.one_set_for_all_heads else keys.shape[1]
                scores = torch.rand(keys.shape[0], heads, self.columns) / self.columns
            layer.fill(keys, values, self.lengths, PromptStats(scores))
            layer.columns = self.columns
        return cache


@dataclass
class Decoding:
    """A cache that a model decodes on, a few steps at a time.

    Args:
        policy: Of a `PolicyCache`; None for a cache of transformers.
        positions: Of each row's next token.
        mask: [B, columns held] of a ragged batch, or None.
    """

    model: Any
    cache: Any
    policy: Policy | None
    positions: list[int]
    mask: Tensor | None = None
    spec: Any = field(init=False)

    def __post_init__(self) -> None:
        self.spec = spec_of(self.model)

    @torch.no_grad()
    def steps(self, count: int) -> None:
        B = len(self.positions)
        ids = torch.ones(B, 1, dtype=torch.int64)
        for _ in range(count):
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(B, 1)], 1)
            at = torch.tensor(self.positions)[:, None]
            self.model(input_ids=ids, attention_mask=self.mask, position_ids=at, past_key_values=self.cache)
            self.positions = [p + 1 for p in self.positions]

    def seconds(self, count: int) -> float:
        """CPU time per step."""
        if self.policy is None:
            return seconds(lambda: self.steps(count), CPU) / count
        with attach(self.model, self.policy, self.spec) as runtime:
            self.cache.attached = runtime.attached
            return seconds(lambda: self.steps(count), CPU) / count


def padding(lengths: Sequence[int]) -> Tensor | None:
    """[B, T] of rows padded on the left; None where none is."""
    if len(set(lengths)) == 1:
        return None
    return torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()


def decoding(model: Any, prompt: Prompt, policy: Policy | None, share: float = 1.0) -> Decoding:
    """A cache after the prompt: a policy's, or transformers' own with the last `share` of it."""
    mask = padding(prompt.lengths)
    if policy is None:
        return Decoding(model, prompt.dynamic(share), None, list(prompt.lengths), mask)
    with attach(model, policy) as runtime:
        return Decoding(model, prompt.under(runtime.new_cache()), policy, list(prompt.lengths), mask)


def everything(model: Any) -> Policy:
    return full_policy(model)
