"""KV heads that hold different numbers of tokens: nothing is padded, and attention is over what each head holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import model, prompts
from torch import Tensor

import kvplan
from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.methods.mergers.cam import CaM
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.rules import check_policy
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import spec_of
from kvplan.runtime.cache import build_layer
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.layers.per_head import PerHeadLayer

HQ, HKV, D = 6, 3, 8
SPEC = LayerSpec(HKV, D, D)
PLAIN = AttentionArgs(scaling=D**-0.5)
BY_HEAD = [n for n in evictors.names() if n != "corm" and not evictors[n]().one_set_for_all_heads]
EACH = Slots(heads=(Slots(10), Slots(25), Slots(share=5000)))


def tensors(rows: int, tokens: int, kv_heads: int = HKV, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(rows, heads, tokens, D, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(HQ), make(kv_heads), make(kv_heads)


def policy_of(name: str = "snapkv", slots: Slots = EACH, **fields: Any) -> LayerPolicy:
    defaults = {"sink_tokens": 2, "recent_tokens": 4, "min_slots": 9, "evictor": evictors[name]()}
    return LayerPolicy(slots=slots, **{**defaults, **fields})


def built(policy: LayerPolicy, spec: LayerSpec = SPEC) -> PolicyLayer:
    whole = Policy(layers=(policy,))
    check_policy(whole)
    return build_layer(whole, ModelSpec((spec,), HQ, "float64"), 0)


def prefill(made: PolicyLayer, q: Tensor, k: Tensor, v: Tensor, T: int, valid: Any = None, args: Any = PLAIN) -> None:
    valid = torch.ones(k.shape[0], T, dtype=torch.bool) if valid is None else valid
    made.store_prompt(q[:, :, :T], k[:, :, :T], v[:, :, :T], valid, args)


def append(made: PolicyLayer, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int | None = None, args: Any = PLAIN):
    now = slice(start, start + 1 if stop is None else stop)
    return made.append(q[:, :, now], k[:, :, now], v[:, :, now], args)[0]


def held_tokens(made: PolicyLayer, keys: Tensor, row: int, head: int) -> list[int]:
    """Which tokens a head holds, found by looking its stored keys up."""
    index = row * HKV + head
    stored = made.inner.pool.row(index).columns["keys.x"][0, 0, : made.inner.held(index)]
    return sorted(int((keys[row, head] == key).all(-1).nonzero()[0]) for key in stored)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, held: list[list[int]], args: AttentionArgs) -> Tensor:
    """Attention of one row's queries [Hq, D] over its whole cache [Hkv, T, D], minus infinity on what was evicted."""
    rows = []
    for h in range(HQ):
        head = h // (HQ // HKV)
        logits = k[head] @ q[h] * args.scaling
        logits = logits if args.softcap is None else torch.tanh(logits / args.softcap) * args.softcap
        gone = torch.ones(len(logits), dtype=torch.bool)
        gone[held[head]] = False
        logits = logits.masked_fill(gone, -torch.inf)
        if args.sink_logits is not None:
            logits = torch.cat([logits, args.sink_logits[h, None].to(logits.dtype)])
        rows.append(logits.softmax(0)[: k.shape[1]] @ v[head])
    return torch.stack(rows)


