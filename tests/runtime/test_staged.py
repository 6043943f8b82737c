"""Staged layers (KIVI, ThinK) against lists of tokens: who is held, how it is stored, what attention makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import ARGS, D, append, prefill
from oracle import ListCache
from torch import Tensor

from kvplan.errors import PolicyError
from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.model_spec import LayerSpec
from kvplan.policy.layout import layout
from kvplan.policy.memory import allocated_slots, layout_bytes
from kvplan.policy.rules import check_policy
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.layers.staged import StagedLayer

HQ, HKV = 4, 2
SPEC = LayerSpec(HKV, D, D)
SINKS, RECENT, UNIT, RING = 2, 4, 4, 8
Decode = Callable[[Tensor, int], Tensor]


class Lists:
    """One row: per KV head the units of the body, in slot order, and the tokens of the recent ring, oldest first."""

    def __init__(
        self, name: str, slots: int | None, q: Tensor, k: Tensor, v: Tensor, prompt: int, *,
        unit: int, keys: Decode, values: Decode, recent: int = RECENT, sinks: int = SINKS, ring: int = RING,
    ) -> None:  # fmt: skip
        self.name, self.unit, self.q, self.k, self.v, self.ring = name, unit, q, k, v, ring
        self.keys, self.values, self.recent = keys, values, recent
        self.sinks = 0 if name == "sliding" else sinks
        self.scored = name in ("h2o", "tova")
        self.most = None if slots is None else (slots - ring) // unit  # units of the body
        ranks = ListCache(name, prompt, sinks, recent, ARGS.scaling)
        ranks.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt])
        self.scores = [dict(enumerate(row)) for row in ranks.scores]
        self.body: list[list[list[int]]] = []
        self.fresh: list[list[int]] = []
        for head in range(HKV):
            order = self._chosen(self.scores[head], prompt, slots)
            count = math.ceil(max(0, len(order) - ring) / unit) * unit
            self.body.append([sorted(order[i : i + unit]) for i in range(0, count, unit)])
            self.fresh.append(order[count:])
        self.next = [math.ceil(self.sinks / unit)] * HKV

    def _chosen(self, scores: dict[int, float], T: int, slots: int | None) -> list[int]:
        if slots is None:
            return list(range(T))
        kept = min(T, self.ring + (slots - self.ring) // self.unit * self.unit)
        front = min(self.sinks, T)
        behind = max(front, T - max(self.recent, self.ring))
        ranked = sorted(range(front, behind), key=lambda t: (scores[t], t)) + list(range(behind, T))
        order = list(range(front)) + ranked[len(ranked) - (kept - front) :]
        return sorted(order) if self.scored else order

    def step(self, t: int) -> Tensor:
        for head in range(HKV):
            if len(self.fresh[head]) == self.ring:
                leaving, self.fresh[head] = self.fresh[head][: self.unit], self.fresh[head][self.unit :]
                self._settle(head, leaving, t)
            self.fresh[head].append(t)
            self.scores[head][t] = 0.0
        rows = [self._attend(h, t) for h in range(HQ)]
        if self.scored:
            self._observe([probs for _, probs in rows])
        return torch.stack([out for out, _ in rows])

    def _settle(self, head: int, unit: list[int], t: int) -> None:
        body = self.body[head]
        if self.most is None or len(body) < self.most:
            body.append(unit)
        elif self.scored:
            free = [u for u in body if u[0] >= self.sinks and u[0] <= t - self.recent]
            body[body.index(min(free, key=lambda u: self.scores[head][u[0]]))] = unit
        else:
            body[self.next[head]] = unit
            first = math.ceil(self.sinks / self.unit)
            self.next[head] = self.next[head] + 1 if self.next[head] + 1 < self.most else first

    def held(self, head: int) -> list[int]:
        return [t for unit in self.body[head] for t in unit] + self.fresh[head]

    def body_vectors(self, head: int) -> tuple[Tensor, Tensor]:
        """What the codecs give back of the body, in slot order."""
        rows = [
            (self.keys(self.k[head, unit], head), self.values(self.v[head, unit], head)) for unit in self.body[head]
        ]
        none = torch.zeros(0, D, dtype=torch.float64)
        return torch.cat([none, *(k for k, _ in rows)]), torch.cat([none, *(v for _, v in rows)])

    def _attend(self, h: int, t: int) -> tuple[Tensor, dict[int, float]]:
        head = h // (HQ // HKV)
        keys, values = self.body_vectors(head)
        keys = torch.cat([keys, self.k[head, self.fresh[head]]])
        values = torch.cat([values, self.v[head, self.fresh[head]]])
        probs = (keys @ self.q[h, t] * ARGS.scaling).softmax(0)
        return probs @ values, dict(zip(self.held(head), probs.tolist(), strict=True))

    def _observe(self, probs: list[dict[int, float]]) -> None:
        for head in range(HKV):
            mine = probs if self.name == "tova" else probs[head * (HQ // HKV) : (head + 1) * (HQ // HKV)]
            for t in self.held(head):
                mean = sum(p[t] for p in mine) / len(mine)
                self.scores[head][t] = mean if self.name == "tova" else self.scores[head][t] + mean


def tensors(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(rows, heads, tokens, D, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(HQ), make(HKV), make(HKV)


def layer_of(name: str, slots: Slots, **fields: Any) -> StagedLayer:
    policy = LayerPolicy(
        slots=slots, sink_tokens=SINKS, **{"recent_tokens": RECENT, **fields}, evictor=evictors[name]()
    )
    check_policy(Policy(layers=(policy,)))
    return StagedLayer(policy, SPEC)


def through(codec: Any) -> Decode:
    return lambda x, head: codec.decode(codec.encode(x), D, x.dtype)


def assert_stores(made: StagedLayer, oracle: Lists, unpruned: Callable[[Tensor, int], Tensor]) -> None:
    """The body decodes to what the codec makes of the oracle's units, the ring holds the oracle's tokens as they are.

    Args:
        unpruned: Decoded keys of the stored channels and a head -> keys [n, D], dropped channels 0.
    """
    body, recent = made.pool.row(0), made.recent.row(0).columns
    for head in range(HKV):
        keys, values = oracle.body_vectors(head)
        n = len(keys)
        found = made.key_codec.decode(
            {name: x[0, head] for name, x in body.codes("keys").items()}, made._key_dim, torch.float64
        )
        assert torch.equal(unpruned(found[:n], head), keys)
        found = made.value_codec.decode(
            {name: x[0, head] for name, x in body.codes("values").items()}, D, torch.float64
        )
        assert torch.equal(found[:n], values)
        here = [t % RING for t in range(oracle_pushed(made) - len(oracle.fresh[head]), oracle_pushed(made))]
        assert torch.equal(recent["keys.x"][0, head, here], oracle.k[head, oracle.fresh[head]])
        assert torch.equal(recent["values.x"][0, head, here], oracle.v[head, oracle.fresh[head]])


def oracle_pushed(made: StagedLayer) -> int:
    return made._row(0).pushed


CODECS = {
    "kivi2": (KIVI(bits=2, group=UNIT, residual_tokens=RING), KIVI(bits=2, group=UNIT, residual_tokens=RING)),
    "kivi4": (KIVI(bits=4, group=UNIT, residual_tokens=RING), KIVI(bits=4, group=UNIT, residual_tokens=RING)),
    "kivi-int8": (KIVI(bits=4, group=UNIT, residual_tokens=RING), Int8()),
    "int8-kivi": (Int8(), KIVI(bits=2, group=UNIT, residual_tokens=RING)),
}


def assert_follows(
    made: StagedLayer, oracle: Lists, q: Tensor, k: Tensor, v: Tensor, prompt: int, steps: int, kept: Any = None
) -> None:
    assert_stores(made, oracle, kept or (lambda x, head: x))
    for t in range(prompt, prompt + steps):
        out = append(made, q, k, v, t)
        expected = oracle.step(t)
        torch.testing.assert_close(out[0, 0], expected, rtol=1e-10, atol=1e-12)
        assert_stores(made, oracle, kept or (lambda x, head: x))
        assert made.held(0) == len(oracle.held(0))


@pytest.mark.parametrize(("name", "slots", "prompt"), [
    *(("streaming", None, n) for n in (RING - 1, RING + 1, 2 * RING)),
    *(("snapkv", 21, n) for n in (1, RING - 1, RING, RING + 1, 2 * RING, 4 * RING + 3)),
    *(("streaming", 16, n) for n in (RING - 1, RING, RING + 1, 2 * RING)),
    ("sliding", 16, 2 * RING), ("knorm", 16, 4 * RING + 3), ("knorm", 21, RING + 1),
])  # fmt: skip
def test_kivi_agrees_with_lists_of_tokens(name: str, slots: int | None, prompt: int) -> None:
    q, k, v = tensors(1, prompt + 3 * RING)
    keys, values = CODECS["kivi2"]
    made = layer_of(name, FULL if slots is None else Slots(slots), key_codec=keys, value_codec=values)
    prefill(made, q, k, v, prompt)
    oracle = Lists(
        name, slots, q[0], k[0], v[0], prompt, unit=UNIT, keys=through(keys.for_keys()),
        values=through(values.for_values()),
    )  # fmt: skip
    assert_follows(made, oracle, q, k, v, prompt, 3 * RING)


@pytest.mark.parametrize(("name", "codec"), [
    ("snapkv", "kivi4"), ("streaming", "kivi-int8"), ("knorm", "int8-kivi"), ("h2o", "int8-kivi"),
    ("tova", "int8-kivi"),
])  # fmt: skip
def test_keys_and_values_of_different_codecs(name: str, codec: str) -> None:
    keys, values = CODECS[codec]
    unit = keys.for_keys().group_tokens
    q, k, v = tensors(1, 60)
    made = layer_of(name, Slots(18), key_codec=keys, value_codec=values)
    prefill(made, q, k, v, 30)
    oracle = Lists(
        name, 18, q[0], k[0], v[0], 30, unit=unit, keys=through(keys.for_keys()), values=through(values.for_values())
    )
    assert_follows(made, oracle, q, k, v, 30, 26)


def test_sinks_and_recent_tokens_are_never_evicted() -> None:
    """Also where more recent tokens are protected than the ring holds."""
    keys = KIVI(bits=4, group=UNIT, residual_tokens=RING)
    for recent in (RING, RING + 1, RING + 2, RING + 7):
        layer = LayerPolicy(
            slots=Slots(1), sink_tokens=3, recent_tokens=recent, key_codec=keys, evictor=evictors["knorm"]()
        )
        with pytest.raises(PolicyError, match="raise slots to at least") as told:
            check_policy(Policy(layers=(layer,)))
        least = int(str(told.value).split()[-1])
        q, k, v = tensors(1, 50)
        made = layer_of("knorm", Slots(least), recent_tokens=recent, key_codec=keys)
        prefill(made, q, k, v, 30)
        oracle = Lists(
            "knorm", least, q[0], k[0], v[0], 30, unit=UNIT, keys=through(keys.for_keys()), values=lambda x, head: x,
            recent=recent,
        )  # fmt: skip
        for t in range(30, 50):
            torch.testing.assert_close(append(made, q, k, v, t)[0, 0], oracle.step(t))
            for head in range(HKV):
                assert {0, 1, *range(t - recent + 1, t + 1)} <= set(oracle.held(head)), (recent, t)


@pytest.mark.parametrize(("bits", "effective"), [(2, 3), (4, 5)])
def test_a_body_slot_takes_the_bits_of_the_paper(bits: int, effective: int) -> None:
    """Codes plus a float16 scale and minimum per 32 elements: `bits + 1` bits an element, keys and values alike."""
    codec, spec = KIVI(bits=bits, group=32, residual_tokens=32), LayerSpec(kv_heads=2, key_dim=64, value_dim=64)
    policy = LayerPolicy(key_codec=codec, value_codec=codec)
    stored = layout(policy, spec, torch.bfloat16)
    small, large = (layout_bytes(stored, 32 + units * 32) for units in (1, 5))
    elements = 4 * 32 * 2 * 64
    assert (large.keys + large.values + large.scales) - (small.keys + small.values + small.scales) == (
        2 * elements * effective // 8
    )
    assert layout_bytes(stored, 32).total == 32 * 2 * (64 + 64) * 2  # the ring as it is
    q, k, v = (torch.randn(1, heads, 200, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    made = StagedLayer(policy, spec)
    made.store_prompt(q[:, :, :150], k[:, :, :150], v[:, :, :150], torch.ones(1, 150, dtype=torch.bool), ARGS)
    for g in range(50):
        slots = allocated_slots(policy, spec, 150, g)
        assert sum(made.bytes_by_kind().values()) == layout_bytes(stored, slots).total
        append(made, q, k, v, 150 + g)


def test_a_full_layer_never_rewrites_what_it_encoded() -> None:
    q, k, v = tensors(1, 100)
    codec = CODECS["kivi2"][0]
    made = layer_of("streaming", FULL, key_codec=codec, value_codec=codec)
    prefill(made, q, k, v, 30)
    before: dict[str, Tensor] = {}
    for t in range(30, 100):
        append(made, q, k, v, t)
        used = {True: made._row(0).body // UNIT, False: made._row(0).body}
        now = {name: x[0, :, : used[name.startswith("keys")]].clone() for name, x in made.pool.row(0).columns.items()}
        assert all(torch.equal(now[name][:, : x.shape[1]], x) for name, x in before.items())
        before = now
        assert made.held(0) == t + 1


def kept_channels(q: Tensor, k: Tensor, window: int, count: int) -> list[list[int]]:
    """The channels with the largest mean(q^2) mean(k^2), for each KV head."""
    found = []
    for head in range(HKV):
        asked = q[head * 2 : head * 2 + 2, -window:].square().mean((0, 1))
        worth = (asked * k[head].square().mean(0)).tolist()
        found.append(sorted(sorted(range(D), key=lambda c: -worth[c])[:count]))
    return found


@pytest.mark.parametrize(("name", "codec", "prompt"), [
    ("streaming", Dense(), RING - 1), ("snapkv", Dense(), RING), ("snapkv", Int8(), 30), ("h2o", Dense(), RING + 1),
    ("h2o", Int8(), 30), ("tova", Dense(), 30), ("tova", Int8(), RING),
], ids=lambda x: getattr(x, "name", str(x)))  # fmt: skip
def test_think_agrees_with_lists_of_tokens(name: str, codec: Any, prompt: int) -> None:
    q, k, v = tensors(1, prompt + 3 * RING)
    think = ThinK(drop=0.4, recent=RING, window=5)
    made = layer_of(name, Slots(14), channels=think, key_codec=codec, value_codec=codec)
    prefill(made, q, k, v, prompt)
    channels = kept_channels(q[0, :, :prompt], k[0, :, :prompt], 5, 5)
    assert made.channels[0].tolist() == channels

    def widened(x: Tensor, head: int) -> Tensor:
        wide = x.new_zeros(x.shape[0], D)
        wide[:, channels[head]] = x
        return wide

    def pruned(x: Tensor, head: int) -> Tensor:
        return widened(codec.decode(codec.encode(x[:, channels[head]]), 5, x.dtype), head)

    oracle = Lists(name, 14, q[0], k[0], v[0], prompt, unit=1, keys=pruned, values=through(codec))
    assert_follows(made, oracle, q, k, v, prompt, 3 * RING, kept=widened)


@pytest.mark.parametrize("name", ["streaming", "sliding", "snapkv", "knorm", "h2o", "tova"])
def test_think_that_drops_nothing_prunes_nothing(name: str) -> None:
    """The token that leaves the ring stays a step longer, so the plain layer protects one token more."""
    q, k, v = tensors(2, 70)
    fields = {"slots": Slots(18), "sink_tokens": SINKS, "recent_tokens": RING + 1, "evictor": evictors[name]()}
    plain = BudgetedLayer(LayerPolicy(**fields), SPEC)
    think = StagedLayer(LayerPolicy(**fields, channels=ThinK(drop=0.0, recent=RING)), SPEC)
    for made in (plain, think):
        prefill(made, q, k, v, 30)
    for t in range(30, 70):
        torch.testing.assert_close(append(plain, q, k, v, t), append(think, q, k, v, t), rtol=1e-12, atol=1e-12)
        for row in range(2):
            whole = plain.pool.row(row).columns["keys.x"][0]
            staged = torch.cat([p.row(row).columns["keys.x"][0] for p in (think.pool, think.recent)], 1)
            for head in range(HKV):
                assert sorted(whole[head].tolist()) == sorted(staged[head].tolist())  # bit for bit


@pytest.mark.parametrize("name", ["streaming", "h2o", "tova"])
def test_recent_tokens_beyond_think_s_own_are_protected(name: str) -> None:
    q, k, v = tensors(1, 90)
    recent = RING + 5
    made = layer_of(name, Slots(SINKS + 1 + recent), recent_tokens=recent, channels=ThinK(drop=0.4, recent=RING))
    prefill(made, q, k, v, 40)
    for t in range(40, 90):
        append(made, q, k, v, t)
        values = torch.cat([p.row(0).columns["values.x"][0] for p in (made.pool, made.recent)], 1)
        for head in range(HKV):
            held = {int((v[0, head] == x).all(-1).nonzero()[0]) for x in values[head]}
            assert {0, 1, *range(t - recent + 1, t + 1)} <= held, t


def test_pruned_channels_take_no_byte_and_recent_keys_are_whole() -> None:
    policy = LayerPolicy(slots=Slots(20), channels=ThinK(drop=0.5, recent=RING), sink_tokens=1, recent_tokens=2)
    held = layout_bytes(layout(policy, SPEC, torch.float16), 20)
    assert held.keys == (12 * D // 2 + RING * D) * HKV * 2
    assert held.values == 20 * D * HKV * 2
    assert held.channels == HKV * D // 2 * 2
    q, k, v = tensors(1, 40)
    made = layer_of("streaming", Slots(20), channels=ThinK(drop=0.5, recent=RING))
    prefill(made, q, k, v, 30)
    assert made.pool.row(0).columns["keys.x"].shape == (1, HKV, 12, D // 2)
    for t in range(30, 40):
        append(made, q, k, v, t)
        ring = made.recent.row(0).columns["keys.x"][0, 0]
        assert sorted(ring.tolist()) == sorted(k[0, 0, t - RING + 1 : t + 1].tolist())


@pytest.mark.parametrize("fields", [
    {"key_codec": CODECS["kivi2"][0], "value_codec": CODECS["kivi2"][1]},
    {"channels": ThinK(drop=0.4, recent=RING)},
], ids=["kivi", "think"])  # fmt: skip
@pytest.mark.parametrize("slots", [FULL, Slots(20), Slots(share=6000)], ids=str)
def test_rows_are_their_own_runs_and_turns_are_steps(slots: Slots, fields: dict[str, Any]) -> None:
    q, k, v = tensors(3, 75)
    lengths, T = (40, 3, 21), 40
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    together, turns = (layer_of("snapkv", slots, min_slots=20, **fields) for _ in range(2))
    for made in (together, turns):
        prefill(made, q, k, v, T, valid)
    outputs = torch.cat([append(together, q, k, v, t) for t in range(T, 75)], 1)
    parts = [append(turns, q, k, v, T, 53), append(turns, q, k, v, 53, 75)]
    torch.testing.assert_close(torch.cat(parts, 1), outputs, rtol=1e-10, atol=1e-12)
    for row, n in enumerate(lengths):
        alone = layer_of("snapkv", slots, min_slots=20, **fields)
        mine = [x[row, None, :, T - n :] for x in (q, k, v)]
        prefill(alone, *mine, n)
        out = torch.cat([append(alone, *mine, n + t) for t in range(35)], 1)
        torch.testing.assert_close(out[0], outputs[row], rtol=1e-10, atol=1e-12)
        assert sum(alone.bytes_by_kind().values()) == together.row_bytes(row)


def test_selected_rows_take_all_that_is_theirs() -> None:
    q, k, v = tensors(2, 60)
    fields = {"channels": ThinK(drop=0.4, recent=RING), "key_codec": Int8(), "value_codec": CODECS["int8-kivi"][1]}
    made, twice = (layer_of("h2o", Slots(16), **fields) for _ in range(2))
    for one in (made, twice):
        prefill(one, q, k, v, 30)
        append(one, q, k, v, 30)
    twice.select_rows([1, 0, 1])
    again = [x[[1, 0, 1]] for x in (q, k, v)]
    for t in range(31, 60):
        torch.testing.assert_close(append(twice, *again, t), append(made, q, k, v, t)[[1, 0, 1]])
