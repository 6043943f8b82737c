"""PerHeadLayer: every KV head is a row of its own, so that heads can hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvplan.methods.codecs import Codec
from kvplan.model_spec import LayerSpec
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer, PromptStats, Seen, heads_to_rows, rows_to_heads
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.storage import Pool


class PerHeadLayer(PolicyLayer):
    """Hands each KV head to an inner layer as a row of one head.

    How many slots a head gets is stated per head in the policy, or decided at the end of the prompt by a head split
    (Feng et al. 2024, Ada-KV, arXiv:2407.11550), or left to an evictor without a fixed budget. The flat storage of the
    inner layer lays heads of different size side by side: nothing is padded to the largest.
    """

    def __init__(self, policy: LayerPolicy, spec: LayerSpec, inner: type[BudgetedLayer], chunked: bool = False) -> None:
        super().__init__()
        self.policy, self.heads_as_rows = policy, spec.kv_heads
        self._split: list[int] | None = None
        self.inner = inner(policy, replace(spec, kv_heads=1), chunked)
        self.inner.capacity_of = self._capacity_of
        self.evicts = self.inner.evicts

    def reset(self) -> None:
        self.inner.reset()
        self.columns, self._split = 0, None

    def _capacity_of(self, index: int, length: int) -> int | None:
        """Slots of a row of the inner layer."""
        if self._split is not None and self._split[index] >= 0:
            return self._split[index]
        return self.policy.capacity(length, index % self.heads_as_rows)

    @property
    def num_rows(self) -> int:
        return self.inner.num_rows // self.heads_as_rows

    @property
    def prompt_lengths(self) -> list[int]:
        return self.inner.prompt_lengths[:: self.heads_as_rows]

    @property
    def appended(self) -> int:
        return self.inner.appended

    @property
    def storage(self) -> tuple[Pool, ...]:
        return self.inner.storage

    def seen(self, row: int) -> int:
        return self.inner.seen(row * self.heads_as_rows)

    def held(self, row: int) -> int:
        first = row * self.heads_as_rows
        return -(-sum(self.inner.held(first + h) for h in range(self.heads_as_rows)) // self.heads_as_rows)

    def held_by_head(self, row: int) -> list[int]:
        """Tokens held by each KV head of a row."""
        return [self.inner.held(row * self.heads_as_rows + h) for h in range(self.heads_as_rows)]

    def held_positions(self, row: int) -> list[Tensor]:
        first = row * self.heads_as_rows
        return [self.inner.held_positions(first + h)[0] for h in range(self.heads_as_rows)]

    @property
    def encoded_alone(self) -> Mapping[str, Codec]:
        return self.inner.encoded_alone

    def select_rows(self, indices: Sequence[int]) -> None:
        H = self.heads_as_rows
        flat = [i * H + h for i in indices for h in range(H)]
        self.inner.select_rows(flat)
        if self._split is not None:
            self._split = [self._split[i] for i in flat]

    # -- tokens ---------------------------------------------------------------------------------------------------

    def observe_prompt(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> PromptStats:
        H, B = self.heads_as_rows, keys.shape[0]
        return self.inner.observe_prompt(
            heads_to_rows(q, H), heads_to_rows(keys, H), heads_to_rows(values, H), valid.repeat_interleave(H, 0),
            args.by_head(B, H),
        )  # fmt: skip

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        H = self.heads_as_rows
        self._split = None
        if self.policy.head_split is not None and stats.scores is not None:
            self._split = [n for b, length in enumerate(lengths) for n in self._split_row(b, length, stats.scores)]
        flat = [length for length in lengths for _ in range(H)]
        stats = replace(stats, codes={name: heads_to_rows(x, H) for name, x in stats.codes.items()})
        self.inner.fill(heads_to_rows(keys, H), heads_to_rows(values, H), flat, stats)

    def _split_row(self, row: int, length: int, scores: Tensor) -> list[int]:
        """Slots of each head of one row; -1 where the prompt fits whole and nothing is split."""
        H, policy = self.heads_as_rows, self.policy
        capacity = policy.capacity(length)
        assert policy.head_split is not None
        if capacity is None or length <= capacity:
            return [-1] * H
        recent = max(policy.recent_tokens, policy.stored_whole[1])
        protected = policy.protected_sinks + recent
        own = scores[row * H : (row + 1) * H, 0, scores.shape[-1] - length :]
        own = own[:, policy.protected_sinks : length - recent]
        # Tokens that leave a recent ring need a slot to go to.
        least = 1 if policy.stored_whole[1] else 0
        split = policy.head_split.split(own, (capacity - protected) * H, least)
        return [n + protected for n in split]

    def append(
        self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, shared: bool = False
    ) -> tuple[Tensor, list[Seen]]:
        H, B = self.heads_as_rows, keys.shape[0]
        out, seen = self.inner.append(
            heads_to_rows(q, H), heads_to_rows(keys, H), heads_to_rows(values, H), args.by_head(B, H), shared
        )
        return rows_to_heads(out, H), seen

    def append_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, list[Seen]]:
        H, B = self.heads_as_rows, keys.shape[0]
        out, seen = self.inner.append_chunk(
            heads_to_rows(q, H), heads_to_rows(keys, H), heads_to_rows(values, H), valid.repeat_interleave(H, 0),
            args.by_head(B, H),
        )  # fmt: skip
        return rows_to_heads(out, H), seen

    def stop_storing(self) -> None:
        self.inner.stop_storing()

    # -- memory ---------------------------------------------------------------------------------------------------

    def bytes_by_kind(self) -> dict[str, int]:
        return self.inner.bytes_by_kind()

    def row_bytes(self, row: int) -> int:
        H = self.heads_as_rows
        return sum(self.inner.row_bytes(row * H + h) for h in range(H))
