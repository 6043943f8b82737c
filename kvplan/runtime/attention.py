"""The one attention function and the one mask function that kvplan registers with transformers.

Call order in a forward pass: `cache.get_mask_sizes` -> mask function -> per layer `cache.update` -> attention
function. `get_mask_sizes` says whose mask is coming, `update` leaves the keys whose attention is coming; calls that
belong to no `PolicyCache` get transformers' own SDPA, unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvplan.errors import RuntimeLimitError
from kvplan.runtime.cache import HANDOFF
from kvplan.runtime.kernels.dense import AttentionArgs, attend

IMPLEMENTATION = "kvplan"


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """Keep the 2-D padding mask for the cache; build transformers' own mask only for a whole prompt."""
    cache, HANDOFF.mask_for = HANDOFF.mask_for, None
    if cache is None:
        return sdpa_mask(*args, **kwargs)
    padding = kwargs.get("attention_mask")
    cache.padding, cache.mask_noted = padding, True
    if cache.in_prompt_chunks(kwargs["q_length"]):
        return None
    if cache.get_seq_length() and kwargs["q_length"] > 1 and padding is not None:
        _refuse_padding(padding[:, -kwargs["q_length"] :])
    return sdpa_mask(*args, **kwargs) if cache.get_seq_length() == 0 else None


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under a policy: [B, Hq, T, D] queries in, [B, T, Hq, Dv] out."""
    args = AttentionArgs(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )

    def prefill(keys: Tensor, values: Tensor) -> Tensor:
        if args.plain:
            return sdpa_attention_forward(
                module, query, keys, values, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )[0]
        return attend(query, keys, values, _bool_mask(attention_mask, query, keys), args)

    pending, HANDOFF.pending = HANDOFF.pending, None
    if pending is None:
        if getattr(getattr(module, "k_proj", None), "stands_in", False):
            raise RuntimeLimitError(
                "the attached policy takes the keys of some layers from others, which works only with its own cache; "
                "pass past_key_values=runtime.new_cache(), or leave the `with` block"
            )
        return prefill(key, value), None
    keys, cache, index = pending
    if keys is not key:
        raise RuntimeLimitError(
            f"layer {index}: the model changes its keys after the cache took them (latent attention?); "
            "kvplan does not support it"
        )
    if kwargs.get("position_bias") is not None:
        raise RuntimeLimitError(f"layer {index}: position biases are not supported with an evicting cache")
    return cache.run_layer(index, query, key, value, args, prefill), None


def _refuse_padding(mask: Tensor) -> None:
    if not bool(mask.all()):
        raise RuntimeLimitError(
            "a later turn has padding in it; kvplan's cache takes padding only on the left of the first prompt: "
            "give every row as many new tokens, or run the rows one by one"
        )


def _bool_mask(mask: Tensor | None, query: Tensor, keys: Tensor) -> Tensor:
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask >= 0
    T, S = query.shape[2], keys.shape[2]
    return torch.ones(T, S, dtype=torch.bool, device=keys.device).tril(S - T)[None, None]


def register() -> str:
    """Make the implementation known to transformers; harmless when repeated."""
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
    return IMPLEMENTATION
