"""Evictor: which tokens stay in a layer's cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Flag, auto
from typing import ClassVar

from torch import Tensor

from kvplan.methods.rotation import Rotation
from kvplan.registry import Registry

POSITION_BYTES = 4  # int32
SCORE_BYTES = 4  # float32


class Signal(Flag):
    """What an evictor needs from the attention of the prompt."""

    NONE = 0
    QUERIES = auto()  # the last queries of the prompt
    COLUMN_SUMS = auto()  # attention mass that each key received from all queries of the prompt
    ALL_QUERIES = auto()  # the whole prompt's queries
    ROTATION = auto()  # how positions are written into them


@dataclass(frozen=True)
class PromptView:
    """One layer's prompt, as an evictor sees it. Rows are padded on the left.

    Attributes:
        queries: [B, Hq, W, D] the last `W <= T` queries (rotated), or None when not asked for.
        keys: [B, Hkv, T, D] rotated keys.
        values: [B, Hkv, T, D].
        column_sums: [B, Hkv, T] float32, mean over the query group of each key's attention mass; or None.
        valid: [B, T] bool, False on padding.
        scaling: factor on the query-key products.
        softcap: logit soft cap of the model, or None.
        sink_logits: [Hq] learned logits that take softmax mass (gpt-oss), or [B, Hq]; or None.
        positions: [B, H, T] positions where the columns are not in order of time (a chunk beside the slots kept so
            far), H is Hkv or 1; or None: column order.
        sink_tokens: First tokens of each row that the layer keeps whatever they score.
        rotation: How queries and keys were rotated; None: the model does not rotate them.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    scaling: float
    queries: Tensor | None = None
    column_sums: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    positions: Tensor | None = None
    sink_tokens: int = 0
    rotation: Rotation | None = None

    @property
    def times(self) -> Tensor:
        """[B, Hkv or 1, T] int64 position of each column's token in its row; of no meaning on padding."""
        return (self.valid.cumsum(-1) - 1)[:, None] if self.positions is None else self.positions


@dataclass(frozen=True)
class Step:
    """What `observe` may know of a decode step.

    Attributes:
        now: [b, 1, 1] int64 position of the step's token.
        held: [b, H or 1, 1] int64 slots that the step's query saw, its own included.
    """

    now: Tensor
    held: Tensor


class Evictor(ABC):
    """Ranks the tokens of a prompt, and says how the ranking moves while decoding.

    Two kinds of storage follow from `keeps_scores`:
    - False: the pool is filled in rank order once, and decoding overwrites the lowest-ranked slot, then the next
      (a ring). No byte beyond keys and values.
    - True: position (int32) and score (float32) are kept per slot, and each decode step updates the scores.
    """

    name: ClassVar[str]
    needs: ClassVar[Signal] = Signal.NONE
    keeps_scores: ClassVar[bool] = False
    one_set_for_all_heads: ClassVar[bool] = False
    keeps_sinks: ClassVar[bool] = True

    @property
    def window_tokens_needed(self) -> int:
        """How many of the prompt's last queries `score` reads."""
        return 0

    @abstractmethod
    def score(self, view: PromptView) -> Tensor:
        """Score the prompt: [B, Hkv, T] float32, or [B, 1, T] with one set for all heads; a higher score stays longer.

        Scores at padding are ignored. Protected tokens are the caller's business.
        """

    @property
    def forgets_after(self) -> int | None:
        """Decode steps after which a token that `observe` no longer lifts is dropped although there is room, or None.

        Such an evictor's scores are positions: a token is dropped once its score is that far behind. The layer's
        slots are then a cap, and what it holds differs between heads.
        """
        return None

    def observe(self, scores: Tensor, probs: Tensor, step: Step) -> Tensor:
        """New slot scores after one decode step; only called when `keeps_scores`.

        Args:
            scores: [B, H, S] float32 stored scores (0 for the token just inserted), H = Hkv or 1.
            probs: [B, Hkv, G, S] float32 attention of the step's query over the slots; 0 on empty slots.
            step: When it was, and how many slots the query saw.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no scores")

    def side_bytes_per_slot(self, num_kv_heads: int) -> int:
        """Bytes beside keys and values for one slot of all KV heads."""
        if not self.keeps_scores:
            return 0
        return (POSITION_BYTES + SCORE_BYTES) * (1 if self.one_set_for_all_heads else num_kv_heads)


evictors: Registry[Evictor] = Registry("evictor")
