"""Decoding by hand on a cache that already holds a prompt, one row at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kvplan.runtime.attach import Runtime
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.generation import end_tokens
from kvplan.runtime.replay import forward


def greedy(runtime: Runtime, cache: PolicyCache, logits: Tensor, position: int, most: int) -> tuple[int, ...]:
    """The likeliest tokens one after the other, up to the model's end token, which is not among them.

    Args:
        cache: Of one row; it is changed.
        logits: [1, V], the prediction at `position`.
        position: Tokens before the first new one.
        most: Most new tokens.
    """
    ends, tokens = end_tokens(runtime.model), []
    while (token := int(logits.argmax(-1))) not in ends:
        tokens.append(token)
        if len(tokens) == most:
            break
        ids, at = (torch.tensor([[n]], device=logits.device) for n in (token, position + len(tokens) - 1))
        logits = forward(runtime, cache, ids, at, None)[:, -1]
    return tuple(tokens)


def copied(cache: PolicyCache) -> PolicyCache:
    """A cache that goes its own way; the plan that both follow is one."""
    same = (cache.policy, cache.spec, cache.attached)
    return copy.deepcopy(cache, {id(value): value for value in same})