@pytest.mark.parametrize("args", [
    PLAIN,
    AttentionArgs(D**-0.5, softcap=1.5),
    AttentionArgs(D**-0.5, sink_logits=torch.linspace(-1, 2, HQ)),
], ids=["plain", "softcap", "sink logits"])  # fmt: skip
@pytest.mark.parametrize("split", [None, AdaKV(floor=0.2)], ids=["stated", "adakv"])
@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o"])
def test_attention_is_the_full_cache_without_what_was_evicted(name: str, split: Any, args: AttentionArgs) -> None:
    q, k, v = tensors(2, 60)
    valid = torch.arange(36) >= torch.tensor([[0], [9]])
    made = built(policy_of(name, EACH if split is None else Slots(14), head_split=split))
    prefill(made, q, k, v, 36, valid, args)
    for t in range(36, 60):
        out = append(made, q, k, v, t, args=args)
        for row in range(2):
            held = [held_tokens(made, k, row, head) for head in range(HKV)]
            assert [len(h) for h in held] == made.held_by_head(row)
            for tokens in held:
                assert {*range(t - 3, t + 1)} <= set(tokens)
            expected = masked_attention(q[row, :, t], k[row, :, : t + 1], v[row, :, : t + 1], held, args)
            torch.testing.assert_close(out[row, 0], expected, rtol=1e-6 if args.sink_logits is not None else 1e-10,
                                       atol=1e-10)  # fmt: skip


def test_stated_heads_hold_what_is_stated_and_no_more_is_allocated() -> None:
    q, k, v = tensors(2, 60)
    policy = policy_of("h2o")
    made = built(policy)
    prefill(made, q, k, v, 40, torch.arange(40) >= torch.tensor([[0], [10]]))
    assert [made.held_by_head(row) for row in range(2)] == [[10, 25, 20], [10, 25, 15]]
    per_token = 2 * D * 8 + 4 + 4
    assert sum(made.bytes_by_kind().values()) == (10 + 25 + 20 + 10 + 25 + 15) * per_token
    assert made.row_bytes(1) == 50 * per_token
    assert made.held(0) == 19  # a mean, rounded up
    spec = ModelSpec((SPEC,), HQ, "float64")
    for t in range(40, 60):
        planned = plan(Policy(layers=(policy,)), spec, [40, 30], t - 40)
        assert sum(made.bytes_by_kind().values()) == planned.total
        append(made, q, k, v, t)


@pytest.mark.parametrize("name", BY_HEAD)
@pytest.mark.parametrize("fields", [
    {},
    {"key_codec": Int8(), "value_codec": Int8()},
    {"key_codec": KIVI(bits=2, group=4, residual_tokens=8)},
    {"channels": ThinK(drop=0.4, recent=6)},
    {"merger": CaM()},
], ids=["dense", "int8", "kivi", "think", "cam"])  # fmt: skip
def test_equal_heads_are_the_uniform_layer(name: str, fields: dict[str, Any]) -> None:
    scored = evictors[name]().keeps_scores
    if scored and fields.keys() & {"merger", "key_codec"} and "value_codec" not in fields:
        return  # refused
    q, k, v = tensors(2, 60)
    valid = torch.arange(36) >= torch.tensor([[0], [20]])
    uniform = built(policy_of(name, Slots(20), **fields))
    each = built(policy_of(name, Slots(heads=(Slots(20),) * HKV), **fields))
    assert isinstance(each, PerHeadLayer) and isinstance(uniform, BudgetedLayer)
    for made in (uniform, each):
        prefill(made, q, k, v, 36, valid)
    for t in range(36, 60):
        torch.testing.assert_close(append(each, q, k, v, t), append(uniform, q, k, v, t), rtol=1e-10, atol=1e-12)
        assert each.bytes_by_kind() == uniform.bytes_by_kind()
        for row in range(2):
            for head in range(HKV):
                for a, b in zip(each.storage, uniform.storage, strict=True):
                    for column, x in b.row(row).columns.items():
                        mine = a.row(row * HKV + head).columns[column]
                        mine = mine[0, 0]
                        if column == "scores":  # the sums of a batched product differ in the last place
                            torch.testing.assert_close(mine, x[0, head], rtol=1e-5, atol=1e-6)
                        else:
                            assert torch.equal(mine, x[0, head])


