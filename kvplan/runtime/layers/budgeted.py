"""BudgetedLayer: a layer that owns a pool of slots and an evictor that decides who stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvplan.methods.evictors import Step, evictors
from kvplan.model_spec import LayerSpec
from kvplan.policy.layout import Layout, evicts, layout, side_heads
from kvplan.policy.memory import allocated_slots
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime import chunk
from kvplan.runtime.extend import RowState, ring_slot, ring_visibility, score_scan
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.stored import Part, Stored, attend_parts
from kvplan.runtime.layers.base import NO_BYTES, PolicyLayer, PromptStats, Seen, attend_seen, cloned, prefix_mask
from kvplan.runtime.prompt import choose_slots, prompt_channels, prompt_view, row_lengths
from kvplan.runtime.storage import SIDE, Pool, Rows


@dataclass(frozen=True)
class Kept:
    """What one row keeps of its prompt, in slot order.

    Attributes:
        keys, values: [Hkv, n, D].
        side: By column, [H, n].
    """

    keys: Tensor
    values: Tensor
    side: Mapping[str, Tensor]


class BudgetedLayer(PolicyLayer):
    """Slots of one decoder layer, all stored alike and each alone.

    Order inside a decode step: overwrite the victim's slot (or take a free one), attend, update the scores. A layer of
    `n` slots thus attends over at most `n` tokens, the current one included.

    Args:
        policy: What the layer keeps, and how.
        spec: The layer's shape.
        chunked: The prompt comes in chunks.
    """

    def __init__(self, policy: LayerPolicy, spec: LayerSpec, chunked: bool = False) -> None:
        super().__init__()
        self.policy, self.spec, self.chunked = policy, spec, chunked
        self.evicts = evicts(policy, spec)
        self.evictor = policy.evictor if spec.window is None else evictors["sliding"]()
        self.keeps_scores = self.evicts and self.evictor.keeps_scores
        self.sinks = policy.protected_sinks if spec.window is None else 0
        self.side_heads = side_heads(policy, spec) if self.evicts else 1
        self.key_codec, self.value_codec = policy.key_codec.for_keys(), policy.value_codec.for_values()
        self.merger = policy.merger if self.evicts else None
        self.capacity_of: Callable[[int, int], int | None] = lambda row, length: policy.capacity(length)
        self.reset()

    def reset(self) -> None:
        self.pool: Pool | None = None
        self._prompt_tokens: list[int] = []
        self.capacities: list[int | None] = []
        self._appended, self.columns = 0, 0

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return len(self._prompt_tokens)

    @property
    def prompt_lengths(self) -> list[int]:
        return self._prompt_tokens

    @property
    def appended(self) -> int:
        return self._appended

    @property
    def storage(self) -> tuple[Pool, ...]:
        return () if self.pool is None else (self.pool,)

    def seen(self, row: int) -> int:
        return self._prompt_tokens[row] + self._appended

    def held(self, row: int) -> int:
        capacity = self.capacities[row]
        return self.seen(row) if capacity is None else min(self.seen(row), capacity)

    def _state(self, row: int) -> RowState:
        capacity = self.capacities[row]
        overwrites = 0
        if capacity is not None:
            overwrites = max(0, self.seen(row) - max(capacity, self._prompt_tokens[row]))
        return RowState(self.held(row), capacity, self.sinks, overwrites)

    def _capacities(self, lengths: Sequence[int]) -> list[int | None]:
        """Slots that each row may ever hold; a native window is its own capacity."""
        if self.spec.window is not None:
            return [self.spec.window] * len(lengths)
        return [self.capacity_of(row, n) for row, n in enumerate(lengths)]

    def _sizes(self, appended: int) -> list[int]:
        """Slots allocated per row after so many appended tokens."""
        most = self.capacities
        sizes = [allocated_slots(self._unbounded, self.spec, n, appended) for n in self._prompt_tokens]
        return [size if cap is None else min(size, cap) for size, cap in zip(sizes, most, strict=True)]

    @property
    def _unbounded(self) -> LayerPolicy:
        return _FULL

    def _layout(self, like: Tensor) -> Layout:
        return layout(self.policy, self.spec, like.dtype, self.chunked)

    def select_rows(self, indices: Sequence[int]) -> None:
        if self.pool is None:
            return
        self.pool = self.pool.selected(indices)
        self._prompt_tokens = [self._prompt_tokens[i] for i in indices]
        self.capacities = [self.capacities[i] for i in indices]

    # -- the prompt -----------------------------------------------------------------------------------------------

    def observe_prompt(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> PromptStats:
        scores = None
        if self.evicts:
            scores = self.evictor.score(prompt_view(self.evictor, q, keys, values, valid, args))
        return PromptStats(scores, prompt_channels(self.policy, q, keys, valid))

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        """Build the pool from a left-padded prompt (without scores: keep the latest by time)."""
        self._prompt_tokens, self._appended = lengths, 0
        self.capacities = self._capacities(lengths)
        self.pool = Pool(self._layout(keys).body, self._sizes(0), keys.device)
        T = keys.shape[2]
        for b, length in enumerate(lengths):
            start = T - length
            scores = None if stats.scores is None else stats.scores[b, :, start:]
            kept = self._keep(keys[b, :, start:], values[b, :, start:], scores, self.capacities[b])
            self._write(self.pool.row(b), kept)

    def _keep(self, keys: Tensor, values: Tensor, scores: Tensor | None, capacity: int | None) -> Kept:
        """Choose what one row keeps of its prompt: [Hkv, T, D] keys and values, [H, T] scores."""
        T = keys.shape[1]
        side: dict[str, Tensor] = {}
        if self.merger is not None and self.merger.merges_prompt and capacity is not None and capacity < T:
            assert scores is not None
            recent = max(self.policy.recent_tokens, self.policy.stored_whole[1])
            merged = self.merger.merge_prompt(keys, values, scores, capacity, self.sinks, recent)
            keys, values, scores = merged.keys, merged.values, merged.scores
            side = {"positions": merged.positions, "counts": merged.counts}
        order = choose_slots(scores, self.policy, capacity, keys.shape[1], keys.device)
        positions = order if "positions" not in side else _at(side["positions"], order)
        counts = torch.ones_like(order) if "counts" not in side else _at(side["counts"], order)
        kept = {"positions": positions, "counts": counts}
        if scores is not None:
            kept["scores"] = _at(scores, order)
        return Kept(chunk.pick(keys, order), chunk.pick(values, order), kept)

    def _write(self, row: Rows, kept: Kept, first: int = 0) -> None:
        """Store what one row keeps, from slot `first` on."""
        for role, codec, x in (("keys", self.key_codec, kept.keys), ("values", self.value_codec, kept.values)):
            for name, codes in codec.encode(x).items():
                units = codes.shape[1]
                start = first // codec.group_tokens
                row.columns[f"{role}.{name}"][0, :, start : start + units] = codes
        for name in SIDE:
            if name in row.columns:
                n = kept.side[name].shape[-1]
                row.columns[name][0, :, first : first + n] = kept.side[name].to(row.columns[name].dtype)

    # -- later tokens ---------------------------------------------------------------------------------------------

    def append(
        self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, shared: bool = False
    ) -> tuple[Tensor, list[Seen]]:
        num_new = keys.shape[2]
        if num_new == 1:
            return self._step(q, keys, values, args)
        if not self._scans:
            return self._step_by_step(q, keys, values, args, shared)
        return self._extend(q, keys, values, args)

    @property
    def _scans(self) -> bool:
        """Whether several tokens at once can be worked out by masks alone, because no stored value ever changes."""
        return self.merger is None or not self.merger.merges_steps

    def _step_by_step(
        self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, shared: bool
    ) -> tuple[Tensor, list[Seen]]:
        outputs, all_seen = [], []
        for t in range(keys.shape[2]):
            now = slice(t, t + 1)
            out, seen = self._step(q[:, :, now], keys[:, :, now], values[:, :, now], args)
            outputs.append(out)
            if shared:
                all_seen += [replace(s, first=t, last=t + 1) for s in cloned(seen)]
        return torch.cat(outputs, 1), all_seen

    def _grow(self, num_new: int) -> None:
        assert self.pool is not None
        sizes = self._sizes(self._appended + num_new)
        if sizes != self.pool.sizes:
            self.pool = self.pool.resized(sizes)

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        self._grow(1)
        assert self.pool is not None
        outputs, seen = [], []
        merges = self.merger is not None and self.merger.merges_steps
        want = self.keeps_scores or merges
        for rows in self.pool.rows:
            part = slice(rows.start, rows.stop)
            states = [self._state(b) for b in range(rows.start, rows.stop)]
            view = self._insert(rows, states, keys[part], values[part])
            seen.append(view)
            out, probs = attend_parts(q[part], view.parts, args.of_rows(rows.start, rows.stop), want)
            outputs.append(out)
            if self.keeps_scores:
                assert probs is not None
                self._observe(rows, states, probs[..., 0, :])
            if merges:
                assert probs is not None
                self._merge_step(rows, states, probs[..., 0, :])
        self._appended += 1
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), seen

    def _insert(self, rows: Rows, states: list[RowState], keys: Tensor, values: Tensor) -> Seen:
        """Write one token per row into its slot; what the row's query may then look at."""
        slots = self._victims(rows, states) if self.keeps_scores else self._ring_slots(states)
        for role, codec, x in (("keys", self.key_codec, keys), ("values", self.value_codec, values)):
            for name, codes in codec.encode(x).items():
                put(rows.columns[f"{role}.{name}"], slots, codes)
        if "positions" in rows.columns:
            now = self._now(rows)
            put(rows.positions, slots, now.expand(-1, rows.positions.shape[1], -1).int())
        if "scores" in rows.columns:
            put(rows.scores, slots, torch.zeros_like(rows.scores[..., :1]))
        if "counts" in rows.columns:
            put(rows.columns["counts"], slots, torch.ones_like(rows.columns["counts"][..., :1]))
        counts = [min(s.held + 1, s.capacity) if s.capacity is not None else s.held + 1 for s in states]
        longest = max(counts)
        mask = prefix_mask(counts, longest, keys.device)
        return Seen(rows.start, rows.stop, 0, 1, (self._part(rows, longest, mask),))

    def _ring_slots(self, states: list[RowState]) -> int | Tensor:
        """One slot for all rows, or [b]."""
        ring = [ring_slot(state, 0) for state in states]
        return ring[0] if len(set(ring)) == 1 else torch.tensor(ring, device=self._device)

    def _now(self, rows: Rows) -> Tensor:
        """[b, 1, 1] int64 position of the token that comes now."""
        return torch.tensor([self.seen(b) for b in range(rows.start, rows.stop)], device=self._device)[:, None, None]

    @property
    def _device(self) -> torch.device:
        assert self.pool is not None
        return self.pool.device

    def _part(self, rows: Rows, slots: int, mask: Tensor | None) -> Part:
        bias = None
        if "counts" in rows.columns:
            bias = rows.columns["counts"][..., :slots].clamp(min=1).float().log()
        return Part(
            Stored(self.key_codec, rows.codes("keys", slots, self.key_codec.group_tokens), self._key_dim),
            Stored(self.value_codec, rows.codes("values", slots, self.value_codec.group_tokens), self.spec.value_dim),
            slots,
            mask,
            bias,
        )

    @property
    def _key_dim(self) -> int:
        return self.spec.key_dim

    def _victims(self, rows: Rows, states: list[RowState]) -> Tensor:
        """[b, H, 1]: the slot of the lowest unprotected score in full rows, per head; the next free one in others."""
        now = self._now(rows)
        held = torch.tensor([state.held for state in states], device=now.device)[:, None, None]
        full = torch.tensor([s.capacity is not None and s.held >= s.capacity for s in states], device=now.device)
        protected = (rows.positions < self.sinks) | (rows.positions > now - self.policy.recent_tokens)
        victim = rows.scores.masked_fill(protected, torch.inf).min(-1, keepdim=True).indices
        return torch.where(full[:, None, None], victim, held)

    def _observe(self, rows: Rows, states: list[RowState], probs: Tensor) -> None:
        """Update the scores by this step's attention [b, Hkv, G, S]."""
        held = torch.tensor([min(s.held + 1, s.capacity or s.held + 1) for s in states], device=probs.device)
        step = Step(self._now(rows), held[:, None, None])
        scores = rows.scores[..., : probs.shape[-1]]
        scores.copy_(self.evictor.observe(scores, probs.float(), step))

    def _merge_step(self, rows: Rows, states: list[RowState], probs: Tensor) -> None:
        """Let the merger save what the next token will overwrite; only in rows that are full."""
        assert self.merger is not None
        full = [i for i, s in enumerate(states) if s.capacity is not None and s.held + 1 >= s.capacity]
        if not full:
            return
        for i in full:
            state = states[i]
            assert state.capacity is not None
            ring = state.capacity - state.sinks
            victim = ring_slot(state, 1)
            after = [state.sinks + (victim - state.sinks + k) % ring for k in range(1, ring)]
            values = rows.columns["values.x"][i : i + 1, :, : state.capacity]
            mean = probs[i : i + 1, ..., : state.capacity].mean(2).float()
            device = values.device
            merged = self.merger.merge_step(
                values, mean, torch.tensor([victim], device=device), torch.tensor([after], device=device)
            )
            values.copy_(merged)

    def _extend(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        """Several tokens at once: exactly what the same tokens one by one would do."""
        assert self.pool is not None
        B, num_new = self.num_rows, keys.shape[2]
        states = [self._state(b) for b in range(B)]
        width = max(state.held for state in states)
        now = torch.tensor([self.seen(b) for b in range(B)], device=keys.device)[:, None, None]
        columns = chunk.side_by_side(self.pool, width, self._columns_of(keys, values, now))
        parts = chunk.decoded_part(columns, self.key_codec, self.value_codec, self._key_dim, self.spec.value_dim, keys)
        if self.keeps_scores:
            logit_bias = parts.bias
            visible, scores, alive = score_scan(
                self.evictor, states, self.policy.recent_tokens, q, _dense(parts.keys), columns["positions"],
                columns["scores"], args, logit_bias,
            )  # fmt: skip
            columns["scores"] = scores
            self._appended += num_new
            self._keep_alive(columns, alive)
        else:
            visible = ring_visibility(states, width, num_new, keys.device)
            self._grow(num_new)
            self._write_ring(columns, states, width, num_new)
            self._appended += num_new
        seen = Seen(0, B, 0, num_new, (replace(parts, mask=visible),))
        return attend_seen(q, [seen], args), [seen]

    def _columns_of(self, keys: Tensor, values: Tensor, first_position: Tensor) -> dict[str, Tensor]:
        """The columns [B, H, T, ...] of new tokens; `first_position` is [B, 1, 1]."""
        assert self.pool is not None
        made = {f"keys.{name}": codes for name, codes in self.key_codec.encode(keys).items()}
        made |= {f"values.{name}": codes for name, codes in self.value_codec.encode(values).items()}
        B, T = keys.shape[0], keys.shape[2]
        for column in self.pool.columns:
            if column.name == "positions":
                positions = first_position + torch.arange(T, device=keys.device)
                made["positions"] = positions.expand(B, column.heads, T).int()
            elif column.name == "scores":
                made["scores"] = keys.new_zeros(B, column.heads, T, dtype=torch.float32)
            elif column.name == "counts":
                made["counts"] = keys.new_ones(B, column.heads, T, dtype=torch.int32)
        return made

    def _write_ring(self, columns: Mapping[str, Tensor], states: list[RowState], width: int, num_new: int) -> None:
        assert self.pool is not None
        for b, state in enumerate(states):
            # Only the last token written to a slot stays in it.
            last = {ring_slot(state, step): width + step for step in range(num_new)}
            slots, sources = list(last), list(last.values())
            for name, target in self.pool.row(b).columns.items():
                as_bytes(target)[0, :, slots] = as_bytes(columns[name])[b][:, sources]

    def _keep_alive(self, columns: Mapping[str, Tensor], alive: Tensor) -> None:
        """A new pool of the slots that are alive [B, H, N]."""
        assert self.pool is not None
        pool = Pool(self.pool.columns, self._sizes(self._appended), self.pool.device)
        for b in range(self.num_rows):
            held = self.held(b)
            # `nonzero` lists survivors head by head, in order.
            order = alive[b].nonzero()[:, 1].view(alive.shape[1], held)
            for name, target in pool.row(b).columns.items():
                as_bytes(target)[0, :, :held] = chunk.pick(as_bytes(columns[name])[b], order)
        self.pool = pool

    # -- a prompt in chunks ---------------------------------------------------------------------------------------

    def append_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, list[Seen]]:
        B, num_new = keys.shape[0], keys.shape[2]
        if self.pool is None:
            self._prompt_tokens, self.capacities = [0] * B, [0] * B
            self.pool = Pool(self._layout(keys).body, [0] * B, keys.device)
        held = [self.held(b) for b in range(B)]
        width = max(held)
        first = torch.tensor(self._prompt_tokens, device=keys.device) - (~valid).sum(-1)
        columns = chunk.side_by_side(self.pool, width, self._columns_of(keys, values, first[:, None, None]))
        part = chunk.decoded_part(columns, self.key_codec, self.value_codec, self._key_dim, self.spec.value_dim, keys)
        old = torch.arange(width, device=keys.device) < torch.tensor(held, device=keys.device)[:, None]
        present = torch.cat([old, valid], 1)
        positions = columns["positions"].long()
        mask = chunk.chunk_mask(present, positions, num_new, self.spec.window)
        seen = Seen(0, B, 0, num_new, (replace(part, mask=mask),))
        out = attend_seen(q, [seen], args)
        scores = None
        if self.evicts:
            view = prompt_view(self.evictor, q, _dense(part.keys), _dense(part.values), present, args)
            sums = None if view.column_sums is None else view.column_sums + columns["scores"]
            scores = self.evictor.score(replace(view, positions=positions, column_sums=sums))
        lengths = [n + m for n, m in zip(self._prompt_tokens, row_lengths(valid), strict=True)]
        self._refill(columns, present, positions, scores, lengths)
        return out, [seen]

    def _refill(
        self,
        columns: Mapping[str, Tensor],
        present: Tensor,
        positions: Tensor,
        scores: Tensor | None,
        lengths: list[int],
    ) -> None:
        """A new pool of what is worth keeping among slots and chunk."""
        assert self.pool is not None
        self._prompt_tokens, self.capacities = lengths, self._capacities(lengths)
        pool = Pool(self.pool.columns, self._sizes(0), self.pool.device)
        for b in range(len(lengths)):
            there = present[b].nonzero()[:, 0]
            times = positions[b][:, there].argsort(-1)  # [H, n] in order of time
            ranked = None if scores is None else scores[b][:, there].gather(-1, times)
            order = choose_slots(ranked, self.policy, self.capacities[b], len(there), times.device)
            order = there[times.expand(order.shape[0], -1).gather(-1, order.expand(times.shape[0], -1))]
            kept = order.shape[-1]
            for name, target in pool.row(b).columns.items():
                if name == "scores" and scores is not None:
                    target[0, :, :kept] = scores[b].gather(-1, order)
                else:
                    as_bytes(target)[0, :, :kept] = chunk.pick(as_bytes(columns[name])[b], order)
        self.pool = pool

    # -- memory ---------------------------------------------------------------------------------------------------

    def bytes_by_kind(self) -> dict[str, int]:
        return dict(NO_BYTES) if self.pool is None else self.pool.bytes_by_kind()

    def row_bytes(self, row: int) -> int:
        return 0 if self.pool is None else self.pool.row_bytes(row)


_FULL = LayerPolicy()


def put(column: Tensor, slots: int | Tensor, new: Tensor) -> None:
    """Write one slot per row: [b, H, 1, ...] into [b, H, C, ...] at one slot for all, [b] slots, or [b, H, 1]."""
    column, new = as_bytes(column), as_bytes(new)
    if isinstance(slots, int):
        column[:, :, slots] = new[:, :, 0]
    elif slots.ndim == 1:
        column[torch.arange(len(slots), device=slots.device), :, slots] = new[:, :, 0]
    else:
        index = slots.expand(-1, column.shape[1], -1)
        if column.ndim == 4:
            index = index[..., None].expand(-1, -1, -1, column.shape[-1])
        column.scatter_(2, index, new)


def as_bytes(x: Tensor) -> Tensor:
    """8-bit floats cannot be indexed everywhere; their bytes can."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def _dense(stored: Stored) -> Tensor:
    assert stored.dense is not None
    return stored.dense


def _at(x: Tensor, order: Tensor) -> Tensor:
    """[H, T] at [H', n] -> [H', n]."""
    return x.expand(order.shape[0], -1).gather(-1, order)
