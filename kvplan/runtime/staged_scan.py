"""Several tokens at once on a staged layer: exactly what the same tokens one by one would do.

As in `extend`, all that is ever seen lies side by side and has a life. A token that leaves the ring of recent tokens
for the body lies there twice: as it is until it is encoded, and encoded from then on. Columns are, in this order, the
body, what will be encoded, the ring, the new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvplan.methods.evictors import Evictor, Step
from kvplan.methods.softmax import masked_softmax
from kvplan.runtime.extend import FOREVER


@dataclass(frozen=True)
class StagedRow:
    """Where one row of a staged layer stands.

    Attributes:
        pushed: Tokens that ever entered the recent part; the i-th lies at i modulo its slots.
        flushed: Of those, how many have left it for the body.
        body: Slots of the body that hold something.
    """

    pushed: int
    flushed: int
    body: int


@dataclass(frozen=True)
class Flush:
    """A unit leaves the ring for the body.

    Attributes:
        step: The new token before which it does.
        token: Its first token, counted as in `StagedRow.pushed`.
        body: Slots of the body that held something before.
        slot: First slot of the body that it goes to; None where scores decide.
    """

    step: int
    token: int
    body: int
    slot: int | None


@dataclass(frozen=True)
class Columns:
    """How many columns there are of each kind, the slots of the ring, and the tokens of a unit."""

    body: int
    flushed: int
    recent: int
    new: int
    ring_slots: int
    unit: int

    @property
    def width(self) -> int:
        return self.body + self.flushed + self.recent + self.new

    def dense(self, row: StagedRow, token: int) -> int:
        """Where a token lies as it is, from the first column of the ring on."""
        return token % self.ring_slots if token < row.pushed else self.recent + token - row.pushed


@lru_cache(maxsize=256)
def lives(row: StagedRow, flushes: tuple[Flush, ...], columns: Columns) -> tuple[list[int], list[int]]:
    """The step at which each column of a row comes to be seen (-1: it is there), and the one at which it is gone.

    What a unit overwrites is gone only where its slot is known.
    """
    births, deaths = [FOREVER] * columns.width, [FOREVER] * columns.width
    births[: row.body] = [-1] * row.body
    recent, unit = columns.body + columns.flushed, columns.unit
    for token in range(row.flushed, row.pushed):
        births[recent + columns.dense(row, token)] = -1
    for step in range(columns.new):
        births[recent + columns.recent + step] = step
    written: dict[int, int] = {}
    for number, flush in enumerate(flushes):
        at = columns.body + number * unit
        births[at : at + unit] = [flush.step] * unit
        for token in range(flush.token, flush.token + unit):
            deaths[recent + columns.dense(row, token)] = flush.step
        if flush.slot is None:
            continue
        old = written.get(flush.slot, flush.slot if flush.slot < row.body else None)
        if old is not None:
            deaths[old : old + unit] = [flush.step] * unit
        written[flush.slot] = at
    return births, deaths


def visibility(births: Tensor, deaths: Tensor, num_new: int) -> Tensor:
    """[B, 1, T, N] bool from lives [B, N]."""
    steps = torch.arange(num_new, device=births.device)[:, None]
    return ((births[:, None] <= steps) & (steps < deaths[:, None]))[:, None]


def staged_score_scan(
    evictor: Evictor,
    rows: Sequence[StagedRow],
    flushes: Sequence[Sequence[Flush]],
    capacities: Sequence[int | None],
    columns: Columns,
    births: Tensor,
    deaths: Tensor,
    held: Tensor,
    logits: Tensor,
    positions: Tensor,
    scores: Tensor,
    recent_tokens: int,
    sinks: int,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a score evictor over new tokens, step by step; units are single tokens.

    Args:
        capacities: Most slots of each row's body.
        births, deaths: [B, N] of `lives`, where no slot of the body was known.
        held: [B, T] int64 tokens that each step's query sees.
        logits: [B, Hkv, G, T, N], biased.
        positions: [B, H, N]; scores: [B, H, N] float32, 0 for the new tokens.

    Returns:
        visible [B, H, T, N] bool, the final scores, alive [B, H, N] after the last step, and the body's slot
        [B, H, body + flushed] int64 that each of its columns lies in. Of equal scores the first slot's is the lowest.
    """
    B, H, N = positions.shape
    T, body, device = columns.new, columns.body + columns.flushed, positions.device
    first_new = body + columns.recent
    leaving = torch.zeros(2, T, B, 1, 1, dtype=torch.int64)  # target column and source column
    before = [[-1] * B for _ in range(T)]  # slots of the body that held something, -1: nothing leaves
    for b, (row, plan) in enumerate(zip(rows, flushes, strict=True)):
        for number, flush in enumerate(plan):
            leaving[0, flush.step, b] = columns.body + number
            leaving[1, flush.step, b] = body + columns.dense(row, flush.token)
            before[flush.step][b] = flush.body
    targets, sources = (column.unbind() for column in leaving.to(device).expand(-1, -1, -1, H, -1))
    free = torch.tensor(before, device=device)[..., None, None].expand(T, B, H, 1).unbind()
    limits = [FOREVER if cap is None else cap for cap in capacities]
    alive = (births < 0)[:, None].expand(B, H, N)
    births, deaths = births[:, None], deaths[:, None]
    slots = torch.arange(body, device=device).expand(B, H, body).clone()
    visible = torch.zeros(B, H, T, N, dtype=torch.bool, device=device)
    scores = scores.clone()
    own = positions[..., :body]
    is_sink = own < sinks
    for step in range(T):
        now = positions[:, :1, first_new + step, None]
        some = [b for b, held_before in enumerate(before[step]) if held_before >= 0]
        if some:
            target, source, slot = targets[step], sources[step], free[step]
            is_full = [held_before >= most for held_before, most in zip(before[step], limits, strict=True)]
            if any(is_full):
                there = alive[..., :body]
                protected = is_sink | (own > now - recent_tokens)
                candidates = scores[..., :body].masked_fill(~there | protected, torch.inf)
                tied = there & (candidates == candidates.amin(-1, keepdim=True))
                victim = slots.masked_fill(~tied, FOREVER).min(-1, keepdim=True).indices
                if all(is_full):
                    slot, alive = slots.gather(-1, victim), alive.scatter(-1, victim, False)
                else:
                    full = torch.tensor(is_full, device=device)[:, None, None]
                    slot = torch.where(full, slots.gather(-1, victim), slot)
                    alive = alive.scatter(-1, victim, alive.gather(-1, victim) & ~full)
            moved = scores.gather(-1, source)
            if len(some) == B:
                slots.scatter_(-1, target, slot)
                scores = scores.scatter(-1, target, moved)
            else:
                slots[some] = slots[some].scatter(-1, target[some], slot[some])
                scores[some] = scores[some].scatter(-1, target[some], moved[some])
        alive = (alive & (deaths != step)) | (births == step)
        visible[:, :, step] = alive
        probs = masked_softmax(logits[..., step : step + 1, :], alive[:, :, None, None], sink_logits)
        observed = evictor.observe(scores, probs[..., 0, :].float(), Step(now, held[:, step, None, None]))
        scores = torch.where(alive, observed, scores)  # what has not come yet is not judged
    return visible, scores, alive, slots
