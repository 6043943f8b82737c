"""Merger: what evicted tokens leave behind in the slots that stay."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplan.registry import Registry


@dataclass(frozen=True)
class Merged:
    """One row's prompt after merging, in order of time.

    Attributes:
        keys, values: [Hkv, n, D].
        positions: [Hkv, n] int64, the position of each slot's pivot.
        scores: [Hkv, n] float32, what a later eviction ranks by.
        counts: [Hkv, n] int32 tokens that each slot stands for.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    counts: Tensor


class Merger(ABC):
    """Two moments, either of which a merger may use.

    `merges_prompt`: at the end of the prompt, `merge_prompt` makes exactly the layer's slots out of the prompt's tokens
    (instead of the evictor's choice; the evictor's scores say which tokens matter).
    `merges_steps`: after each decode step's attention, `merge_step` adds `parts` of the value that the next token will
    overwrite to others.
    """

    name: ClassVar[str]
    merges_prompt: ClassVar[bool] = False
    merges_steps: ClassVar[bool] = False
    keeps_counts: ClassVar[bool] = False

    def merge_prompt(self, keys: Tensor, values: Tensor, scores: Tensor, slots: int, sinks: int, recent: int) -> Merged:
        """Merge one row's prompt of T tokens down to exactly `slots` slots per head; called only when T > slots.

        Args:
            keys, values: [Hkv, T, D] without padding.
            scores: [Hkv, T] float32; a higher score matters more.
            slots: Slots per head after merging.
            sinks, recent: First and last tokens that stay as they are; `sinks + recent <= slots`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not merge prompts")

    def parts(self, probs: Tensor, victim: Tensor, followers: Tensor) -> Tensor:
        """What part of the victim's value each of its first R followers receives, after one decode step.

        Steps do not know of each other here: many may be asked about together, each as a row.

        Args:
            probs: [b, Hkv, S] float32, this step's attention, mean over the query group.
            victim: [b] int64 slot that the next token overwrites.
            followers: [b, F] int64 the slots of younger tokens (the recent window too, sinks not), oldest first; in a
                ring that is filled by rank, the slots that are overwritten after the victim.

        Returns:
            [b, Hkv, R] float32.
        """
        raise NotImplementedError(f"{type(self).__name__} does not merge while decoding")

    def merge_step(self, values: Tensor, probs: Tensor, victim: Tensor, followers: Tensor) -> Tensor:
        """New values [b, Hkv, S, D] after one decode step, before its victim is overwritten.

        Args:
            values: [b, Hkv, S, D] of full rows.
            probs, victim, followers: As in `parts`.
        """
        parts, values = self.parts(probs, victim, followers), values.clone()
        hand_over(values, parts, victim, followers)
        return values


def hand_over(values: Tensor, parts: Tensor, victim: Tensor, followers: Tensor) -> None:
    """Add parts [b, Hkv, R] of the victim's value to its first R followers, in place; others stay bit-equal.

    Args:
        values: [b, Hkv, S, D].
        victim, followers: As in `Merger.parts`.
    """
    b, Hkv, _, D = values.shape
    R = parts.shape[-1]
    if R == 0:
        return
    work = torch.promote_types(values.dtype, torch.float32)
    value = values.gather(2, victim[:, None, None, None].expand(b, Hkv, 1, D)).to(work)
    index = followers[:, None, :R, None].expand(b, Hkv, R, D)
    received = torch.addcmul(values.gather(2, index).to(work), parts[..., None].to(work), value)
    values.scatter_(2, index, received.to(values.dtype))


mergers: Registry[Merger] = Registry("merger")
