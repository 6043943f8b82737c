"""What every decode kernel takes and returns: sequences of slots of unequal length in flat buffers.

A row and KV head is one sequence, whatever its budget, so ragged batches and budgets per head are the same problem:
N = B * Hkv sequences, each asked by the G queries of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Where the slots of each sequence lie in a flat buffer.

    Attributes:
        starts: [N] int64, first slot.
        held: [N] int32, slots in use, counted from the start; at most `longest`.
        longest: No sequence holds more. Known without asking the device; a captured graph is laid out for it.
        even: Slots from each start to the next where all are equal and the first start is 0, so that the buffer is a
            plain [N, even, D] tensor; else None. Only a hint for the paths that want views.
    """

    starts: Tensor
    held: Tensor
    longest: int
    even: int | None = None

    @classmethod
    def of(cls, sizes: Sequence[int], held: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        """Sequences that lie one after the other: `sizes[n]` slots each, the first `held[n]` of them in use."""
        starts = [0, *accumulate(sizes)][:-1]
        return cls(
            torch.tensor(starts, dtype=torch.int64, device=device),
            torch.tensor(list(held), dtype=torch.int32, device=device),
            longest=max(held),
            even=sizes[0] if len(set(sizes)) == 1 else None,
        )

    def __len__(self) -> int:
        return self.starts.shape[0]


class Probs(Enum):
    """Which attention probabilities a decode returns beside its output."""

    NONE = "none"
    HEADS = "heads"  # [N, G, longest]
    MEAN = "mean"  # [N, longest], mean over the group: what scores per KV head are made of


@dataclass(frozen=True)
class DecodeArgs:
    """What one decode step asks of attention.

    Attributes:
        scaling: Factor on the query-key products.
        softcap: Logit soft cap (Gemma 2), or None.
        sink_logits: [N, G] learned logits that take mass and add nothing (gpt-oss), or None.
        bias: [slots of the buffer] float32, added to the logits of a slot for all queries, after the soft cap; finite.
            Or None.
        probs: Which probabilities to return.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    probs: Probs = Probs.NONE


@dataclass(frozen=True)
class Decoded:
    """The attention of one query token per query head.

    Attributes:
        out: [N, G, Dv] in the dtype of the queries.
        lse: [N, G] float32 log of the sum of exponentiated logits, sinks included; -inf where nothing was visible.
            None where a path cannot give it and was not asked.
        probs: As asked (`Probs`), float32, slots counted from each start, 0 on slots not in use.
    """

    out: Tensor
    lse: Tensor | None = None
    probs: Tensor | None = None


def merge(parts: Sequence[Decoded]) -> Decoded:
    """Attention over disjoint sets of slots, from the attention over each; probabilities lie side by side.

    For codecs that keep recent tokens as they are: one part is the encoded body, another the recent tokens. Sink
    logits must have gone into exactly one part.

    Args:
        parts: Each with its `lse`, and all or none with `Probs.HEADS` (means over heads cannot be reweighted).
    """
    lses = torch.stack([part.lse for part in parts if part.lse is not None])  # [parts, N, G]
    assert len(lses) == len(parts)
    lse = lses.logsumexp(0)
    shares = torch.exp(lses - lse).nan_to_num(0.0)[..., None]
    out = (torch.stack([part.out for part in parts]) * shares).sum(0)  # [N, G, Dv]
    probs = [part.probs * share for part, share in zip(parts, shares, strict=True) if part.probs is not None]
    assert len(probs) in (0, len(parts)) and all(p.dim() == 3 for p in probs)
    return Decoded(out.to(parts[0].out.dtype), lse, torch.cat(probs, -1) if probs else None)