@pytest.mark.parametrize("name", BY_HEAD)
@pytest.mark.parametrize("split", [None, AdaKV(floor=0.0)], ids=["stated", "adakv"])
def test_rows_are_their_own_runs_and_turns_are_steps(name: str, split: Any) -> None:
    q, k, v = tensors(3, 64)
    lengths, T = (36, 5, 21), 36
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    policy = policy_of(name, EACH if split is None else Slots(14), head_split=split)
    together, turns = built(policy), built(policy)
    for made in (together, turns):
        prefill(made, q, k, v, T, valid)
    outputs = torch.cat([append(together, q, k, v, t) for t in range(T, 64)], 1)
    parts = torch.cat([append(turns, q, k, v, T, 47), append(turns, q, k, v, 47, 64)], 1)
    torch.testing.assert_close(parts, outputs, rtol=1e-10, atol=1e-12)
    for row, n in enumerate(lengths):
        alone = built(policy)
        mine = [x[row, None, :, T - n :] for x in (q, k, v)]
        prefill(alone, *mine, n)
        assert alone.held_by_head(0) == [min(n, h) if n <= 14 else h for h in alone.held_by_head(0)]
        out = torch.cat([append(alone, *mine, n + t) for t in range(28)], 1)
        torch.testing.assert_close(out[0], outputs[row], rtol=1e-10, atol=1e-12)
        assert sum(alone.bytes_by_kind().values()) == together.row_bytes(row)


def prompt_scores(made: PolicyLayer, q: Tensor, k: Tensor, v: Tensor, T: int) -> Tensor:
    stats = made.observe_prompt(q[:, :, :T], k[:, :, :T], v[:, :, :T], torch.ones(len(k), T, dtype=torch.bool), PLAIN)
    return stats.scores[:, 0]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_adakv_gives_slots_to_the_heads_of_the_highest_scores(floor: float) -> None:
    """Counts of the layer's highest scores by hand, blended with an even part."""
    q, k, v = tensors(1, 60)
    k[:, 1] *= 0.8  # short keys score high
    made = built(policy_of("knorm", Slots(14), head_split=AdaKV(floor=floor)))
    prefill(made, q, k, v, 40)
    scores, free = prompt_scores(made, q, k, v, 40)[:, 2:36], (14 - 6) * HKV
    flat = sorted(((float(s), t, -h) for h in range(HKV) for t, s in enumerate(scores[h])), reverse=True)[:free]
    counts = [sum(-h == head for _, _, h in flat) for head in range(HKV)]
    ideal = [count * (1 - floor) + 8 * floor for count in counts]
    lengths = made.held_by_head(0)
    assert sum(lengths) == 14 * HKV
    assert all(abs(n - 6 - i) < 1 for n, i in zip(lengths, ideal, strict=True)), (lengths, ideal)
    assert (lengths == [14, 14, 14]) == (floor == 1.0)
    for t in range(40, 60):
        append(made, q, k, v, t)
        assert made.held_by_head(0) == lengths
        assert sum(made.bytes_by_kind().values()) == 14 * HKV * 2 * D * 8


def test_a_prompt_that_fits_is_not_split() -> None:
    q, k, v = tensors(2, 60)
    made = built(policy_of("snapkv", Slots(30), head_split=AdaKV()))
    prefill(made, q, k, v, 25, torch.arange(25) >= torch.tensor([[0], [9]]))
    assert [made.held_by_head(row) for row in range(2)] == [[25] * 3, [16] * 3]
    for t in range(25, 60):
        append(made, q, k, v, t)
    assert [made.held_by_head(row) for row in range(2)] == [[30] * 3, [30] * 3]


