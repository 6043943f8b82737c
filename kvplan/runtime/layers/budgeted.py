"""BudgetedLayer: a layer that owns a pool of slots and an evictor that decides who stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvplan.errors import RuntimeLimitError
from kvplan.methods.evictors import evictors
from kvplan.model_spec import LayerSpec
from kvplan.policy.memory import allocated_slots
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime.extend import RowState, ring_slot, ring_visibility, score_scan
from kvplan.runtime.kernels.dense import AttentionArgs, attend, attention_probs
from kvplan.runtime.prompt import capacities, gather_slots, prompt_view, row_lengths, slot_order
from kvplan.runtime.storage import Pool, Rows


@dataclass(frozen=True)
class Seen:
    """What the queries of one forward may look at: keys, values [b, Hkv, S, D] and mask [b, H, T, S] for some rows.

    A layer that shares this layer's cache attends over the same.
    """

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    mask: Tensor | None


class BudgetedLayer(CacheLayerMixin):
    """Slots of one decoder layer.

    Order inside a decode step: overwrite the victim's slot (or take a free one), attend, update the scores. A layer of
    `n` slots thus attends over at most `n` tokens, the current one included.
    """

    is_sliding = False

    def __init__(self, policy: LayerPolicy, spec: LayerSpec) -> None:
        super().__init__()
        self.policy, self.spec = policy, spec
        native = spec.window is not None
        self.evictor = evictors["sliding"]() if native else policy.evictor
        self.keeps_scores = self.evictor.keeps_scores and not policy.slots.is_full and not native
        self.sinks = 0 if native else policy.protected_sinks
        self.pool: Pool | None = None
        self.prompt_tokens: list[int] = []
        self.capacities: list[int | None] = []
        self.appended = 0

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

    columns = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise RuntimeLimitError(
            "kvplan's cache cannot be offloaded layer by layer; drop offloading from the cache settings"
        )

    prefetch = offload

    def reset(self) -> None:
        self.pool, self.prompt_tokens, self.capacities, self.appended, self.columns = None, [], [], 0, 0

    def crop(self, max_length: int) -> None:
        raise RuntimeLimitError(
            "kvplan's cache cannot give tokens back, so assisted and prompt-lookup decoding do not work with it; "
            "generate without an assistant"
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def seen(self, row: int) -> int:
        return self.prompt_tokens[row] + self.appended

    def held(self, row: int) -> int:
        capacity = self.capacities[row]
        return self.seen(row) if capacity is None else min(self.seen(row), capacity)

    def _state(self, row: int) -> RowState:
        capacity = self.capacities[row]
        overwrites = 0
        if capacity is not None:
            overwrites = max(0, self.seen(row) - max(capacity, self.prompt_tokens[row]))
        return RowState(self.held(row), capacity, self.sinks, overwrites)

    def _sizes(self, appended: int) -> list[int]:
        return [allocated_slots(self.policy, self.spec, n, appended) for n in self.prompt_tokens]

    @property
    def _side_heads(self) -> int:
        if not self.keeps_scores:
            return 0
        return 1 if self.evictor.one_set_for_all_heads else self.spec.kv_heads

    def select_rows(self, indices: Sequence[int]) -> None:
        """Keep the given rows, in that order (beam search, repeats)."""
        if self.pool is None:
            return
        held = [self.held(i) for i in indices]
        self.pool = self.pool.selected(indices, held)
        self.prompt_tokens = [self.prompt_tokens[i] for i in indices]
        self.capacities = [self.capacities[i] for i in indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([i for i in range(len(self.prompt_tokens)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices.tolist())

    # -- the prompt -----------------------------------------------------------------------------------------------

    def store_prompt(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs) -> None:
        """Rank the prompt, keep what fits, and forget the rest.

        Args:
            q: [B, Hq, W, D] the prompt's last queries (all of them where the evictor wants column sums).
            keys, values: [B, Hkv, T, D] of a left-padded batch; valid: [B, T] bool.
        """
        lengths = row_lengths(valid)
        scores = None
        if not self.policy.slots.is_full and self.spec.window is None:
            scores = self.evictor.score(prompt_view(self.evictor, q, keys, values, valid, args))
        self.fill(keys, values, lengths, scores)

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], scores: Tensor | None) -> None:
        """Build the pool from a left-padded prompt and its scores [B, H, T] (None: keep the latest by time)."""
        T = keys.shape[2]
        self.prompt_tokens, self.appended = lengths, 0
        self.capacities = capacities(self.policy, self.spec.window, lengths)
        pool = Pool(self._sizes(0), keys, values, self._side_heads)
        for b, length in enumerate(lengths):
            capacity, row, start = self.capacities[b], pool.row(b), T - length
            if scores is None:
                kept = length if capacity is None else min(length, capacity)
                order = torch.arange(length - kept, length, device=keys.device)[None]
                mine = None
            else:
                mine = scores[b, :, start:]
                order = slot_order(mine, self.policy, capacity)
            row.keys[0, :, : order.shape[1]] = gather_slots(keys[b, :, start:], order)
            row.values[0, :, : order.shape[1]] = gather_slots(values[b, :, start:], order)
            if row.positions is not None and row.scores is not None and mine is not None:
                row.positions[0, :, : order.shape[1]] = order.int()
                row.scores[0, :, : order.shape[1]] = mine.gather(-1, order)
        self.pool = pool

    # -- later tokens ---------------------------------------------------------------------------------------------

    def append(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        """Take new tokens in and attend.

        Args:
            q: [B, Hq, T, D]; keys, values: [B, Hkv, T, D].

        Returns:
            The attention output [B, T, Hq, Dv] and what was visible, for layers that share this cache.
        """
        num_new = keys.shape[2]
        if num_new == 1:
            self._grow(1)
            return self._step(q, keys, values, args)
        return self._extend(q, keys, values, args)

    def _grow(self, num_new: int) -> None:
        assert self.pool is not None
        sizes = self._sizes(self.appended + num_new)
        if sizes != self.pool.sizes:
            self.pool = self.pool.resized(sizes, [self.held(b) for b in range(len(sizes))])

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        assert self.pool is not None
        outputs, seen = [], []
        for rows in self.pool.rows:
            part = slice(rows.start, rows.stop)
            view = self._insert(rows, keys[part], values[part])
            seen.append(view)
            if self.keeps_scores:
                outputs.append(self._attend_and_observe(rows, view, q[part], args))
            else:
                outputs.append(attend(q[part], view.keys, view.values, view.mask, args))
        self.appended += 1
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), seen

    def _insert(self, rows: Rows, keys: Tensor, values: Tensor) -> Seen:
        """Write one token per row into its slot."""
        states = [self._state(b) for b in range(rows.start, rows.stop)]
        slots = [ring_slot(state, 0) for state in states]
        if self.keeps_scores:
            self._insert_scored(rows, states, keys, values)
        elif len(set(slots)) == 1:
            rows.keys[:, :, slots[0]], rows.values[:, :, slots[0]] = keys[:, :, 0], values[:, :, 0]
        else:
            at, index = torch.arange(len(slots), device=keys.device), torch.tensor(slots, device=keys.device)
            rows.keys[at, :, index], rows.values[at, :, index] = keys[:, :, 0], values[:, :, 0]
        counts = [min(s.held + 1, s.capacity) if s.capacity is not None else s.held + 1 for s in states]
        longest = max(counts)
        mask = None
        if min(counts) != longest:
            limit = torch.tensor(counts, device=keys.device)[:, None, None, None]
            mask = torch.arange(longest, device=keys.device) < limit
        return Seen(rows.start, rows.stop, rows.keys[:, :, :longest], rows.values[:, :, :longest], mask)

    def _insert_scored(self, rows: Rows, states: list[RowState], keys: Tensor, values: Tensor) -> None:
        """A full row overwrites its lowest-scored unprotected slot, per head; another row takes its next free one."""
        assert rows.positions is not None and rows.scores is not None
        device = keys.device
        now = torch.tensor([self.seen(b) for b in range(rows.start, rows.stop)], device=device)[:, None, None]
        held = torch.tensor([state.held for state in states], device=device)[:, None, None]
        full = torch.tensor([s.capacity is not None and s.held >= s.capacity for s in states], device=device)
        protected = (rows.positions < self.sinks) | (rows.positions > now - self.policy.recent_tokens)
        victim = rows.scores.masked_fill(protected, torch.inf).min(-1, keepdim=True).indices
        slot = torch.where(full[:, None, None], victim, held)  # [b, H, 1]
        rows.positions.scatter_(-1, slot, now.expand_as(slot).int())
        rows.scores.scatter_(-1, slot, 0.0)
        index = slot.expand(-1, keys.shape[1], -1)[..., None]
        rows.keys.scatter_(2, index.expand(-1, -1, -1, keys.shape[-1]), keys)
        rows.values.scatter_(2, index.expand(-1, -1, -1, values.shape[-1]), values)

    def _attend_and_observe(self, rows: Rows, view: Seen, q: Tensor, args: AttentionArgs) -> Tensor:
        assert rows.scores is not None
        probs = attention_probs(q, view.keys, view.mask, args)  # [b, Hkv, G, 1, S]
        out = probs.to(view.values.dtype).squeeze(3) @ view.values  # [b, Hkv, G, Dv]
        width = view.keys.shape[2]
        rows.scores[..., :width] = self.evictor.observe(rows.scores[..., :width], probs[..., 0, :].float())
        return out.flatten(1, 2)[:, None]

    def _extend(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        assert self.pool is not None
        B, num_new = len(self.prompt_tokens), keys.shape[2]
        states = [self._state(b) for b in range(B)]
        width = max(state.held for state in states)
        all_keys, all_values = self._side_by_side(keys, width, "keys"), self._side_by_side(values, width, "values")
        if self.keeps_scores:
            visible = self._scan(states, q, all_keys, all_values, width, args)
        else:
            visible = ring_visibility(states, width, num_new, keys.device)
            self._grow(num_new)
            for b, state in enumerate(states):
                # Only the last token written to a slot stays in it.
                last = {ring_slot(state, step): step for step in range(num_new)}
                slots, steps = list(last), list(last.values())
                row = self.pool.row(b)
                row.keys[0, :, slots], row.values[0, :, slots] = keys[b][:, steps], values[b][:, steps]
            self.appended += num_new
        return attend(q, all_keys, all_values, visible, args), [Seen(0, B, all_keys, all_values, visible)]

    def _side_by_side(self, new: Tensor, width: int, kind: str) -> Tensor:
        """Old slots (padded to `width`) and new tokens: [B, H, width + T, D]."""
        assert self.pool is not None
        B, H, T, D = new.shape
        both = new.new_zeros(B, H, width + T, D)
        both[:, :, width:] = new
        for rows in self.pool.rows:
            old = getattr(rows, kind)[:, :, :width]
            both[rows.start : rows.stop, :, : old.shape[2]] = old
        return both

    def _scan(
        self, states: list[RowState], q: Tensor, keys: Tensor, values: Tensor, width: int, args: AttentionArgs
    ) -> Tensor:
        assert self.pool is not None
        B, num_new = len(states), keys.shape[2] - width
        positions = torch.zeros(B, self._side_heads, width + num_new, dtype=torch.int32, device=keys.device)
        scores = torch.zeros(positions.shape, dtype=torch.float32, device=keys.device)
        for rows in self.pool.rows:
            assert rows.positions is not None and rows.scores is not None
            size = min(rows.positions.shape[-1], width)
            positions[rows.start : rows.stop, :, :size] = rows.positions[..., :size]
            scores[rows.start : rows.stop, :, :size] = rows.scores[..., :size]
        now = torch.tensor([self.seen(b) for b in range(B)], device=keys.device)[:, None, None]
        positions[..., width:] = now + torch.arange(num_new, device=keys.device)
        visible, scores, alive = score_scan(
            self.evictor, states, self.policy.recent_tokens, q, keys, positions, scores, args
        )
        self.appended += num_new
        pool = Pool(self._sizes(self.appended), keys, values, self._side_heads)
        for b in range(B):
            row, held = pool.row(b), self.held(b)
            # `nonzero` lists survivors head by head, in order.
            order = alive[b].nonzero()[:, 1].view(self._side_heads, held)
            assert row.positions is not None and row.scores is not None
            row.keys[0, :, :held], row.values[0, :, :held] = (
                gather_slots(keys[b], order),
                gather_slots(values[b], order),
            )
            row.positions[0, :, :held], row.scores[0, :, :held] = (
                positions[b].gather(-1, order),
                scores[b].gather(-1, order),
            )
        self.pool = pool
        return visible

    # -- memory ---------------------------------------------------------------------------------------------------

    def bytes_by_kind(self) -> dict[str, int]:
        """Storage bytes held now."""
        return {"keys": 0, "values": 0, "positions": 0, "scores": 0} if self.pool is None else self.pool.bytes_by_kind()
