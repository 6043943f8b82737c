"""BudgetedLayer: a layer that owns a pool of slots and an evictor that decides who stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvplan.errors import RuntimeLimitError
from kvplan.methods.codecs import Codec
from kvplan.methods.evictors import Step, evictors
from kvplan.methods.mergers import hand_over
from kvplan.model_spec import LayerSpec
from kvplan.policy.layout import Layout, evicts, layout, side_heads
from kvplan.policy.memory import allocated_slots
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime import chunk
from kvplan.runtime.extend import (
    FOREVER,
    RowState,
    Standing,
    last_written,
    ring_slot,
    ring_successions,
    ring_visibility,
    score_scan,
    standing,
)
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.parts import Part, Stored
from kvplan.runtime.kernels.stored import attend_parts, attend_runs
from kvplan.runtime.layers.base import (
    NO_BYTES,
    PolicyLayer,
    PromptStats,
    Seen,
    attend_seen,
    cloned,
    column,
    prefix_mask,
)
from kvplan.runtime.prompt import choose_slots, prompt_channels, prompt_view, row_lengths
from kvplan.runtime.storage import SIDE, Pool, Rows, as_bytes


@dataclass(frozen=True)
class Kept:
    """What one row keeps of its prompt, in slot order.

    Attributes:
        keys, values: [Hkv, n, D].
        side: By column, [H, n].
        codes: By column, [Hkv, n, width], what is encoded already.
    """

    keys: Tensor
    values: Tensor
    side: Mapping[str, Tensor]
    codes: Mapping[str, Tensor] = field(default_factory=dict)


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
        self.pool = None
        self._prompt_tokens: list[int] = []
        self.capacities: list[int | None] = []
        self._appended, self.columns = 0, 0
        self._lends, self.stores = False, True

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool | None:
        return self._pool

    @pool.setter
    def pool(self, pool: Pool | None) -> None:
        self._pool = pool
        # What is known about the old one goes with it.
        self._room = 0  # appended tokens that the pool has room for
        self._known_parts: dict[int, tuple[Rows, Part]] = {}  # by first row
        self._settled: list[Seen] | None = None  # what every later query sees

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
    def encoded_alone(self) -> Mapping[str, Codec]:
        if self.merger is not None and self.merger.merges_prompt:
            return {}  # what is encoded is no token of the prompt
        found = {"keys": self.key_codec, "values": self.value_codec}
        if self.policy.channels is not None:
            del found["keys"]
        return {role: codec for role, codec in found.items() if codec.group_tokens == 1 and codec.name != "dense"}

    @property
    def storage(self) -> tuple[Pool, ...]:
        return () if self.pool is None else (self.pool,)

    def seen(self, row: int) -> int:
        return self._prompt_tokens[row] + self._appended

    def held(self, row: int) -> int:
        capacity = self.capacities[row]
        return self.seen(row) if capacity is None else min(self.seen(row), capacity)

    def held_positions(self, row: int) -> list[Tensor]:
        if self.pool is None:
            return []
        return self._by_head([self._stored_positions(self.pool, row)[:, : self.held(row)]])

    def _stored_positions(self, pool: Pool, row: int) -> Tensor:
        """[H, slots] of a row."""
        if "positions" not in pool.buffers:
            raise RuntimeLimitError("this layer stores no positions; ask a cache made by runtime.held")
        return pool.row(row).positions[0].long()

    def _by_head(self, parts: list[Tensor]) -> list[Tensor]:
        """[H, n] of each part of a row -> [n] of each KV head."""
        return list(torch.cat(parts, -1).sort(-1).values.expand(self.spec.kv_heads, -1).unbind())

    def _standing(self) -> Standing:
        return standing(tuple(self._prompt_tokens), tuple(self.capacities), self.sinks, self._appended)

    def capacities_for(self, lengths: Sequence[int]) -> list[int | None]:
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
            scores = self.evictor.score(prompt_view(self.evictor, q, keys, values, valid, args, self.sinks))
        return PromptStats(scores, prompt_channels(self.policy, q, keys, valid))

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        """Build the pool from a left-padded prompt (without scores: keep the latest by time)."""
        self._prompt_tokens, self._appended = lengths, 0
        self.capacities = self.capacities_for(lengths)
        self.pool = Pool(self._layout(keys).body, self._sizes(0), keys.device)
        T = keys.shape[2]
        for b, length in enumerate(lengths):
            start = T - length
            scores = None if stats.scores is None else stats.scores[b, :, start:]
            codes = {name: x[b, :, start:] for name, x in stats.codes.items()}
            kept = self._keep(keys[b, :, start:], values[b, :, start:], scores, self.capacities[b], codes)
            self._write(self.pool.row(b), kept)

    def _keep(
        self,
        keys: Tensor,
        values: Tensor,
        scores: Tensor | None,
        capacity: int | None,
        codes: Mapping[str, Tensor],
    ) -> Kept:
        """Choose what one row keeps of its prompt: [Hkv, T, ...] keys, values and codes, [H, T] scores."""
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
        if scores is None:  # the latest ones, in order of time
            first = keys.shape[1] - order.shape[-1]
            return Kept(keys[:, first:], values[:, first:], kept, {name: x[:, first:] for name, x in codes.items()})
        kept["scores"] = _at(scores, order)
        known = {name: chunk.pick(as_bytes(x), order).view(x.dtype) for name, x in codes.items()}
        return Kept(chunk.pick(keys, order), chunk.pick(values, order), kept, known)

    def _write(self, row: Rows, kept: Kept, first: int = 0) -> None:
        """Store what one row keeps, from slot `first` on."""
        for role, codec, x in (("keys", self.key_codec, kept.keys), ("values", self.value_codec, kept.values)):
            codes = {name: known for name, known in kept.codes.items() if name.startswith(f"{role}.")}
            codes = codes or {f"{role}.{name}": made for name, made in codec.encode(x).items()}
            for name, stored in codes.items():
                start = first // codec.group_tokens
                row.columns[name][0, :, start : start + stored.shape[1]] = stored
        for name in SIDE:
            if name in row.columns:
                n = kept.side[name].shape[-1]
                row.columns[name][0, :, first : first + n] = kept.side[name].to(row.columns[name].dtype)

    # -- later tokens ---------------------------------------------------------------------------------------------

    def append(
        self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, shared: bool = False
    ) -> tuple[Tensor, list[Seen]]:
        self._lends = shared
        return self._step(q, keys, values, args) if keys.shape[2] == 1 else self._extend(q, keys, values, args)

    def _grow(self, num_new: int) -> None:
        """Make room; asked at every step, so what needs no room is told at a glance."""
        assert self.pool is not None
        appended = self._appended + num_new
        if appended <= self._room:
            return
        sizes = self._sizes(appended)
        if sizes != self.pool.sizes:
            self.pool = self.pool.resized(sizes)
        limits = zip(sizes, self.capacities, self._prompt_tokens, strict=True)
        self._room = min((size - prompt for size, most, prompt in limits if size != most), default=FOREVER)

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        self._grow(1)
        assert self.pool is not None
        now, merges = self._standing(), self._merges_steps
        scores = self.pool.wide("scores") if self.keeps_scores else None
        self._insert(now, keys, values, scores)
        seen = self._visible(now)
        out, probs = attend_runs(q, [(s.start, s.stop, s.parts[0]) for s in seen], args, self.keeps_scores or merges)
        if scores is not None:
            assert probs is not None
            self._observe(now, scores, probs[..., 0, :])
        if merges:
            assert probs is not None
            # Who shares this cache looks at what was there, not at what is merged for the next step.
            seen = cloned(seen) if self._lends else seen
            for rows in self.pool.rows:
                part = slice(rows.start, rows.stop)
                self._merge_step(rows, now.rows[part], probs[part, ..., 0, :])
        self._appended += 1
        return out, seen

    def _insert(self, now: Standing, keys: Tensor, values: Tensor, scores: Tensor | None) -> None:
        """Write one token per row into its slot; `scores` [B, H, slots] are those of all rows."""
        assert self.pool is not None
        new = self._columns_of(keys, values, self._column(now.now) if "positions" in self.pool.buffers else None)
        if scores is None:
            ring = now.ring_slots
            slots = ring[0] if min(ring) == max(ring) else self._column(ring)[..., 0]
        else:
            slots = self._victims(now, scores)
            scores.scatter_(-1, slots[..., None], new.pop("scores"))
        self.pool.put(slots, new)

    def _visible(self, now: Standing) -> list[Seen]:
        """What the queries may look at after the new token came: once all rows are full, always the same slots."""
        assert self.pool is not None
        if self._settled is not None:
            return self._settled
        seen = []
        for rows in self.pool.rows:
            counts = now.held_after[rows.start : rows.stop]
            part = self._part(rows, max(counts), prefix_mask(counts, max(counts), self._device))
            seen.append(Seen(rows.start, rows.stop, 0, 1, (part,)))
        if now.all_full and "counts" not in self.pool.buffers:
            self._settled = seen
        return seen

    def _column(self, numbers: tuple[int, ...]) -> Tensor:
        return column(numbers, self._device)

    @property
    def _device(self) -> torch.device:
        assert self.pool is not None
        return self.pool.device

    def _part(self, rows: Rows, slots: int, mask: Tensor | None) -> Part:
        counted = "counts" in rows.columns
        known = self._known_parts.get(rows.start)
        if known is not None and known[0] is rows and known[1].slots == slots and mask is None and not counted:
            return known[1]
        bias = rows.columns["counts"][..., :slots].clamp(min=1).float().log() if counted else None
        part = Part(
            Stored(self.key_codec, rows.codes("keys", slots, self.key_codec.group_tokens), self._key_dim),
            Stored(self.value_codec, rows.codes("values", slots, self.value_codec.group_tokens), self.spec.value_dim),
            slots,
            mask,
            bias,
        )
        if mask is None:
            self._known_parts[rows.start] = rows, part
        return part

    @property
    def _key_dim(self) -> int:
        return self.spec.key_dim

    def _victims(self, now: Standing, scores: Tensor) -> Tensor:
        """[B, H]: the slot of the lowest unprotected score in full rows, per head; the next free one in others."""
        assert self.pool is not None
        free = self._column(now.held)[..., 0]
        if not any(now.full):
            return free.expand(-1, scores.shape[1])
        edge = column(tuple(n - self.policy.recent_tokens for n in now.now), self._device, torch.int32)
        # Where a row has no slot, its position is as recent as can be.
        recent = self.pool.wide("positions", FOREVER) > edge
        ranked = torch.where(recent, torch.inf, scores)
        ranked[..., : self.sinks] = torch.inf  # sinks never leave the first slots
        victims = ranked.argmin(-1)
        if now.all_full:
            return victims
        return torch.where(self._column(tuple(map(int, now.full)))[..., 0] > 0, victims, free)

    def _observe(self, now: Standing, scores: Tensor, probs: Tensor) -> None:
        """Update the scores [B, H, slots] by this step's attention [B, Hkv, G, S]."""
        assert self.pool is not None
        step = Step(self._column(now.now), self._column(now.held_after))
        self.pool.put_wide("scores", self.evictor.observe(scores[..., : probs.shape[-1]], probs.float(), step))

    def _merge_step(self, rows: Rows, states: Sequence[RowState], probs: Tensor) -> None:
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
            leaving, followers = (torch.tensor([x], device=values.device) for x in (victim, after))
            hand_over(values, self.merger.parts(mean, leaving, followers), leaving, followers)

    def _extend(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        """Several tokens at once: exactly what the same tokens one by one would do."""
        assert self.pool is not None
        B, num_new = self.num_rows, keys.shape[2]
        states = self._standing().rows
        width = max(state.held for state in states)
        now = torch.tensor([self.seen(b) for b in range(B)], device=keys.device)[:, None, None]
        columns = chunk.side_by_side(self.pool, width, self._columns_of(keys, values, now))
        part = chunk.decoded_part(columns, self.key_codec, self.value_codec, self._key_dim, self.spec.value_dim, keys)
        if self.keeps_scores:
            visible, columns["scores"], alive, slots = score_scan(
                self.evictor, states, self.policy.recent_tokens, q, _dense(part.keys), columns["positions"],
                columns["scores"], args, part.bias,
            )  # fmt: skip
            if self.stores:
                self._appended += num_new
                self._keep_alive(columns, alive, slots)
        else:
            visible = ring_visibility(states, width, num_new, keys.device)
        part = replace(part, mask=visible)
        if self._merges_steps:
            out, seen, columns["values.x"] = self._merge_steps(q, part, states, width, args)
        else:
            seen = [Seen(0, B, 0, num_new, (part,))]
            out = attend_seen(q, seen, args)
        if self.stores and not self.keeps_scores:
            self._grow(num_new)
            self._write_ring(columns, states, width, num_new)
            self._appended += num_new
        return out, seen

    @property
    def _merges_steps(self) -> bool:
        return self.merger is not None and self.merger.merges_steps

    def _merge_steps(
        self, q: Tensor, part: Part, states: Sequence[RowState], width: int, args: AttentionArgs
    ) -> tuple[Tensor, list[Seen], Tensor]:
        """Several steps with a merger that changes values: attention does not depend on them, so it is known at once.

        The values of `part` are changed in place.

        Returns:
            The output, what each step saw (for layers that share it), and the values [B, Hkv, S, D] afterwards.
        """
        assert self.merger is not None
        probs = attend_parts(q, (part,), args, True)[1]
        assert probs is not None and part.mask is not None
        B, T, values = len(states), q.shape[2], _dense(part.values)
        mean = probs.mean(2).float().transpose(1, 2)  # [B, T, Hkv, S]
        alike = [(state, [i for i, s in enumerate(states) if s == state]) for state in dict.fromkeys(states)]
        coming = []
        for state, rows in alike:
            order = ring_successions(state, width, T, values.device)  # of the first steps none: there is room
            steps = len(order)
            if not steps:
                continue
            # A row a step: [rows * steps, ...].
            observed = mean[rows, T - steps :].flatten(0, 1)
            leaving, followers = order[:, 0].repeat(len(rows)), order[:, 1:].repeat(len(rows), 1)
            parts = self.merger.parts(observed, leaving, followers).unflatten(0, (len(rows), steps))
            coming.append((rows, order, parts))
        outputs, seen = [], []
        for t in range(T):
            outputs.append(probs[:, :, :, t].to(q.dtype) @ values)
            if self._lends:
                lent = replace(part.values, codes={"x": values.clone()})
                seen.append(Seen(0, B, t, t + 1, (replace(part, values=lent, mask=part.mask[:, :, t : t + 1]),)))
            for rows, order, parts in coming:
                step = t - (T - len(order))
                if step < 0:
                    continue
                leaving, followers = order[step, :1].expand(len(rows)), order[step, 1:].expand(len(rows), -1)
                some = values if len(rows) == B else values[rows]
                hand_over(some, parts[:, step], leaving, followers)
                if len(rows) < B:
                    values[rows] = some
        return torch.stack(outputs, 1).flatten(2, 3), seen, values

    def _columns_of(self, keys: Tensor, values: Tensor, first_position: Tensor | None) -> dict[str, Tensor]:
        """The columns [B, H, T, ...] of new tokens; `first_position` is [B, 1, 1], or None where none is stored."""
        assert self.pool is not None
        made = {f"keys.{name}": codes for name, codes in self.key_codec.encode(keys).items()}
        made |= {f"values.{name}": codes for name, codes in self.value_codec.encode(values).items()}
        B, T = keys.shape[0], keys.shape[2]
        for c in self.pool.columns:
            if c.name == "positions":
                assert first_position is not None
                positions = first_position if T == 1 else first_position + torch.arange(T, device=keys.device)
                made["positions"] = positions.expand(B, c.heads, T).int()
            elif c.name == "scores":
                made["scores"] = keys.new_zeros(B, c.heads, T, dtype=torch.float32)
            elif c.name == "counts":
                made["counts"] = keys.new_ones(B, c.heads, T, dtype=torch.int32)
        return made

    def _write_ring(self, columns: Mapping[str, Tensor], states: Sequence[RowState], width: int, num_new: int) -> None:
        assert self.pool is not None
        for b, state in enumerate(states):
            slots, sources = last_written(state, width, num_new, self._merges_steps, self._device)
            for name, target in self.pool.row(b).columns.items():
                as_bytes(target)[0].index_copy_(1, slots, as_bytes(columns[name])[b].index_select(1, sources))

    def _keep_alive(self, columns: Mapping[str, Tensor], alive: Tensor, slots: Tensor) -> None:
        """A new pool of what is alive [B, H, N], each in its own slot [B, H, N]."""
        assert self.pool is not None
        pool = Pool(self.pool.columns, self._sizes(self._appended), self.pool.device)
        for b in range(self.num_rows):
            held = self.held(b)
            # `nonzero` lists survivors head by head, in order.
            order = alive[b].nonzero()[:, 1].view(alive.shape[1], held)
            order = order.gather(-1, slots[b].gather(-1, order).argsort(-1))
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
            view = prompt_view(self.evictor, q, _dense(part.keys), _dense(part.values), present, args, self.sinks)
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
        self._prompt_tokens, self.capacities = lengths, self.capacities_for(lengths)
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


def _dense(stored: Stored) -> Tensor:
    assert stored.dense is not None
    return stored.dense


def _at(x: Tensor, order: Tensor) -> Tensor:
    """[H, T] at [H', n] -> [H', n]."""
    return x.expand(order.shape[0], -1).gather(-1, order)