@pytest.mark.parametrize("fields", [
    {"channels": ThinK(drop=0.4, recent=6)},
    {"value_codec": KIVI(bits=2, group=4, residual_tokens=8)},
], ids=["think", "kivi values"])  # fmt: skip
@pytest.mark.parametrize("evictor", [
    evictors["snapkv"](window_tokens=4), evictors["knorm"](), evictors["h2o"]()
], ids=lambda e: e.name)  # fmt: skip
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_head_that_wins_no_slot_still_decodes(evictor: Any, sinks: int, fields: dict[str, Any]) -> None:
    """The tokens that leave its recent ring need one slot to go to, and may not go over a sink."""
    q, k, v = tensors(1, 60)
    k[:, 0] *= 0.01 if evictor.name != "knorm" else 100  # this head's tokens score low, all alike
    k[:, 1:] *= 5
    made = built(policy_of(slots=Slots(14), head_split=AdaKV(floor=0.0), sink_tokens=sinks, evictor=evictor, **fields))
    prefill(made, q, k, v, 40)
    if evictor.name == "knorm":
        assert made.held_by_head(0)[0] == sinks + made.policy.stored_whole[1] + 1
    for t in range(40, 60):
        append(made, q, k, v, t)
        for head in range(HKV):
            values = torch.cat([
                p.row(head).columns["values.x"][0, 0] if "values.x" in p.row(head).columns
                else made.inner.value_codec.decode(
                    {n: x[0, 0] for n, x in p.row(head).codes("values").items()}, D, torch.float64)
                for p in made.storage
            ])  # fmt: skip
            for sink in range(sinks):
                assert (values - v[0, head, sink]).abs().amax(-1).min() < 1, (t, head, sink)
    assert sum(made.held_by_head(0)) == 14 * HKV


@pytest.mark.parametrize("kv_heads", [1, HQ])
def test_one_kv_head_and_one_for_each_query(kv_heads: int) -> None:
    q, k, v = tensors(2, 60, kv_heads)
    split = policy_of("h2o", Slots(14), head_split=AdaKV(floor=0.2))
    made = built(split, LayerSpec(kv_heads, D, D))
    plain = built(policy_of("h2o", Slots(14)), LayerSpec(kv_heads, D, D))
    for one in (made, plain):
        prefill(one, q, k, v, 40)
    assert sum(made.bytes_by_kind().values()) == sum(plain.bytes_by_kind().values())
    for t in range(40, 60):
        out, same = append(made, q, k, v, t), append(plain, q, k, v, t)
        if kv_heads == 1:
            torch.testing.assert_close(out, same, rtol=1e-10, atol=1e-12)


def test_selected_rows_keep_their_split() -> None:
    q, k, v = tensors(2, 60)
    policy = policy_of("h2o", Slots(14), head_split=AdaKV(floor=0.0))
    made, twice = built(policy), built(policy)
    for one in (made, twice):
        prefill(one, q, k, v, 40)
    twice.select_rows([1, 0, 1])
    assert [twice.held_by_head(i) for i in range(3)] == [made.held_by_head(i) for i in (1, 0, 1)]
    again = [x[[1, 0, 1]] for x in (q, k, v)]
    for t in range(40, 60):
        torch.testing.assert_close(append(twice, *again, t), append(made, q, k, v, t)[[1, 0, 1]])


def test_a_whole_model_with_heads_of_their_own() -> None:
    """Budgets above what is fed: the model's own tokens and logits, in a ragged batch."""
    made, inputs = model("llama", torch.float64), prompts((30, 17, 4))
    each = policy_of("h2o", Slots(heads=(Slots(60), Slots(70))))
    split = policy_of("snapkv", Slots(60), head_split=AdaKV())
    policy = Policy(layers=(each, split, LayerPolicy(slots=FULL), LayerPolicy(shares=1)))
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with kvplan.attach(made, Policy(layers=(*policy.layers[:3], LayerPolicy(slots=FULL)))) as runtime:
        found = made.generate(**inputs, past_key_values=runtime.new_cache(), **options)
    assert torch.equal(found, made.generate(**inputs, **options))
    with kvplan.attach(made, policy) as runtime:
        cache = runtime.new_cache()
        made.generate(**inputs, past_key_values=cache, **options)
        assert cache.kv_bytes == plan(policy, spec_of(made), [30, 17, 4], 9).total == cache.report()["kv_bytes"]
