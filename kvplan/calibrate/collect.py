"""One instrumented forward per batch: attention shape, norms and what attention does to the residual stream."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvplan.calibrate.attention_shape import (
    LAST_ROWS,
    SPREAD_ROWS,
    attention_shape,
    head_cosine,
    sampled_rows,
    softcapped_attention,
)
from kvplan.calibrate.examples import Example
from kvplan.calibrate.residual import ResidualProbe, decoder_layers
from kvplan.calibrate.statistics import (
    MASS_LEVELS,
    MOMENT_NAMES,
    NORM_LEVELS,
    PREFIX_LEVELS,
    SHARING_TOKENS,
    LayerProfile,
    Moments,
    Statistics,
)
from kvplan.errors import DataError, ModelError
from kvplan.loading import check_tokens
from kvplan.placement import input_device

IMPLEMENTATION = "kvplan_calibrate"

Progress = Callable[[int, int], None]


@dataclass
class _Batch:
    """The prompts of one forward, and what is measured of them. Rows are padded on the left.

    Attributes:
        valid: [B, T] bool, False on padding.
        rows: [B, R] columns of the sampled queries, the last query first.
        weights: [B, R] float32, 0 where a prompt has fewer than R samples; each prompt's weights sum to 1.
    """

    valid: Tensor
    rows: Tensor
    weights: Tensor
    sinks: int
    recent: int
    values: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, sinks: int, recent: int) -> _Batch:
        T = max(lengths)
        samples = [sampled_rows(n) for n in lengths]
        R = max(map(len, samples))
        rows = torch.tensor(
            [[T - n + r for r in s] + [T - 1] * (R - len(s)) for n, s in zip(lengths, samples, strict=True)]
        )
        weights = torch.tensor([[1 / len(s)] * len(s) + [0.0] * (R - len(s)) for s in samples])
        valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
        return cls(valid.to(device), rows.to(device), weights.to(device), sinks, recent)

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @property
    def behind_sinks(self) -> Tensor:
        """[B, T] bool: a prompt's tokens behind its first ones; all of them where there are no more."""
        place = self.valid.cumsum(1)
        return self.valid & (place > self.sinks) | (self.valid & (place[:, -1:] <= self.sinks))

    def token_mean(self, values: Tensor) -> Tensor:
        """[B, ..., T] -> [B, ...]: mean over a prompt's own tokens."""
        valid = self.valid.view(len(self.valid), *[1] * (values.dim() - 2), -1)
        return values.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1)


# The attention function is looked up by name and gets no argument from us. A context variable keeps two threads apart.
_ACTIVE: ContextVar[_Batch] = ContextVar("kvplan_calibrate_batch")


def collect(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 4,
    sinks: int = 4,
    recent: int = 16,
    progress: Progress | None = None,
) -> Statistics:
    """Measure a decoder-only model on the prompts of `examples` (not their continuations).

    The model is left as it was found, also when something fails.

    Args:
        model: A transformers model whose attention goes through `AttentionInterface`.
        batch_size: Prompts per forward; prompts of like length share one. Results do not depend on it.
        sinks: First tokens of a prompt that count as sinks.
        recent: Last tokens before a query, its own included, that count as recent.
        progress: Called with (prompts done, prompts in all).

    Raises:
        DataError: no prompts, or an empty one.
        ModelError: the model's layers or attention cannot be instrumented, or its activations are not finite.
    """
    if not examples:
        raise DataError("no prompts to calibrate on")
    if empty := [e.id for e in examples if not e.prompt_ids]:
        raise DataError(f"example {empty[0]}: the prompt is empty")
    for example in examples:
        check_tokens(model, example.prompt_ids, f"prompt {example.id!r}")
    base = getattr(model, "base_model", model)
    layers = decoder_layers(base)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt_ids))
    per_prompt: list[dict[str, list[np.ndarray]]] = [defaultdict(list) for _ in layers]
    sums: list[list[np.ndarray] | None] = [None] * len(layers)
    start, measuring = time.perf_counter(), 0.0
    with _instrumented(model, layers):
        for first in range(0, len(order), batch_size):
            chosen = [examples[i] for i in order[first : first + batch_size]]
            batch = _forward(base, [e.prompt_ids for e in chosen], sinks, recent)
            for i, target in enumerate(per_prompt):
                if set(batch.values[i]) != set(MOMENT_NAMES):
                    raise ModelError(f"layer {i}: its attention does not go through transformers' AttentionInterface")
                for name in MOMENT_NAMES:
                    target[name].append(batch.values[i][name].double().cpu().numpy())
                new = [x.double().cpu().numpy() for x in batch.keys[i]]
                old = sums[i]
                sums[i] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
            measuring += batch.seconds
            if progress is not None:
                progress(min(first + batch_size, len(order)), len(order))
    total = time.perf_counter() - start
    profiles = []
    for i, target in enumerate(per_prompt):
        arrays = {name: np.concatenate(chunks) for name, chunks in target.items()}
        if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise ModelError(f"layer {i}: {bad[0]} is not finite; try --dtype float32")
        key_sum, value_sum = (x.astype(np.float32) for x in sums[i] or [])
        moments = {name: Moments.of(array) for name, array in arrays.items()}
        profiles.append(LayerProfile(**moments, key_sum=key_sum, value_sum=value_sum))
    return Statistics(
        layers=tuple(profiles),
        prompt_hashes=tuple(sorted(prompt_hash(e) for e in examples)),
        num_tokens=sum(len(e.prompt_ids) for e in examples),
        sharing_prompts=sum(len(e.prompt_ids) >= SHARING_TOKENS for e in examples),
        settings={
            "sinks": sinks,
            "recent": recent,
            "last_rows": LAST_ROWS,
            "spread_rows": SPREAD_ROWS,
            "mass_levels": list(MASS_LEVELS),
            "prefix_levels": list(PREFIX_LEVELS),
            "norm_levels": list(NORM_LEVELS),
        },
        seconds={"forward": total - measuring, "statistics": measuring},
    )


