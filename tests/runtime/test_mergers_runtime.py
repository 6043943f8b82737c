"""Mergers inside a layer, through real prompts and decode steps: nothing is lost, and nothing is seen twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import ARGS, D, append, prefill
from torch import Tensor

from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.corm import CORM
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.methods.mergers.cam import CaM
from kvplan.methods.mergers.kvmerger import KVMerger
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.rules import check_policy
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.cache import build_layer
from kvplan.runtime.kernels.stored import attend_parts
from kvplan.runtime.layers.base import PolicyLayer, attend_seen, heads_to_rows, rows_to_heads

HQ, HKV = 4, 2
SPEC = LayerSpec(HKV, D, D)
SINKS, RECENT = 2, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # mergers weigh in float32


def tensors(rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(rows, heads, tokens, D, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(HQ), make(HKV), make(HKV)


def built(name: str = "streaming", slots: Slots = Slots(12), **fields: Any) -> PolicyLayer:
    fields = {"evictor": evictors[name](), "sink_tokens": SINKS, "recent_tokens": RECENT, "min_slots": 8, **fields}
    policy = Policy(layers=(LayerPolicy(slots=slots, **fields),))
    check_policy(policy)
    return build_layer(policy, ModelSpec((SPEC,), HQ, "float64"), 0)


class Lists:
    """One KV head of CaM: (token, value) per slot; what the next token overwrites is spread over its followers."""

    def __init__(self, order: list[int], values: Tensor, keys: Tensor, slots: int, span: int) -> None:
        self.slots, self.span, self.keys, self.all_values = slots, span, keys, values
        self.tokens, self.values = list(order), [values[t].clone() for t in order]
        self.next = SINKS

    def step(self, now: int, queries: Tensor) -> Tensor:
        """Queries [G, D] of one KV head; their outputs [G, D]."""
        if len(self.tokens) < self.slots:
            self.tokens.append(now)
            self.values.append(self.all_values[now].clone())
        else:
            self.tokens[self.next], self.values[self.next] = now, self.all_values[now].clone()
            self.next = SINKS + (self.next - SINKS + 1) % (self.slots - SINKS)
        probs = (queries @ self.keys[self.tokens].T * ARGS.scaling).softmax(-1)
        out = probs @ torch.stack(self.values)
        if len(self.tokens) == self.slots:
            self._spread(probs.mean(0).tolist())
        return out

    def _spread(self, weight: list[float]) -> None:
        ring = self.slots - SINKS
        followers = [SINKS + (self.next - SINKS + i) % ring for i in range(1, ring)]
        mean = sum(weight[s] for s in followers) / len(followers)
        chance = min(1.0, weight[self.next] / mean)
        receivers = followers[: self.span]
        part = self.values[self.next] * chance / len(receivers)
        for slot in receivers:
            self.values[slot] = self.values[slot] + part


@pytest.mark.parametrize("span", [1, 4, 32])
@pytest.mark.parametrize("prompt", [3, 11, 12, 30])
@pytest.mark.parametrize("slots", [12, 7])
def test_cam_agrees_with_lists_of_values(slots: int, prompt: int, span: int) -> None:
    q, k, v = tensors(1, prompt + 30)
    made = built(slots=Slots(slots), merger=CaM(span=span))
    prefill(made, q, k, v, prompt)
    order = list(range(prompt)) if prompt <= slots else [0, 1, *range(prompt - slots + SINKS, prompt)]
    oracles = [Lists(order, v[0, head], k[0, head], slots, span) for head in range(HKV)]
    for t in range(prompt, prompt + 30):
        out = append(made, q, k, v, t)[0, 0]
        for head, oracle in enumerate(oracles):
            torch.testing.assert_close(
                out[head * 2 : head * 2 + 2], oracle.step(t, q[0, head * 2 : head * 2 + 2, t]), **CLOSE
            )
            stored = made.pool.row(0).columns["values.x"][0, head, : made.held(0)]
            torch.testing.assert_close(stored, torch.stack(oracle.values), **CLOSE)
            assert torch.equal(made.pool.row(0).columns["keys.x"][0, head, : made.held(0)], k[0, head, oracle.tokens])


def test_cam_loses_nothing_where_all_attention_is_equal() -> None:
    """Every token is as wanted as the mean: from the first merge on, the sum of what is seen is that of all values."""
    q, k, v = tensors(2, 60)
    q = q * 0
    made = built(merger=CaM(span=3))
    prefill(made, q, k, v, 12)  # full, and nothing evicted yet
    append(made, q, k, v, 12)  # overwrites the first token behind the sinks: nobody had a say yet
    for t in range(13, 60):
        out = append(made, q, k, v, t) * 12  # uniform attention over 12 slots
        kept = [0, 1, *range(3, t + 1)]
        expected = v[:, :, kept].sum(2).repeat_interleave(HQ // HKV, 1)[:, None]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_cam_without_attention_is_plain_streaming() -> None:
    q, k, v = tensors(2, 60, torch.float32)
    k = k / k.norm(dim=-1, keepdim=True)
    q = k.repeat_interleave(HQ // HKV, 1) * 1e5  # all attention goes to the newest token
    merging, plain = built(merger=CaM()), built()
    for made in (merging, plain):
        prefill(made, q, k, v, 30)
    for t in range(30, 60):
        torch.testing.assert_close(append(merging, q, k, v, t), append(plain, q, k, v, t), rtol=0, atol=0)
        for name, x in plain.pool.row(0).columns.items():
            assert torch.equal(merging.pool.row(0).columns[name], x)


@pytest.mark.parametrize("name", ["streaming", "sliding", "snapkv", "knorm"])
def test_cam_rows_are_their_own_runs_and_turns_are_steps(name: str) -> None:
    q, k, v = tensors(3, 70)
    lengths, T = (36, 3, 21), 36
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    for slots in (Slots(14), Slots(share=5000), Slots(heads=(Slots(10), Slots(share=6000)))):
        together, turns = (built(name, slots, merger=CaM(span=4)) for _ in range(2))
        for made in (together, turns):
            prefill(made, q, k, v, T, valid)
        outputs = torch.cat([append(together, q, k, v, t) for t in range(T, 70)], 1)
        parts = torch.cat([append(turns, q, k, v, T, 50), append(turns, q, k, v, 50, 70)], 1)
        torch.testing.assert_close(parts, outputs, rtol=1e-10, atol=1e-12)
        for row, n in enumerate(lengths):
            alone, mine = built(name, slots, merger=CaM(span=4)), [x[row, None, :, T - n :] for x in (q, k, v)]
            prefill(alone, *mine, n)
            out = torch.cat([append(alone, *mine, n + t) for t in range(34)], 1)
            torch.testing.assert_close(out[0], outputs[row], rtol=1e-6, atol=1e-7)  # merged in float32


KINDS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "h2o": {"name": "h2o"},
    "int8": {"name": "tova", "key_codec": Int8(), "value_codec": Int8()},
    "kivi": {"name": "snapkv", "slots": Slots(20), "key_codec": KIVI(bits=2, group=4, residual_tokens=8)},
    "think": {"name": "h2o", "slots": Slots(16), "channels": ThinK(recent=8)},
    "heads": {"name": "h2o", "slots": Slots(heads=(Slots(9), Slots(17)))},
    "adakv": {"name": "snapkv", "head_split": AdaKV()},
    "corm": {"evictor": CORM(window_tokens=5)},
    "cam": {"merger": CaM()},
    "kvmerger": {"name": "h2o", "merger": KVMerger()},
    "full": {"slots": FULL},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lent_to_a_shared_layer_is_what_was_seen(kind: str) -> None:
    q, k, v = tensors(2, 60)
    made = built(**KINDS[kind])
    prefill(made, q, k, v, 30, torch.arange(30) >= torch.tensor([[0], [9]]))
    at = 30
    for count in (1, 1, 5, 1, 7, 1, 1):
        now = slice(at, at + count)
        out, seen = made.append(q[:, :, now], k[:, :, now], v[:, :, now], ARGS, shared=True)
        if made.heads_as_rows:
            again = rows_to_heads(attend_seen(heads_to_rows(q[:, :, now], HKV), seen, ARGS), HKV)
        else:
            again = attend_seen(q[:, :, now], seen, ARGS)
        torch.testing.assert_close(again, out, rtol=1e-10, atol=1e-12)
        at += count


@pytest.mark.parametrize("fields", [
    {}, {"key_codec": Int8(), "value_codec": Int8()}, {"key_codec": KIVI(bits=4, group=4, residual_tokens=8)},
    {"channels": ThinK(recent=6)}, {"slots": Slots(heads=(Slots(16), Slots(25)))}, {"head_split": AdaKV()},
], ids=["dense", "int8", "kivi", "think", "heads", "adakv"])  # fmt: skip
@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o", "knorm"])
def test_kvmerger_fills_the_budget_and_decoding_goes_on(name: str, fields: dict[str, Any]) -> None:
    if name == "h2o" and isinstance(fields.get("key_codec"), KIVI):
        return  # refused
    q, k, v = tensors(2, 90)
    lengths, T = (50, 31), 50
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    fields = {"slots": Slots(20), "merger": KVMerger(similarity=-1.0), **fields}
    together, turns = built(name, **fields), built(name, **fields)
    for made in (together, turns):
        prefill(made, q, k, v, T, valid)
    for row, n in enumerate(lengths):
        counts = [
            [p.row(i).columns["counts"][0, h] for p in together.storage]
            for i, h in ([(row * HKV, 0), (row * HKV + 1, 0)] if together.heads_as_rows else [(row, 0), (row, 1)])
        ]
        for head, parts in enumerate(counts):
            whole = torch.cat(parts)
            # At a similarity of -1 any two neighbours may merge: nothing has to be dropped.
            assert (whole > 0).all() and int(whole.sum()) == n
            slots = together.held_by_head(row)[head] if together.heads_as_rows else together.held(row)
            assert len(whole) == slots
    outputs = torch.cat([append(together, q, k, v, t) for t in range(T, 90)], 1)
    parts = torch.cat([append(turns, q, k, v, T, 63), append(turns, q, k, v, 63, 90)], 1)
    torch.testing.assert_close(parts, outputs, rtol=1e-6, atol=1e-7)
    for row, n in enumerate(lengths):
        alone, mine = built(name, **fields), [x[row, None, :, T - n :] for x in (q, k, v)]
        prefill(alone, *mine, n)
        out = torch.cat([append(alone, *mine, n + t) for t in range(40)], 1)
        torch.testing.assert_close(out[0], outputs[row], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv"])
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    """Runs of equal keys and values: one slot each, and the count in its logit makes attention what it was."""
    q, k, v = tensors(1, 60)
    run = torch.tensor([0, 1, *(2 + i // 5 for i in range(40)), *range(10, 28)])  # sinks, 8 runs of 5, then singles
    k, v = k[:, :, run], v[:, :, run]
    made = built(name, Slots(14), merger=KVMerger(similarity=0.99, heavy=0.0))
    prefill(made, q, k, v, 46)
    rows = made.pool.row(0)
    for head in range(HKV):
        assert sorted(rows.columns["counts"][0, head].tolist()) == [1] * 6 + [5] * 8
    out = attend_parts(q[:, :, 50:51], [made._part(rows, 14, None)], ARGS)[0][0, 0]
    for h in range(HQ):
        head = h // (HQ // HKV)
        probs = (k[0, head, :46] @ q[0, h, 50] * ARGS.scaling).softmax(0)
        torch.testing.assert_close(out[h], probs @ v[0, head, :46], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_merged_stays_bit_equal(dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 60, dtype)
    made = built("h2o", Slots(20), merger=KVMerger())
    prefill(made, q, k, v, 50)
    columns = made.pool.row(0).columns
    for head in range(HKV):
        alone = columns["counts"][0, head] == 1
        at = columns["positions"][0, head][alone].long()
        assert alone.sum() > 5
        assert torch.equal(columns["keys.x"][0, head][alone], k[0, head, at])
        assert torch.equal(columns["values.x"][0, head][alone], v[0, head, at])
    made = built(slots=Slots(20), merger=CaM(span=2))
    prefill(made, q, k, v, 50)
    for t in range(50, 60):
        assert append(made, q, k, v, t).dtype == dtype
        values = made.pool.row(0).columns["values.x"][0, 0]
        assert torch.equal(values[:SINKS], v[0, 0, :SINKS])
