"""Rotation: how a model writes positions into queries and keys, as an evictor sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding (RoPE) of one layer, Su et al. 2021, arXiv:2104.09864.

    At position `p` each pair of channels is turned by `p` times its frequency; channels in no pair are left alone. All
    turns commute, so from a rotated query one gets to any other position without its original, and a constant factor
    on all of them (YaRN) stays as it is.

    Attributes:
        first, second: [P] int64 channels of each pair.
        frequencies: [P] float32, radians per token.
    """

    first: Tensor
    second: Tensor
    frequencies: Tensor

    def moved(self, x: Tensor, steps: Tensor, spread: int = 1) -> Tensor:
        """Rotated vectors as they would be some steps later, averaged over several positions in a row.

        Args:
            x: [B, H, T, D].
            steps: [B, T] how many positions later, below 0 for earlier.
            spread: Mean over the positions `steps` to `steps + spread - 1` later.

        Returns:
            [B, H, T, D] in the dtype of `x`.
        """
        # Angles grow with the position; float32 would lose them in a long prompt.
        frequencies = self.frequencies.to(x.device, torch.float64)
        mean = torch.polar(torch.ones_like(frequencies), torch.arange(spread, device=x.device)[:, None] * frequencies)
        angles = steps[..., None].double() * frequencies
        factor = torch.polar(torch.ones_like(angles), angles) * mean.mean(0)  # [B, T, P]
        real, imag = factor.real.to(x.dtype)[:, None], factor.imag.to(x.dtype)[:, None]
        first, second = self.first.to(x.device), self.second.to(x.device)
        a, b = x[..., first], x[..., second]
        turned = x.clone()
        turned[..., first] = a * real - b * imag
        turned[..., second] = b * real + a * imag
        return turned
