"""ChannelSelector: which key channels a layer stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kvplan.registry import Registry


class ChannelSelector(ABC):
    """Chooses, at the end of the prompt, the key channels that stay, per row and KV head.

    The most recent `recent_tokens` keys are stored whole; a key that grows older than that is pruned. Values are never
    pruned. Logits keep the scale of the whole head.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def recent_tokens(self) -> int:
        """The most recent tokens whose keys are stored whole."""

    @property
    @abstractmethod
    def window_tokens_needed(self) -> int:
        """How many of the prompt's last queries `select` reads."""

    @abstractmethod
    def num_kept(self, dim: int) -> int:
        """Channels kept of `dim`; at least 1."""

    @abstractmethod
    def select(self, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        """The channels that stay, in ascending order.

        Args:
            queries: [B, Hq, W, D] the prompt's last queries (of all layers that read this cache, where it is shared).
            keys: [B, Hkv, T, D].
            valid: [B, T] bool, False on padding; the last W columns are those of `queries`.

        Returns:
            [B, Hkv, num_kept(D)] int64.
        """


channel_selectors: Registry[ChannelSelector] = Registry("channel selector")
