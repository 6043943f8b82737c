"""One layer of a cache, fed by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer

D = 8
ARGS = AttentionArgs(scaling=D**-0.5)


def prefill(made: PolicyLayer, q: Tensor, k: Tensor, v: Tensor, T: int, valid: Tensor | None = None) -> None:
    """The first T tokens of [B, H, tokens, D] as the prompt."""
    valid = torch.ones(k.shape[0], T, dtype=torch.bool) if valid is None else valid
    made.store_prompt(q[:, :, :T], k[:, :, :T], v[:, :, :T], valid, ARGS)


def append(made: PolicyLayer, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int | None = None) -> Tensor:
    """The attention output of the tokens from `start` on; of that one alone by default."""
    now = slice(start, start + 1 if stop is None else stop)
    return made.append(q[:, :, now], k[:, :, now], v[:, :, now], ARGS)[0]
