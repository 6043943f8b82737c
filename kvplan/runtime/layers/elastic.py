"""ElasticLayer: holds what the evictor finds worth keeping, up to a cap, and allocates no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvplan.methods.codecs import Codec
from kvplan.methods.evictors import Step
from kvplan.methods.softmax import masked_softmax
from kvplan.policy.memory import MIN_GROWTH_TOKENS, grown_tokens
from kvplan.runtime import chunk
from kvplan.runtime.chunk import pick
from kvplan.runtime.extend import FOREVER
from kvplan.runtime.kernels.dense import AttentionArgs, attention_logits
from kvplan.runtime.kernels.parts import Part
from kvplan.runtime.kernels.stored import attend_parts
from kvplan.runtime.layers.base import PromptStats, Seen, attend_seen, column
from kvplan.runtime.layers.budgeted import BudgetedLayer, Kept
from kvplan.runtime.prompt import choose_slots
from kvplan.runtime.storage import Pool, as_bytes, put

HOLE = -1


class ElasticLayer(BudgetedLayer):
    """Slots of one head per row, some of them empty (position -1).

    A token whose score falls `forgets_after` positions behind is dropped at once and its slot reused. Every few steps
    the rows are packed and their storage follows what they hold; only then is the device asked for a count.
    """

    def reset(self) -> None:
        super().reset()
        self._steps_to_pack = 0

    def held(self, row: int) -> int:
        return 0 if self.pool is None else int((self.pool.row(row).positions >= 0).sum())

    def held_positions(self, row: int) -> list[Tensor]:
        assert self.pool is not None
        stored = self._stored_positions(self.pool, row)
        return self._by_head([stored[:, stored[0] >= 0]])

    @property
    def _horizon(self) -> int:
        assert self.evictor.forgets_after is not None
        return self.evictor.forgets_after

    @property
    def encoded_alone(self) -> Mapping[str, Codec]:
        return {}

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        self._prompt_tokens, self._appended = lengths, 0
        self.capacities = self.capacities_for(lengths)
        T, orders = keys.shape[2], []
        for b, length in enumerate(lengths):
            if stats.scores is None:  # nothing is evicted from a full layer
                orders.append(torch.arange(length, device=keys.device)[None])
                continue
            scores = stats.scores[b, :, T - length :]
            alive = self._alive(scores, torch.arange(length, device=keys.device), length - 1)[0].nonzero()[:, 0]
            order = choose_slots(scores[:, alive], self.policy, self.capacities[b], len(alive), keys.device)
            orders.append(alive[order])
        self.pool = Pool(self._layout(keys).body, [order.shape[-1] for order in orders], keys.device)
        for b, (length, order) in enumerate(zip(lengths, orders, strict=True)):
            start = T - length
            scores = stats.scores[b, :, start:] if stats.scores is not None else keys.new_zeros(1, length).float()
            side = {"positions": order, "scores": scores.gather(-1, order)}
            self._write(
                self.pool.row(b), Kept(pick(keys[b, :, start:], order), pick(values[b, :, start:], order), side)
            )
        self._steps_to_pack = 0

    def _alive(self, scores: Tensor, positions: Tensor, now: int | Tensor) -> Tensor:
        """What is kept: sinks, the recent window, and what mattered not too long ago."""
        recent = positions > now - self.policy.recent_tokens
        return (positions < self.sinks) | recent | self._mattered(scores, now)

    def _mattered(self, scores: Tensor, now: int | Tensor) -> Tensor:
        return scores > now - self._horizon

    def _pack(self) -> None:
        """Close the holes and fit the storage to what is held."""
        assert self.pool is not None
        kept = [self.held(b) for b in range(self.num_rows)]
        sizes, room = [], []
        for n, prompt, cap in zip(kept, self._prompt_tokens, self.capacities, strict=True):
            block = max(MIN_GROWTH_TOKENS, prompt // 16)
            planned = prompt + grown_tokens(prompt, self._appended + 1)
            size = max(n + 1, min(n + block, planned))
            size = size if cap is None else min(size, cap)
            sizes.append(size)
            if cap is None or size < cap:
                room.append(size - n)
        pool = Pool(self.pool.columns, sizes, self.pool.device)
        for b, n in enumerate(kept):
            mine, old = pool.row(b), self.pool.row(b)
            order = (old.positions[0, 0] >= 0).nonzero()[:, 0]
            for name, target in mine.columns.items():
                target[:, :, :n] = old.columns[name][:, :, order]
            mine.positions[..., n:] = HOLE
        self.pool = pool
        self._steps_to_pack = min(room, default=max(MIN_GROWTH_TOKENS, max(self._prompt_tokens) // 16))

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        if self._steps_to_pack == 0:
            self._pack()
        self._steps_to_pack -= 1
        assert self.pool is not None
        outputs, seen = [], []
        for rows in self.pool.rows:
            part = slice(rows.start, rows.stop)
            now = column(tuple(self.seen(b) for b in range(rows.start, rows.stop)), self.pool.device)
            slots = self._slots(rows.positions, rows.scores, now)
            for role, codec, x in (("keys", self.key_codec, keys), ("values", self.value_codec, values)):
                for name, codes in codec.encode(x[part]).items():
                    put(rows.columns[f"{role}.{name}"], slots, codes)
            put(rows.positions, slots, now.int())
            put(rows.scores, slots, torch.zeros_like(rows.scores[..., :1]))
            there = rows.positions >= 0  # [b, 1, S]
            view = Seen(rows.start, rows.stop, 0, 1, (self._part(rows, there.shape[-1], there[:, None]),))
            seen.append(view)
            out, probs = attend_parts(q[part], view.parts, args.of_rows(rows.start, rows.stop), True)
            outputs.append(out)
            assert probs is not None
            step = Step(now, there.sum(-1, keepdim=True))
            scores = self.evictor.observe(rows.scores, probs[..., 0, :].float(), step)
            rows.scores.copy_(scores)
            if self.evicts:
                rows.positions.masked_fill_(~self._alive(scores, rows.positions, now), HOLE)
        self._appended += 1
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), seen

    def _extend(self, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs) -> tuple[Tensor, list[Seen]]:
        assert self.pool is not None
        rows, device = self.num_rows, keys.device
        width = max(self.pool.sizes)
        now = column(tuple(self.seen(b) for b in range(rows)), device)
        columns = chunk.side_by_side(self.pool, width, self._columns_of(keys, values, now))
        slots = torch.arange(columns["positions"].shape[-1], device=device)
        alive = (columns["positions"] >= 0) & (slots < column(tuple(self.pool.sizes), device))
        part = chunk.decoded_part(columns, self.key_codec, self.value_codec, self._key_dim, self.spec.value_dim, keys)
        visible, columns["scores"], alive = self._scan(q, part, columns, alive, args)
        self._appended += keys.shape[2]
        self._keep_alive_only(columns, alive)
        seen = [Seen(0, rows, 0, keys.shape[2], (replace(part, mask=visible),))]
        return attend_seen(q, seen, args), seen

    def _scan(
        self, q: Tensor, part: Part, columns: Mapping[str, Tensor], alive: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the evictor over new tokens, step by step: who is there decides by whom the next ones are ranked.

        Args:
            q: [b, G, T, D]; part: the old slots, then the new tokens: N in all.
            columns: positions and scores, [b, 1, N].
            alive: [b, 1, N] bool, False on the new tokens.

        Returns:
            visible [b, 1, T, N] bool, and scores and alive after the last step.
        """
        assert part.keys.dense is not None
        logits = attention_logits(q, part.keys.dense, args)  # [b, 1, G, T, N]
        T, positions, scores = q.shape[2], columns["positions"], columns["scores"]
        old = positions.shape[-1] - T
        limits = column(tuple(FOREVER if cap is None else cap for cap in self.capacities), q.device)
        visible = torch.zeros(*alive.shape[:2], T, alive.shape[-1], dtype=torch.bool, device=q.device)
        is_sink = positions < self.sinks
        for step in range(T):
            now = positions[..., old + step, None]
            full = alive.sum(-1, keepdim=True) >= limits
            protected = is_sink | (positions > now - self.policy.recent_tokens)
            ranked = scores.masked_fill(protected | ~alive, torch.inf)
            tied = alive & (ranked == ranked.amin(-1, keepdim=True))
            victim = positions.masked_fill(~tied, FOREVER).min(-1, keepdim=True).indices  # as `_slots`
            alive = alive.scatter(-1, victim, alive.gather(-1, victim) & ~full)
            alive[..., old + step] = True
            visible[:, :, step] = alive
            probs = masked_softmax(logits[..., step : step + 1, :], alive[:, :, None, None], args.sink_logits)
            observed = self.evictor.observe(scores, probs[..., 0, :].float(), Step(now, alive.sum(-1, keepdim=True)))
            scores = torch.where(alive, observed, scores)  # what has not come yet is not judged
            if self.evicts:
                alive = alive & (protected | self._mattered(scores, now))
        return visible, scores, alive

    def _keep_alive_only(self, columns: Mapping[str, Tensor], alive: Tensor) -> None:
        """A new pool of what is alive [b, 1, N]."""
        assert self.pool is not None
        pool = Pool(self.pool.columns, alive[:, 0].sum(-1).tolist(), self.pool.device)
        for b in range(self.num_rows):
            order = alive[b, 0].nonzero()[:, 0]
            for name, target in pool.row(b).columns.items():
                as_bytes(target)[0] = as_bytes(columns[name])[b][:, order]
        self.pool, self._steps_to_pack = pool, 0

    def _slots(self, positions: Tensor, scores: Tensor, now: Tensor) -> Tensor:
        """[b, 1, 1]: an empty slot, else the one whose token mattered longest ago, of several the oldest.

        Which slot a token lies in depends on when rows were packed; the choice may not.
        """
        protected = (positions < self.sinks) | (positions > now - self.policy.recent_tokens)
        ranked = scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)
        tied = ranked == ranked.amin(-1, keepdim=True)
        return positions.masked_fill(~tied, torch.iinfo(positions.dtype).max).min(-1, keepdim=True).indices

    def select_rows(self, indices: Sequence[int]) -> None:
        super().select_rows(indices)
        self._steps_to_pack = 0
