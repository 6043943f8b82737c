"""Several tokens at once on a cache that already holds some: exactly what the same tokens one by one would do.

Old slots and new tokens are laid side by side. Each has a life: the step at which it enters and the step at which it is
overwritten. A query sees what is alive at its own step, so one masked attention gives every step's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from kvplan.methods.evictors import Evictor, Step
from kvplan.methods.softmax import masked_softmax
from kvplan.runtime.kernels.dense import AttentionArgs, attention_logits

FOREVER = 2**30


@dataclass(frozen=True)
class RowState:
    """One row before the new tokens: slots held, capacity (or None), protected sinks, and ring overwrites so far."""

    held: int
    capacity: int | None
    sinks: int
    overwrites: int

    @property
    def is_full(self) -> bool:
        return self.held == self.capacity


@dataclass(frozen=True)
class Standing:
    """Where a layer's rows stand when tokens come; `now` are the positions of the first ones."""

    rows: tuple[RowState, ...]
    now: tuple[int, ...]

    @cached_property
    def held(self) -> tuple[int, ...]:
        return tuple(row.held for row in self.rows)

    @cached_property
    def held_after(self) -> tuple[int, ...]:
        """Slots held once one more token has come."""
        return tuple(row.held if row.is_full else row.held + 1 for row in self.rows)

    @cached_property
    def full(self) -> tuple[bool, ...]:
        return tuple(row.is_full for row in self.rows)

    @cached_property
    def all_full(self) -> bool:
        return all(self.full)

    @cached_property
    def ring_slots(self) -> tuple[int, ...]:
        """Where the next token of each row goes in a ring."""
        return tuple(ring_slot(row, 0) for row in self.rows)


@lru_cache(maxsize=64)
def standing(prompts: tuple[int, ...], capacities: tuple[int | None, ...], sinks: int, appended: int) -> Standing:
    """Of rows with these prompts; layers of equal capacities share one, so that a step works it out once."""
    rows = []
    for prompt, capacity in zip(prompts, capacities, strict=True):
        seen = prompt + appended
        if capacity is None:
            rows.append(RowState(seen, None, sinks, 0))
        else:
            rows.append(RowState(min(seen, capacity), capacity, sinks, max(0, seen - max(capacity, prompt))))
    return Standing(tuple(rows), tuple(prompt + appended for prompt in prompts))


def ring_slot(state: RowState, step: int) -> int:
    """The slot that the `step`-th new token goes to."""
    slot = state.held + step
    if state.capacity is None or slot < state.capacity:
        return slot
    return state.sinks + (state.overwrites + slot - state.capacity) % (state.capacity - state.sinks)


def ring_visibility(rows: Sequence[RowState], num_old: int, num_new: int, device: torch.device) -> Tensor:
    """[B, 1, T, num_old + T] bool: which old slots and new tokens each new token's query sees.

    Args:
        num_old: Old slots laid out per row (the largest `held`).
        num_new: New tokens T.
    """
    lived = [ring_lives(state, num_old, num_new) for state in rows]
    birth, death = (torch.from_numpy(np.stack([life[i] for life in lived])).to(device) for i in range(2))
    steps = torch.arange(num_new, dtype=birth.dtype, device=device)[:, None]
    return ((birth[:, None] <= steps) & (steps < death[:, None]))[:, None]


@lru_cache(maxsize=1024)
def ring_slots(state: RowState, num_new: int) -> np.ndarray:
    """[T] int64: `ring_slot` of every new token. Not to be written to."""
    slots = state.held + np.arange(num_new)
    if state.capacity is None:
        return slots
    over = slots - state.capacity
    around = state.sinks + (state.overwrites + over) % max(1, state.capacity - state.sinks)
    return np.where(over < 0, slots, around)


