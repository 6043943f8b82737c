"""KVMerger: runs of neighbours with alike keys become one slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.mergers.base import Merged, Merger, mergers
from kvplan.methods.params import Choice, tunable


@mergers.register("kvmerger")
@dataclass(frozen=True, kw_only=True)
class KVMerger(Merger):
    """Merge runs of adjacent tokens with alike keys, weighted by a Gaussian around the run's highest-scored token.

    Wang et al. 2024, arXiv:2407.08454. Neighbours belong to one run while the cosine of their keys is above a
    threshold, never across a protected token: sinks, recent tokens, or the highest scores of the rest (`heavy`). The
    paper's threshold is fixed and the size of the cache follows; here the threshold of each head is the one at which
    the runs are as many as the slots, but never below `similarity`. What is too much even there is dropped, the run
    with the lowest score first. The paper multiplies merged values by the size of the run; here each slot counts the
    tokens it stands for and attention adds ln(count) to its logit, which is exact when keys and values were equal. The
    paper's sigma is circular; ours is the run's own spread, or a number.

    A merged slot has the position and the score of its pivot, the highest-scored member.

    Args:
        similarity: Cosine of neighbouring keys, -1 to 1, at or below which they never merge. The paper's is 0.75.
        heavy: Share of the unprotected slots, 0 to 1, that keep the highest-scored tokens as they are.
        sigma: Width of the Gaussian in the units of a key, or "adaptive": root mean squared distance of the run's other
            members to the pivot.

    Raises:
        MethodError: a parameter is out of range.
    """

    merges_prompt: ClassVar[bool] = True
    keeps_counts: ClassVar[bool] = True
    similarity: float = tunable(0.75, Choice(0.0, 0.5, 0.75, 0.9))
    heavy: float = tunable(0.25, Choice(0.0, 0.25, 0.5))
    sigma: float | Literal["adaptive"] = "adaptive"

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1:
            raise MethodError(f"kvmerger.similarity is {self.similarity}; a cosine lies between -1 and 1")
        if not 0 <= self.heavy <= 1:
            raise MethodError(f"kvmerger.heavy is {self.heavy}; it must be between 0 and 1")
        if self.sigma != "adaptive" and (isinstance(self.sigma, str) or not self.sigma > 0):
            raise MethodError(f"kvmerger.sigma is '{self.sigma}'; it must be adaptive or a number above 0")

    def merge_prompt(self, keys: Tensor, values: Tensor, scores: Tensor, slots: int, sinks: int, recent: int) -> Merged:
        """Exactly `slots` slots per head, in order of time; a token that was not merged is bit-equal.

        Ties in scores and cosines go to the later token.
        """
        T = keys.shape[1]
        assert sinks + recent <= slots < T
        position = torch.arange(T, device=keys.device).expand(scores.shape)  # [Hkv, T]
        protected = (position < sinks) | (position >= T - recent)
        kept_whole = protected | self._heavy(scores, protected, slots - sinks - recent)
        starts = ~self._joins(keys, kept_whole, T - slots)
        run = F.pad(starts, (1, 0)).cumsum(-1)  # [Hkv, T]: 0, 1, ... in order of time

        # Per run, in the first columns of [Hkv, T].
        lowest = torch.finfo(scores.dtype).min
        best = scores.new_full(scores.shape, lowest).scatter_reduce(1, run, scores, "amax")
        pivot = position.new_zeros(run.shape).scatter_reduce(
            1, run, torch.where(scores == best.gather(1, run), position, 0), "amax"
        )
        counts = torch.zeros_like(run).scatter_add(1, run, torch.ones_like(run))

        rank = best.masked_fill(counts == 0, -torch.inf)  # fewer runs than T
        rank = rank.masked_fill(protected.gather(1, pivot) & (counts > 0), torch.inf)
        later_first = rank.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :slots]
        kept = (T - 1 - later_first).sort(-1).values  # [Hkv, slots]
        positions, members = pivot.gather(1, kept), counts.gather(1, kept)

        # Most runs are one token, which is its own pivot. The others' members, [m] of all heads together:
        own = torch.arange(slots, device=keys.device).expand_as(kept)
        slot = torch.full_like(run, -1).scatter(1, kept, own.masked_fill(members < 2, -1))
        head, token = (slot.gather(1, run) >= 0).nonzero(as_tuple=True)
        target = head * slots + slot[head, run[head, token]]
        weights = self._weights(keys, head, token, target, positions.flatten(), members.flatten())
        several, run_of = target.unique(return_inverse=True)

        def merged(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            first = torch.arange(len(x), device=x.device)[:, None] * T
            whole = flat.index_select(0, (first + positions).flatten())
            work = torch.promote_types(x.dtype, torch.float32)
            parts = weights[:, None] * flat.index_select(0, head * T + token).to(work)
            sums = parts.new_zeros(len(several), x.shape[-1]).index_add_(0, run_of, parts)
            return whole.index_copy_(0, several, sums.to(x.dtype)).unflatten(0, positions.shape)

        return Merged(
            keys=merged(keys),
            values=merged(values),
            positions=positions,
            scores=best.gather(1, kept),
            counts=members.int(),
        )

    def _heavy(self, scores: Tensor, protected: Tensor, free: int) -> Tensor:
        """[Hkv, T] bool: the highest scores that are not protected already."""
        T = scores.shape[1]
        ranked = scores.masked_fill(protected, -torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
        heavy = T - 1 - ranked[:, : int(self.heavy * free)]
        return torch.zeros_like(protected).scatter(1, heavy, True)

    def _joins(self, keys: Tensor, kept_whole: Tensor, wanted: int) -> Tensor:
        """[Hkv, T - 1] bool: token t and t + 1 are one run; the `wanted` most alike pairs, or all that may join.

        The threshold that a search by bisection would approach is the last of these cosines; a sort finds it exactly.
        """
        units = F.normalize(keys.float(), dim=-1)
        cosines = (units[:, :-1] * units[:, 1:]).sum(-1)
        allowed = ~(kept_whole[:, :-1] | kept_whole[:, 1:]) & (cosines > self.similarity)
        ranked = cosines.masked_fill(~allowed, -torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
        alike = cosines.shape[1] - 1 - ranked[:, :wanted]
        return torch.zeros_like(allowed).scatter(1, alike, True) & allowed

    def _weights(
        self, keys: Tensor, head: Tensor, token: Tensor, target: Tensor, pivot: Tensor, counts: Tensor
    ) -> Tensor:
        """[m] float32: the part in its run of each token that is merged with others; sums to 1 per run.

        Args:
            keys: [Hkv, T, D].
            head, token: [m] int64, where each of these tokens is.
            target: [m] int64, the slot of its run among those of all heads.
            pivot, counts: [Hkv * slots] int64, position of the pivot and members of each slot's run.
        """
        apart = keys[head, token].float() - keys[head, pivot[target]].float()
        distance = apart.square().sum(-1)  # squared

        def per_run(x: Tensor) -> Tensor:
            return x.new_zeros(len(counts)).index_add_(0, target, x)

        if isinstance(self.sigma, str):
            variance = (per_run(distance) / (counts - 1).clamp(min=1))[target]
        else:
            variance = torch.full_like(distance, self.sigma**2)
        # Members that equal the pivot are at distance 0, whatever the spread.
        gaussian = torch.exp(-distance / (2 * variance).clamp(min=torch.finfo(distance.dtype).tiny))
        return gaussian / per_run(gaussian)[target]
