"""ElasticLayer: holds what the evictor finds worth keeping, up to a cap, and allocates no more than that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvplan.methods.evictors import Step
from kvplan.policy.memory import MIN_GROWTH_TOKENS, grown_tokens
from kvplan.runtime.chunk import pick
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.stored import attend_parts
from kvplan.runtime.layers.base import PromptStats, Seen
from kvplan.runtime.layers.budgeted import BudgetedLayer, Kept
from kvplan.runtime.prompt import choose_slots
from kvplan.runtime.storage import Pool, put

HOLE = -1


class ElasticLayer(BudgetedLayer):
    """Slots of one head per row, some of them empty (position -1).

    A token whose score falls `forgets_after` positions behind is dropped at once and its slot reused. Every few steps
    the rows are packed and their storage follows what they hold; only then is the device asked for a count.
    """

    def reset(self) -> None:
        super().reset()
        self._steps_to_pack = 0

    @property
    def _scans(self) -> bool:
        return False

    def held(self, row: int) -> int:
        return 0 if self.pool is None else int((self.pool.row(row).positions >= 0).sum())

    @property
    def _horizon(self) -> int:
        assert self.evictor.forgets_after is not None
        return self.evictor.forgets_after

    def fill(self, keys: Tensor, values: Tensor, lengths: list[int], stats: PromptStats) -> None:
        self._prompt_tokens, self._appended = lengths, 0
        self.capacities = self._capacities(lengths)
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
        return (positions < self.sinks) | recent | (scores > now - self._horizon)

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
            now = self._now()[part]
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