def prompt_hash(example: Example) -> str:
    """Identity of a prompt: its id and its tokens."""
    text = f"{example.id}:{','.join(map(str, example.prompt_ids))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _forward(base: nn.Module, prompts: list[tuple[int, ...]], sinks: int, recent: int) -> _Batch:
    """Run one batch, padded on the left; the hooks and the attention function fill the returned batch."""
    device = input_device(base)
    lengths = [len(p) for p in prompts]
    batch = _Batch.of(lengths, device, sinks, recent)
    T = max(lengths)
    # Any token will do as padding: nothing attends to it.
    ids = torch.tensor([[p[0]] * (T - len(p)) + list(p) for p in prompts], device=device)
    kwargs: dict[str, Any] = {"attention_mask": batch.valid.long() if min(lengths) < T else None, "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        kwargs["position_ids"] = (batch.valid.cumsum(1) - 1).clamp_min(0)
    token = _ACTIVE.set(batch)
    try:
        with torch.inference_mode():
            base(input_ids=ids, **kwargs)
    finally:
        _ACTIVE.reset(token)
    return batch


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, with statistics taken on the way."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("position_bias") is not None:
        raise ModelError("a model with a position bias (ALiBi, T5) cannot be calibrated")
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    batch = _ACTIVE.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    with batch.timed():
        batch.values[layer] |= attention_shape(
            query,
            key,
            attention_mask,
            batch.rows,
            batch.weights,
            batch.valid,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
            sinks=batch.sinks,
            recent=batch.recent,
        )
        batch.values[layer] |= {
            "key_norm": batch.token_mean(torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32)),
            "value_norm": batch.token_mean(torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)),
        }
        batch.keys[layer] = (_first_tokens(key, batch.valid), _first_tokens(value, batch.valid))
    if softcap is None and sink_logits is None:
        output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    else:
        output = softcapped_attention(query, key, value, attention_mask, scaling, softcap, sink_logits)
    with batch.timed():
        batch.values[layer]["head_cosine"] = head_cosine(value, output, batch.behind_sinks)
    return output, None


def _cosine(layer: int, before: Tensor, after: Tensor) -> None:
    batch = _ACTIVE.get()
    with batch.timed():
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
        batch.values[layer]["cosine"] = batch.token_mean(cosine)


def _first_tokens(states: Tensor, valid: Tensor) -> Tensor:
    """[B, H, T, D] -> [H, 64, D] float32: sum over the prompts of at least 64 tokens of their first 64."""
    total = torch.zeros(states.shape[1], SHARING_TOKENS, states.shape[3], device=states.device)
    for row, length in zip(states, valid.sum(1).tolist(), strict=True):
        if length >= SHARING_TOKENS:
            start = states.shape[2] - length
            total += row[:, start : start + SHARING_TOKENS]
    return total


@contextmanager
def _instrumented(model: Any, layers: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Our attention function and hooks on the model, in eval mode; all undone at the end."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    implementation, training = model.config._attn_implementation, model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        stack.callback(model.set_attn_implementation, implementation)
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            raise ModelError(
                f"{model.config.model_type}: its attention does not go through transformers' AttentionInterface"
            )
        for index, (layer, attention) in enumerate(layers):
            ResidualProbe(layer, attention, partial(_cosine, index)).hook(stack)
        yield