@lru_cache(maxsize=1024)
def ring_lives(state: RowState, num_old: int, num_new: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which each old slot and each new token come to be seen and are overwritten, [num_old + T] int32.

    All layers of a forward ask alike. Not to be written to.
    """
    births, deaths = np.zeros(num_old + num_new, np.int32), np.full(num_old + num_new, FOREVER, np.int32)
    births[state.held : num_old] = FOREVER
    births[num_old:] = np.arange(num_new)
    slots = ring_slots(state, num_new)
    order = np.argsort(slots, kind="stable")  # the tokens that go to one slot, one after the other
    again = slots[order][1:] == slots[order][:-1]
    deaths[num_old + order[:-1][again]] = order[1:][again]
    first = order[np.concatenate(([True], ~again))]
    first = first[slots[first] < state.held]
    deaths[slots[first]] = first
    return births, deaths


@lru_cache(maxsize=256)
def last_written(
    state: RowState, num_old: int, num_new: int, with_old: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The slots that are written, [n] int64, and the column that stays in each: the last token that goes there.

    Args:
        with_old: Old slots too, the first columns. Neither result is to be written to.
    """
    last = {slot: slot for slot in range(state.held)} if with_old else {}
    last |= {slot: num_old + step for step, slot in enumerate(ring_slots(state, num_new).tolist())}
    with torch.inference_mode(False):
        return torch.tensor(list(last), device=device), torch.tensor(list(last.values()), device=device)


@lru_cache(maxsize=64)
def ring_successions(state: RowState, num_old: int, num_new: int, device: torch.device) -> Tensor:
    """What is overwritten after each new token, next and then, in columns: the old slots, then the new tokens.

    Returns:
        [T, ring] int64; of the first steps none, where the row has room: [fewer, ring]. Not to be written to.
    """
    occupants = list(range(state.held))
    found = []
    for step in range(num_new):
        slot = ring_slot(state, step)
        occupants[slot : slot + 1] = [num_old + step]
        if len(occupants) == state.capacity:
            victim = ring_slot(state, step + 1)
            found.append(occupants[victim:] + occupants[state.sinks : victim])
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int64, device=device)


def score_scan(
    evictor: Evictor,
    rows: Sequence[RowState],
    recent_tokens: int,
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    scores: Tensor,
    args: AttentionArgs,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a score evictor over T new tokens, step by step.

    Args:
        q: [B, Hq, T, D] queries of the new tokens.
        keys: [B, Hkv, N + T, D] old slots, then the new tokens.
        positions: [B, H, N + T] true positions; scores: [B, H, N + T] float32, 0 for the new tokens.
        bias: [B, Hkv, N + T] added to the logits, or None.

    Returns:
        visible [B, H, T, N + T] bool, the final scores, alive [B, H, N + T] bool after the last step, and the slot
        [B, H, N + T] int64 that each of these lies in. Of equal scores the first slot's is the lowest.
    """
    B, H, width = positions.shape
    T = q.shape[2]
    N = width - T
    logits = attention_logits(q, keys, args)  # [B, Hkv, G, T, N + T]
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    held = torch.tensor([state.held for state in rows], device=keys.device)
    limits = [FOREVER if s.capacity is None else s.capacity for s in rows]
    counts = [[min(state.held + step, most) for state, most in zip(rows, limits, strict=True)] for step in range(T + 1)]
    seen = torch.tensor(counts[1:], device=keys.device)[..., None, None].unbind()
    free = (held[None] + torch.arange(T, device=keys.device)[:, None])[..., None, None].unbind()  # the next free slot
    sinks = torch.tensor([state.sinks for state in rows], device=keys.device)[:, None, None]
    is_sink = positions < sinks
    alive = (torch.arange(width, device=keys.device) < held[:, None])[:, None].expand(B, H, width).clone()
    alive[..., N:] = False
    visible = torch.zeros(B, H, T, width, dtype=torch.bool, device=keys.device)
    slots = torch.arange(width, device=keys.device).expand(B, H, width).clone()
    for step in range(T):
        now = positions[:, :, N + step, None]
        is_full = [count == most for count, most in zip(counts[step], limits, strict=True)]
        slot = free[step]
        if any(is_full):
            protected = is_sink | (positions > now - recent_tokens)
            candidates = scores.masked_fill(~alive | protected, torch.inf)
            equal = candidates == candidates.amin(-1, keepdim=True)
            victim = slots.masked_fill(~equal, FOREVER).min(-1, keepdim=True).indices
            if all(is_full):
                slot = slots.gather(-1, victim)
                alive.scatter_(-1, victim, False)
            else:
                full = torch.tensor(is_full, device=keys.device)[:, None, None]
                slot = torch.where(full, slots.gather(-1, victim), slot)
                alive.scatter_(-1, victim, alive.gather(-1, victim) & ~full)
        slots[..., N + step, None] = slot
        alive[..., N + step] = True
        visible[:, :, step] = alive
        probs = masked_softmax(logits[..., step : step + 1, :], alive[:, :, None, None], args.sink_logits)
        observed = evictor.observe(scores, probs[..., 0, :].float(), Step(now[:, :1], seen[step]))
        scores = torch.where(alive, observed, scores)  # what has not come yet is not judged
    return visible, scores, alive, slots
