"""KeyDiff: keys that differ from the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvplan.methods.evictors.base import Evictor, PromptView, evictors


@evictors.register("keydiff")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evictor):
    """Keep the tokens whose keys point least into the mean direction of all keys.

    Park et al. 2025, arXiv:2504.15364. Reading a prompt in chunks is the paper's own way: slots and chunk compete, and
    the mean is over both. The paper also drops by it at each decode step; here a new token takes the slot of the key
    that was most like the mean at the end of the prompt.
    """

    def score(self, view: PromptView) -> Tensor:
        """Return [B, Hkv, T] float32: minus the cosine with the mean of the keys' directions."""
        directions = F.normalize(view.keys.float(), dim=-1) * view.valid[:, None, :, None]
        anchor = directions.sum(2, keepdim=True)  # [B, Hkv, 1, D]; the cosine does not see its length
        return -F.cosine_similarity(directions, anchor, dim=-1)
