"""PolicyLayer: what every layer of a `PolicyCache` answers to transformers and to the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvplan.errors import RuntimeLimitError
from kvplan.methods.codecs import Codec
from kvplan.policy.layout import KINDS
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.parts import Part
from kvplan.runtime.kernels.stored import attend_parts
from kvplan.runtime.storage import Pool


@dataclass(frozen=True)
class PromptStats:
    """What a layer's policy needs of a whole prompt, beside its keys and values.

    Attributes:
        scores: [B, H, T] float32 of the evictor, H is Hkv or 1; None: nothing is ranked.
        channels: [B, Hkv, C] int64 key channels that stay; None: all.
        codes: The prompt as its codecs encode it, [B, Hkv, T, width] by column (`keys.codes`), where that is known
            already: a vector that stands alone has the same code whatever is encoded with it.
    """

    scores: Tensor | None = None
    channels: Tensor | None = None
    codes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What some queries of one forward looked at; a layer that shares this layer's cache attends over the same.

    Attributes:
        start, stop: Rows (of KV heads, where each of them is a row).
        first, last: Queries.
    """

    start: int
    stop: int
    first: int
    last: int
    parts: tuple[Part, ...]


class PolicyLayer(CacheLayerMixin):
    """One decoder layer of a `PolicyCache`."""

    is_sliding = False
    columns = 0  # seen so far, padding included
    heads_as_rows = 0  # KV heads, where each of them is stored as a row of its own; else 0
    stores = True  # False: no forward follows the next one, so what it brings need not be stored
    policy: LayerPolicy
    evicts: bool

    # -- the transformers interface -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Storing happens in the attention call that follows; see `runtime.attention`."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen, padding included (the cache sets it)."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise RuntimeLimitError(
            "kvplan's cache cannot be offloaded layer by layer; drop offloading from the cache settings"
        )

    prefetch = offload

    def crop(self, max_length: int) -> None:
        raise RuntimeLimitError(
            "kvplan's cache cannot give tokens back, so assisted and prompt-lookup decoding do not work with it; "
            "generate without an assistant"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([i for i in range(self.num_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices.tolist())

    # -- what the cache asks --------------------------------------------------------------------------------------

    @property
    def encoded_alone(self) -> Mapping[str, Codec]:
        """The codecs of `keys` and `values` whose codes of a prompt are just picked from those of all its tokens."""
        return {}

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the prompt."""

    @property
    @abstractmethod
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt."""

    @property
    @abstractmethod
    def appended(self) -> int:
        """Tokens after the prompt, the same in every row."""

    @abstractmethod
    def seen(self, row: int) -> int:
        """Tokens of a row so far."""

    @abstractmethod
    def held(self, row: int) -> int:
        """Tokens held of a row; a mean over the KV heads, rounded up, where they differ."""

    @abstractmethod
    def held_positions(self, row: int) -> list[Tensor]:
        """Positions of the tokens that a row holds, one ascending [n] int64 per KV head; empty where it shares.

        Raises:
            RuntimeLimitError: the layer does not store them; see `runtime.held`.
        """

    @abstractmethod
    def select_rows(self, indices: Sequence[int]) -> None:
        """Keep the given rows, in that order (beam search, repeats)."""

    @abstractmethod
    def observe_prompt(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> PromptStats:
        """Rank the prompt.

        Args:
            q: [B, Hq, T, D] the prompt's queries.
            keys, values: [B, Hkv, T, D] of a left-padded batch; valid: [B, T] bool.
        """

    def store_prompt(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs) -> None:
        """Rank a prompt, keep what fits, and forget the rest; the arguments of `observe_prompt`."""
        lengths = [int(n) for n in valid.sum(-1).tolist()]
        self.fill(keys, values, lengths, self.observe_prompt(q, keys, values, valid, args))

    @abstractmethod
    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        """Keep of a left-padded prompt what fits, and forget the rest."""

    @abstractmethod
    def append(
        self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, shared: bool = False
    ) -> tuple[Tensor, list[Seen]]:
        """Take new tokens in and attend.

        Args:
            q: [B, Hq, T, D]; keys, values: [B, Hkv, T, D].
            shared: Whether other layers will look at what was seen.

        Returns:
            The attention output [B, T, Hq, Dv] and what was visible.
        """

    def stop_storing(self) -> None:
        """The next forward is the last one: several tokens are then attended to and forgotten."""
        self.stores = False

    @abstractmethod
    def append_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, list[Seen]]:
        """Take a piece of the prompt in: attend over the slots and the piece, then evict.

        Args:
            q: [B, Hq, T, D]; keys, values: [B, Hkv, T, D].
            valid: [B, T] bool of the piece, False on padding.
        """

    @abstractmethod
    def bytes_by_kind(self) -> dict[str, int]:
        """Storage bytes held now."""

    @abstractmethod
    def row_bytes(self, row: int) -> int:
        """Storage bytes of one row."""

    @property
    @abstractmethod
    def storage(self) -> tuple[Pool, ...]:
        """What the layer has allocated."""


NO_BYTES = dict.fromkeys(KINDS, 0)


def heads_to_rows(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hkv * G, T, D] -> [B * Hkv, G, T, D]."""
    return x.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def rows_to_heads(out: Tensor, kv_heads: int) -> Tensor:
    """[B * Hkv, T, G, Dv] -> [B, T, Hkv * G, Dv]."""
    return out.unflatten(0, (-1, kv_heads)).transpose(1, 2).flatten(2, 3)


def attend_seen(q: Tensor, seen: Sequence[Seen], args: AttentionArgs) -> Tensor:
    """Attention over what was seen: [B, Hq, T, D] queries in, [B, T, Hq, Dv] out."""
    if len(seen) == 1:
        return attend_parts(q, seen[0].parts, args)[0]
    B, Hq, T, _ = q.shape
    out = q.new_empty(B, T, Hq, seen[0].parts[0].values.dim)
    for s in seen:
        rows, queries = slice(s.start, s.stop), slice(s.first, s.last)
        out[rows, queries] = attend_parts(q[rows, :, queries], s.parts, args.of_rows(s.start, s.stop))[0]
    return out


def cloned(seen: Sequence[Seen]) -> list[Seen]:
    """Copies that later writes to the slots do not touch."""

    def part(p: Part) -> Part:
        keys = replace(p.keys, codes={name: t.clone() for name, t in p.keys.codes.items()})
        values = replace(p.values, codes={name: t.clone() for name, t in p.values.codes.items()})
        return replace(p, keys=keys, values=values, bias=None if p.bias is None else p.bias.clone())

    return [replace(s, parts=tuple(part(p) for p in s.parts)) for s in seen]


def prefix_mask(counts: Sequence[int], width: int, device: torch.device) -> Tensor | None:
    """[b, 1, 1, width] bool: the first `counts` slots of each row are visible; None when all are."""
    if min(counts) == width:
        return None
    limit = torch.tensor(counts, device=device)[:, None, None, None]
    return torch.arange(width, device=device) < limit


@lru_cache(maxsize=64)
def column(numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[B, 1, 1] integers, not to be written to. All layers of a step ask for the same ones."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)[:, None, None]
