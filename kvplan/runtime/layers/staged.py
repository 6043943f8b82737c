"""StagedLayer: the most recent tokens as they are, older ones encoded in units behind them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.evictors import Step
from kvplan.model_spec import LayerSpec
from kvplan.policy.memory import allocated_slots
from kvplan.policy.schema import LayerPolicy
from kvplan.runtime import chunk
from kvplan.runtime.chunk import pick
from kvplan.runtime.kernels.dense import AttentionArgs, attention_logits
from kvplan.runtime.kernels.parts import Part, Stored
from kvplan.runtime.kernels.stored import attend_parts
from kvplan.runtime.layers.base import PromptStats, Seen, attend_seen, column, prefix_mask
from kvplan.runtime.layers.budgeted import BudgetedLayer, Kept
from kvplan.runtime.staged_scan import Columns, Flush, StagedRow, lives, staged_score_scan, visibility
from kvplan.runtime.storage import SIDE, Pool, Rows, as_bytes, put

_DENSE = Dense()


class StagedLayer(BudgetedLayer):
    """A ring of the most recent tokens, stored as they are, and a body of older ones, encoded a unit at a time.

    Before a token enters a full ring, the oldest unit leaves it: it is encoded into a free unit of the body, or over
    the one that goes next. With an evictor that keeps scores (units of one token) that is the lowest-scored one;
    otherwise units are a ring in rank order, so that a unit is evicted whole. What the recent ring holds is never
    evicted.
    """

    def __init__(self, policy: LayerPolicy, spec: LayerSpec, chunked: bool = False) -> None:
        super().__init__(policy, spec, chunked)
        self.unit, self.recent_slots = policy.stored_whole

    def reset(self) -> None:
        super().reset()
        self.recent: Pool | None = None
        self.channels: Tensor | None = None
        self._start: list[tuple[int, int]] = []  # (body, recent) tokens after the prompt

    # -- state ----------------------------------------------------------------------------------------------------

    def _row(self, row: int, more: int = 0) -> StagedRow:
        """Where a row stands, or will stand after `more` tokens."""
        body, recent = self._start[row]
        pushed = recent + self._appended + more
        ring = self.recent_slots
        flushed = -(-max(0, pushed - ring) // self.unit) * self.unit
        most = self._body_capacity(row)
        held = body + flushed
        return StagedRow(pushed, flushed, held if most is None else min(held, most))

    def _body_capacity(self, row: int) -> int | None:
        capacity = self.capacities[row]
        return None if capacity is None else (capacity - self.recent_slots) // self.unit * self.unit

    def held(self, row: int) -> int:
        state = self._row(row)
        return state.body + state.pushed - state.flushed

    def held_positions(self, row: int) -> list[Tensor]:
        if self.pool is None or self.recent is None:
            return []
        state = self._row(row)
        ring = [k % self.recent_slots for k in range(state.flushed, state.pushed)]
        body = self._stored_positions(self.pool, row)[:, : state.body]
        return self._by_head([body, self._stored_positions(self.recent, row)[:, ring]])

    @property
    def storage(self) -> tuple[Pool, ...]:
        return tuple(pool for pool in (self.pool, self.recent) if pool is not None)

    def _sizes(self, appended: int) -> list[int]:
        """Slots in all per row."""
        full = replace(self._unbounded, key_codec=self.policy.key_codec, value_codec=self.policy.value_codec)
        full = replace(full, channels=self.policy.channels)
        sizes = [allocated_slots(full, self.spec, n, appended) for n in self._prompt_tokens]
        return [s if cap is None else min(s, cap) for s, cap in zip(sizes, self.capacities, strict=True)]

    def _parts(self, appended: int) -> tuple[list[int], list[int]]:
        parts = [self._stored.parts(size) for size in self._sizes(appended)]
        return [body for body, _ in parts], [recent for _, recent in parts]

    def select_rows(self, indices: Sequence[int]) -> None:
        if self.pool is None:
            return
        assert self.recent is not None
        super().select_rows(indices)
        self.recent = self.recent.selected(indices)
        self._start = [self._start[i] for i in indices]
        if self.channels is not None:
            self.channels = self.channels[list(indices)]

    # -- the prompt -----------------------------------------------------------------------------------------------

    @property
    def encoded_alone(self) -> Mapping[str, Codec]:
        return super().encoded_alone if self.unit == 1 else {}  # units are put in order of time first

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        self._prompt_tokens, self._appended = lengths, 0
        self.capacities = self.capacities_for(lengths)
        self._stored = self._layout(keys)
        self.channels = None if stats.channels is None else stats.channels.to(torch.int16)
        bodies, recents = self._parts(0)
        self.pool = Pool(self._stored.body, bodies, keys.device)
        self.recent = Pool(self._stored.recent, recents, keys.device)
        self._start = []
        T = keys.shape[2]
        for b, length in enumerate(lengths):
            start = T - length
            scores = None if stats.scores is None else stats.scores[b, :, start:]
            codes = {name: x[b, :, start:] for name, x in stats.codes.items()}
            kept = self._keep(keys[b, :, start:], values[b, :, start:], scores, self.capacities[b], codes)
            self._place(b, kept)

    def _place(self, row: int, kept: Kept) -> None:
        """The youngest tokens into the ring, the others, in units, into the body."""
        assert self.pool is not None and self.recent is not None
        n = kept.keys.shape[1]
        body = -(-max(0, n - self.recent_slots) // self.unit) * self.unit
        self._start.append((body, n - body))
        side, codes = ({name: x[:, :body] for name, x in found.items()} for found in (kept.side, kept.codes))
        old = Kept(kept.keys[:, :body], kept.values[:, :body], side, codes)
        if body and self.unit > 1:
            old = _units_in_time(old, self.unit)
        self._write(self.pool.row(row), replace(old, keys=self._pruned(old.keys, row)))
        new = self.recent.row(row).columns
        count = n - body
        new["keys.x"][0, :, :count], new["values.x"][0, :, :count] = kept.keys[:, body:], kept.values[:, body:]
        for name in SIDE:
            if name in new:
                new[name][0, :, :count] = kept.side[name][:, body:].to(new[name].dtype)

    def _pruned(self, keys: Tensor, row: int) -> Tensor:
        """[Hkv, n, D] -> [Hkv, n, C]."""
        if self.channels is None:
            return keys
        return keys.gather(-1, self.channels[row].long()[:, None].expand(-1, keys.shape[1], -1))

    # -- later tokens ---------------------------------------------------------------------------------------------

    def _grow(self, num_new: int) -> None:
        assert self.pool is not None and self.recent is not None
        bodies, recents = self._parts(self._appended + num_new)
        if bodies != self.pool.sizes:
            self.pool = self.pool.resized(bodies)
        if recents != self.recent.sizes:
            self.recent = self.recent.resized(recents)

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        self._grow(1)
        assert self.pool is not None and self.recent is not None
        before = [self._row(b) for b in range(self.num_rows)]
        self._appended += 1
        after = [self._row(b) for b in range(self.num_rows)]
        for b, (old, new) in enumerate(zip(before, after, strict=True)):
            if new.flushed > old.flushed:
                self._flush(b, old)
        self._push(before, keys, values)
        outputs, seen = [], []
        for start, stop in self._runs():
            view = Seen(start, stop, 0, 1, self._seen_parts(start, stop, after[start:stop]))
            seen.append(view)
            out, probs = attend_parts(q[start:stop], view.parts, args.of_rows(start, stop), self.keeps_scores)
            outputs.append(out)
            if self.keeps_scores:
                assert probs is not None
                self._observe_parts(start, stop, after[start:stop], view.parts, probs[..., 0, :].float())
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), seen

    def _runs(self) -> list[tuple[int, int]]:
        """Rows whose body and recent part have the same sizes."""
        assert self.pool is not None and self.recent is not None
        sizes = list(zip(self.pool.sizes, self.recent.sizes, strict=True))
        cuts = [0, *(i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]), len(sizes)]
        return list(itertools.pairwise(cuts))

    def _extend(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        assert self.pool is not None and self.recent is not None
        B, num_new = self.num_rows, keys.shape[2]
        paths = self._paths(num_new)
        rows = [path[0] for path in paths]
        flushes = [self._flushes(b, path) for b, path in enumerate(paths)]
        columns = Columns(
            body=-(-max(row.body for row in rows) // self.unit) * self.unit,
            flushed=max(map(len, flushes)) * self.unit,
            recent=max(self.recent.sizes),
            new=num_new,
            ring_slots=self.recent_slots,
            unit=self.unit,
        )
        recent = chunk.side_by_side(self.recent, columns.recent, self._new_recent(keys, values))
        body = self._encoded(columns, rows, flushes, recent)
        side = {name: torch.cat([body[name], recent[name]], -1) for name in SIDE if name in recent}
        part = self._laid_out(body, recent, side.get("counts"))
        lived = [lives(row, plan, columns) for row, plan in zip(rows, flushes, strict=True)]
        births, deaths = (torch.tensor([life[i] for life in lived], device=keys.device) for i in range(2))
        slots = None
        if self.keeps_scores:
            assert part.keys.dense is not None
            logits = attention_logits(q, part.keys.dense, args)
            logits = logits if part.bias is None else logits + part.bias[:, :, None, None]
            capacities = [self._body_capacity(b) for b in range(B)]
            held = [[state.body + state.pushed - state.flushed for state in path[1:]] for path in paths]
            visible, scores, alive, slots = staged_score_scan(
                self.evictor, rows, flushes, capacities, columns, births, deaths,
                torch.tensor(held, device=keys.device), logits, side["positions"],
                side["scores"], self.policy.recent_tokens, self.sinks, args.sink_logits,
            )  # fmt: skip
            stored = columns.body + columns.flushed
            body["scores"], recent["scores"] = scores[..., :stored], scores[..., stored:]
        else:
            visible = visibility(births, deaths, num_new)
        self._grow(num_new)
        for b, row in enumerate(rows):
            if slots is None:
                self._write_units(b, body, columns, flushes[b])
            else:
                self._write_ranked(b, body, alive[b, :, : columns.body + columns.flushed], slots[b])
            self._write_recent(b, recent, columns, row, paths[b][-1])
        self._appended += num_new
        seen = [Seen(0, B, 0, num_new, (replace(part, mask=visible),))]
        return attend_seen(q, seen, args), seen

    def _paths(self, num_new: int) -> list[tuple[StagedRow, ...]]:
        """Where each row stands, and will stand after each of so many tokens; rows that start alike go alike."""
        known: dict[tuple[Any, int | None], tuple[StagedRow, ...]] = {}
        starts = list(zip(self._start, self.capacities, strict=True))
        for b, start in enumerate(starts):
            if start not in known:
                known[start] = tuple(self._row(b, more) for more in range(num_new + 1))
        return [known[start] for start in starts]

    def _flushes(self, row: int, path: Sequence[StagedRow]) -> tuple[Flush, ...]:
        """The units that leave a row's ring on its way."""
        found = []
        for step, (before, after) in enumerate(itertools.pairwise(path)):
            if after.flushed > before.flushed:
                slot = None if self.keeps_scores else self._next_unit(row, before)
                found.append(Flush(step, before.flushed, before.body, slot))
        return tuple(found)

    def _new_recent(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The ring's columns of new tokens."""
        assert self.recent is not None
        B, num_new, new = self.num_rows, keys.shape[2], {"keys.x": keys, "values.x": values}
        for c in self.recent.columns:
            if c.name == "positions":
                first = column(tuple(self.seen(b) for b in range(B)), keys.device)
                new[c.name] = (first + torch.arange(num_new, device=keys.device)).expand(B, c.heads, -1).int()
            elif c.name in SIDE:
                fill = 1 if c.name == "counts" else 0
                new[c.name] = torch.full((B, c.heads, num_new), fill, dtype=c.dtype, device=keys.device)
        return new

    def _encoded(
        self,
        columns: Columns,
        rows: Sequence[StagedRow],
        flushes: Sequence[Sequence[Flush]],
        recent: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The body's columns: its slots, then what will be encoded; rows that encode less have anything there."""
        assert self.pool is not None
        sources = torch.zeros(len(rows), columns.flushed, dtype=torch.int64)
        for b, (row, plan) in enumerate(zip(rows, flushes, strict=True)):
            found = [columns.dense(row, flush.token + i) for flush in plan for i in range(self.unit)]
            sources[b, : len(found)] = torch.tensor(found, dtype=torch.int64)
        sources = sources.to(self._device)[:, None]
        moved = {name: _gathered(x, sources) for name, x in recent.items()}
        keys = moved["keys.x"]
        if self.channels is not None:
            keys = keys.gather(-1, self.channels.long()[:, :, None].expand(-1, -1, keys.shape[2], -1))
        new = {name: moved[name] for name in SIDE if name in moved}
        for role, codec, x in (("keys", self.key_codec, keys), ("values", self.value_codec, moved["values.x"])):
            new |= {f"{role}.{name}": codes for name, codes in codec.encode(x).items()}
        return chunk.side_by_side(self.pool, columns.body, new)

    def _laid_out(self, body: Mapping[str, Tensor], recent: Mapping[str, Tensor], counts: Tensor | None) -> Part:
        """Body and ring as one dense part; a pruned channel of an old key adds nothing to a product."""
        like = recent["keys.x"]
        keys = chunk.decoded(body, "keys", self.key_codec, self._key_dim, like.dtype)
        values = chunk.decoded(body, "values", self.value_codec, self.spec.value_dim, like.dtype)
        if self.channels is not None:
            index = self.channels.long()[:, :, None].expand(-1, -1, keys.shape[2], -1)
            keys = keys.new_zeros(*keys.shape[:3], self.spec.key_dim).scatter(-1, index, keys)
        return chunk.dense_part(torch.cat([keys, like], 2), torch.cat([values, recent["values.x"]], 2), counts)

    def _write_units(self, row: int, body: Mapping[str, Tensor], columns: Columns, flushes: Sequence[Flush]) -> None:
        assert self.pool is not None
        # Only the last unit written to a slot stays in it.
        last = {flush.slot: columns.body + number * self.unit for number, flush in enumerate(flushes)}
        into = [slot + i for slot in last if slot is not None for i in range(self.unit)]
        sources = [source + i for source in last.values() for i in range(self.unit)]
        tokens = {c.name: c.tokens for c in self.pool.columns}
        for name, target in self.pool.row(row).columns.items():
            units, n = slice(None, None, tokens[name]), tokens[name]
            slots, found = [i // n for i in into[units]], [i // n for i in sources[units]]
            as_bytes(target)[0, :, slots] = as_bytes(body[name])[row][:, found]

    def _write_ranked(self, row: int, body: Mapping[str, Tensor], alive: Tensor, slots: Tensor) -> None:
        """What is alive [H, N] of the body, each in its own slot [H, N]."""
        assert self.pool is not None
        order = alive.nonzero()[:, 1].view(alive.shape[0], -1)  # head by head, all have as many
        order = order.gather(-1, slots.gather(-1, order).argsort(-1))
        for name, target in self.pool.row(row).columns.items():
            as_bytes(target)[0, :, : order.shape[1]] = pick(as_bytes(body[name])[row], order)

    def _write_recent(
        self, row: int, recent: Mapping[str, Tensor], columns: Columns, before: StagedRow, after: StagedRow
    ) -> None:
        assert self.recent is not None
        tokens = range(after.flushed, after.pushed)
        slots, sources = [t % self.recent_slots for t in tokens], [columns.dense(before, t) for t in tokens]
        for name, target in self.recent.row(row).columns.items():
            target[0, :, slots] = recent[name][row][:, sources]

    def _flush(self, row: int, state: StagedRow) -> None:
        """Encode the oldest unit of the ring into the body."""
        assert self.pool is not None and self.recent is not None
        old, body = self.recent.row(row).columns, self.pool.row(row)
        slots = [(state.flushed + i) % self.recent_slots for i in range(self.unit)]
        moved = {name: old[name][0][:, slots] for name in old}
        keys, values = self._pruned(moved["keys.x"], row), moved["values.x"]
        at = self._target(row, state, body)
        if isinstance(at, int):
            self._write(body, Kept(keys, values, moved), at)
            return
        for role, codec, x in (("keys", self.key_codec, keys), ("values", self.value_codec, values)):
            for name, codes in codec.encode(x[None]).items():
                put(body.columns[f"{role}.{name}"], at, codes)
        for name in SIDE:
            if name in moved:
                put(body.columns[name], at, moved[name][None])

    def _target(self, row: int, state: StagedRow, body: Rows) -> int | Tensor:
        """First slot of the unit that is written next, or [1, H, 1] slots where heads differ."""
        most = self._body_capacity(row)
        if self.keeps_scores and most is not None and state.body >= most:
            positions = body.positions[..., :most]
            recent = positions >= self.seen(row) - self.policy.recent_tokens
            scores = body.scores[..., :most].masked_fill((positions < self.sinks) | recent, torch.inf)
            return scores.min(-1, keepdim=True).indices
        return self._next_unit(row, state)

    def _next_unit(self, row: int, state: StagedRow) -> int:
        """First slot of the body's next unit where units are a ring."""
        most = self._body_capacity(row)
        if most is None or state.body < most:
            return state.body
        first = -(-self.sinks // self.unit)
        units = most // self.unit
        overwritten = (self._start[row][0] + state.flushed - most) // self.unit
        return (first + overwritten % (units - first)) * self.unit

    def _push(self, before: list[StagedRow], keys: Tensor, values: Tensor) -> None:
        assert self.recent is not None
        for rows in self.recent.rows:
            part = slice(rows.start, rows.stop)
            ring = [before[b].pushed % self.recent_slots for b in range(rows.start, rows.stop)]
            slots = ring[0] if len(set(ring)) == 1 else torch.tensor(ring, device=keys.device)
            put(rows.columns["keys.x"], slots, keys[part])
            put(rows.columns["values.x"], slots, values[part])
            if "positions" in rows.columns:
                seen = [self.seen(b) - 1 for b in range(rows.start, rows.stop)]
                now = torch.tensor(seen, device=keys.device, dtype=torch.int32)[:, None, None]
                put(rows.positions, slots, now.expand(-1, rows.positions.shape[1], -1))
            if "scores" in rows.columns:
                put(rows.scores, slots, torch.zeros_like(rows.scores[..., :1]))
            if "counts" in rows.columns:
                put(rows.columns["counts"], slots, torch.ones_like(rows.columns["counts"][..., :1]))

    def _seen_parts(self, start: int, stop: int, states: list[StagedRow]) -> tuple[Part, ...]:
        assert self.pool is not None and self.recent is not None
        body, recent = self.pool.span(start, stop), self.recent.span(start, stop)
        parts = []
        width = max(s.body for s in states)
        if width:
            mask = prefix_mask([s.body for s in states], width, self.pool.device)
            channels = None if self.channels is None else self.channels[start:stop].long()
            parts.append(replace(self._part(body, width, mask), channels=channels))
        slots = min(self.recent.sizes[start], max(s.pushed for s in states))
        bias = None
        if "counts" in recent.columns:
            bias = recent.columns["counts"][..., :slots].clamp(min=1).float().log()
        keys = Stored(_DENSE, recent.codes("keys", slots), self.spec.key_dim)
        values = Stored(_DENSE, recent.codes("values", slots), self.spec.value_dim)
        parts.append(Part(keys, values, slots, self._ring_mask(states, slots), bias))
        return tuple(parts)

    def _ring_mask(self, states: list[StagedRow], slots: int) -> Tensor | None:
        """[b, 1, 1, slots]: what has not left the ring; None when all of it is there."""
        if all(s.pushed - s.flushed == slots for s in states):
            return None
        mask = torch.zeros(len(states), slots, dtype=torch.bool)
        for i, s in enumerate(states):
            there = [k % self.recent_slots for k in range(s.flushed, s.pushed)]
            mask[i, there] = True
        return mask.to(self._device)[:, None, None]

    @property
    def _key_dim(self) -> int:
        return self.spec.key_dim if self.policy.channels is None else self.policy.channels.num_kept(self.spec.key_dim)

    def _observe_parts(
        self, start: int, stop: int, states: list[StagedRow], parts: tuple[Part, ...], probs: Tensor
    ) -> None:
        """Update the scores of body and ring together: an evictor sees one row of slots."""
        assert self.pool is not None and self.recent is not None
        views = [self.pool.span(start, stop), self.recent.span(start, stop)][-len(parts) :]
        stored = [view.scores[..., : part.slots] for view, part in zip(views, parts, strict=True)]
        held = torch.tensor([self.held(b) for b in range(start, stop)], device=probs.device)[:, None, None]
        seen = torch.tensor([self.seen(b) - 1 for b in range(start, stop)], device=probs.device)[:, None, None]
        updated = self.evictor.observe(torch.cat(stored, -1), probs, Step(seen, held))
        for target, fresh in zip(stored, updated.split([part.slots for part in parts], -1), strict=True):
            target.copy_(fresh)

    # -- memory ---------------------------------------------------------------------------------------------------

    def bytes_by_kind(self) -> dict[str, int]:
        held = super().bytes_by_kind()
        if self.recent is not None:
            held = {kind: held[kind] + more for kind, more in self.recent.bytes_by_kind().items()}
        if self.channels is not None:
            held["channels"] += self.channels.untyped_storage().nbytes()
        return held

    def row_bytes(self, row: int) -> int:
        held = super().row_bytes(row) + (0 if self.recent is None else self.recent.row_bytes(row))
        return held + (0 if self.channels is None else self.channels[row].numel() * self.channels.element_size())


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, ...] at [B, 1, n] -> [B, H, n, ...]."""
    index = index.expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _units_in_time(kept: Kept, unit: int) -> Kept:
    """The tokens of each unit in order of time: a channel then varies less within a unit."""
    positions = kept.side["positions"]
    order = positions.unflatten(-1, (-1, unit)).argsort(-1)
    order = (order + torch.arange(order.shape[1], device=order.device)[:, None] * unit).flatten(-2)
    side = {name: x.expand(order.shape[0], -1).gather(-1, order) for name, x in kept.side.items() if x.ndim == 2}
    return Kept(pick(kept.keys, order), pick(kept.values, order), side)
