"""Every rule refuses what breaks it, in its own words and at its place; everything that the rules allow really runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvplan.errors import PolicyError
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy import compositions
from kvplan.policy.memory import plan
from kvplan.policy.rules import check_model, check_policy
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.policy.serialize import dump_policy, parse_policy
from kvplan.runtime.cache import build_layer
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer

KIVI = "{kivi: {group: 4, residual_tokens: 8}}"
# (a layer, the field that is named, the start of what was found), one for every rule and every way to break it
BROKEN = [
    *((f"slots: 64, evictor: {e}, codec: {KIVI}", "codec", "an evictor that frees single slots")
      for e in ("h2o", "tova", "corm")),
    (f"slots: 64, evictor: h2o, codec: {{keys: {KIVI}}}", "codec", "an evictor that frees single slots"),
    ("slots: 64, evictor: tova, head_split: adakv", "head_split", "a head split, or slots per KV head"),
    ("slots: [64, 40%], min_slots: 64, evictor: tova", "head_split", "a head split, or slots per KV head"),
    ("slots: [64, 80], head_split: adakv", "head_split", "a head split with slots that are stated per KV head"),
    (f"slots: 64, head_split: adakv, codec: {KIVI}", "head_split", "a head split with a codec that encodes groups"),
    ("slots: full, head_split: adakv", "head_split", "a head split in a layer that keeps everything"),
    ("slots: [64, 80], evictor: corm", "evictor", "an evictor without a fixed budget"),
    ("slots: 64, evictor: corm, head_split: adakv", "evictor", "an evictor without a fixed budget"),
    ("slots: 64, evictor: corm, merger: kvmerger", "evictor", "an evictor without a fixed budget"),
    ("slots: 64, evictor: corm, channels: think", "evictor", "an evictor without a fixed budget"),
    (f"slots: 64, evictor: corm, codec: {{values: {KIVI}}}", "evictor", "an evictor without a fixed budget"),
    ("slots: full, merger: cam", "merger", "a merger in a layer that keeps everything"),
    *((f"slots: 64, merger: cam, evictor: {e}", "merger", "a merger that works while decoding (cam) with an evictor")
      for e in ("h2o", "tova", "corm")),
    *((f"slots: 64, merger: cam, codec: {{values: {c}}}", "merger", "a merger that works while decoding (cam) with enc")
      for c in ("int8", "fp8", "turboquant", KIVI)),
    ("slots: 64, merger: cam, channels: think", "merger", "a merger that works while decoding (cam) with encoded"),
    ("slots: 64, merger: kvmerger, evictor: tova", "merger", "a merger of prompts (kvmerger) with an evictor"),
]  # fmt: skip
BROKEN_CHUNKS = [
    (f"slots: 64, codec: {KIVI}", "codec", "chunked prefill with groups of tokens"),
    ("slots: full, channels: think", "codec", "chunked prefill with groups of tokens or pruned channels"),
    ("slots: 64, head_split: adakv", "head_split", "chunked prefill with budgets that differ between heads"),
    ("slots: [64, 80]", "head_split", "chunked prefill with budgets that differ between heads"),
    ("slots: 64, evictor: corm", "head_split", "chunked prefill with budgets that differ between heads"),
    ("slots: 64, merger: kvmerger", "merger", "chunked prefill with a merger"),
]


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return caught.value.problems


@pytest.mark.parametrize(("layer", "field", "found"), BROKEN)
def test_a_broken_rule_is_told_at_its_place(layer: str, field: str, found: str) -> None:
    told = problems(f"kvplan: 1\nlayers:\n  0: {{slots: full}}\n  1-2: {{{layer}}}\n")
    (mine,) = [t for t in told if found in t and f"layers.1-2.{field}: " in t]
    line, column = (int(n) for n in mine.split(":")[1:3])
    assert line == 4
    row = f"  1-2: {{{layer}}}"
    if f"{field}: " in layer:
        assert row[column - 1 :].startswith((f"{field}:", layer.split(f"{field}: ")[1][:4])), mine
    # The same when the policy is built in code.
    policy = parse_policy("kvplan: 1\nlayers:\n  0: {slots: full}\n")
    built = LayerPolicy(**fields_of(layer))
    with pytest.raises(PolicyError, match=f"layers.1.{field}: "):
        check_policy(Policy(layers=(*policy.layers, built)))


@pytest.mark.parametrize(("layer", "field", "found"), BROKEN_CHUNKS)
def test_what_chunks_cannot_do_is_told_at_the_prefill_block(layer: str, field: str, found: str) -> None:
    text = f"kvplan: 1\nprefill: {{chunk_tokens: 256}}\nlayers:\n  0-2: {{{layer}}}\n  3: {{shares: 0}}\n"
    (told,) = problems(text)
    assert told.startswith("p.yaml:2:") and f": prefill: {field}: {found}" in told
    parse_policy(text.replace("prefill: {chunk_tokens: 256}\n", ""))
    with pytest.raises(PolicyError, match=f"layers.0.{field}: chunked prefill"):
        check_policy(Policy(layers=(LayerPolicy(**fields_of(layer)),), prefill_chunk_tokens=256))


def fields_of(layer: str) -> dict[str, Any]:
    """The fields of a layer of the file, past the rules that it breaks."""
    from kvplan.policy.file_format import LayerBlock
    from kvplan.policy.yaml_text import read

    built = LayerBlock.model_validate(read(f"{{{layer}}}", "p").data).build()
    return {name: getattr(built, name) for name in built.__dataclass_fields__}


def test_every_rule_is_broken_by_one_of_these() -> None:
    for rules, broken in ((compositions.RULES, BROKEN), (compositions.CHUNK_RULES, BROKEN_CHUNKS)):
        starts = {found for _, _, found in broken}
        missed = [rule.found for rule in rules if not any(rule.found.startswith(start) for start in starts)]
        assert not missed


@pytest.mark.parametrize(("layer", "told"), [
    ("slots: [64, 80]", "slots: 2 numbers for 4 KV heads; give one each"),
    ("slots: 300, codec: kivi", "codec: kivi.group is 32, which does not divide vectors of 48 channels"),
])  # fmt: skip
def test_what_the_stated_model_cannot_hold_is_told_at_its_place(layer: str, told: str) -> None:
    model = "{layers: 3, kv_heads: 4, head_dim: 48, dtype: float32}"
    text = f"kvplan: 1\nmodel: {model}\nlayers:\n  0: {{slots: full}}\n  1-2: {{{layer}}}\n"
    assert [t.split(":", 3)[1::2] for t in problems(text)] == [["5", f" layers.1-2.{told}"]]


def test_chunks_of_one_token_are_refused() -> None:
    """They could not be told from decode steps."""
    assert problems("kvplan: 1\nprefill: {chunk_tokens: 1}\nlayers: {0: {slots: 64}}\n") == [
        "p.yaml:2:25: prefill.chunk_tokens: must be at least 2, not 1"
    ]
    with pytest.raises(PolicyError, match="prefill.chunk_tokens: must be at least 2, not 1"):
        check_policy(Policy(layers=(LayerPolicy(),), prefill_chunk_tokens=1))


# -- whatever the rules allow runs ----------------------------------------------------------------------------------

HQ, HKV, D = 4, 2, 16
SHAPE = LayerSpec(HKV, D, D)
MODEL = ModelSpec((SHAPE,), HQ, "float32")
ARGS = AttentionArgs(scaling=D**-0.5)
SLOTS = (FULL, Slots(16), Slots(heads=(Slots(16), Slots(share=9000))))
DENSE, INT8, GROUPS = codecs["dense"](), codecs["int8"](), codecs["kivi"](group=4, residual_tokens=8)
CODECS = (
    (DENSE, DENSE), (INT8, INT8), (GROUPS, GROUPS), (GROUPS, DENSE), (INT8, GROUPS),
    (codecs["fp8"](), codecs["turboquant"]()),
)  # fmt: skip


def every_layer(evictor: str) -> Iterator[LayerPolicy]:
    settings = {"window_tokens": 4} if evictor in ("corm", "snapkv") else {}
    channels = [None, *(channel_selectors[name](recent=8) for name in channel_selectors.names())]
    splits = [None, *(head_splits[name]() for name in head_splits.names())]
    merging = [None, *(mergers[name]() for name in mergers.names())]
    # What is true of snapkv's ring is true of the others.
    pairs = CODECS[1:4:2] if evictor in ("sliding", "knorm") else CODECS
    for slots, (keys, values), split, merger, kept in itertools.product(SLOTS, pairs, splits, merging, channels):
        yield LayerPolicy(
            slots=slots, sink_tokens=2, recent_tokens=4, min_slots=16, evictor=evictors[evictor](**settings),
            head_split=split, merger=merger, channels=kept, key_codec=keys, value_codec=values,
        )  # fmt: skip


def allowed(policy: Policy, model: ModelSpec) -> bool:
    try:
        check_policy(policy)
        check_model(policy, model)
    except PolicyError:
        return False
    return True


def run(policy: Policy, model: ModelSpec) -> None:
    """A ragged prompt, steps, a turn of several tokens, other rows: bytes as planned, outputs finite."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 44, D, generator=generator) for heads in (HQ, HKV, HKV))
    lengths, T = [24, 9], 24
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    layer: PolicyLayer = build_layer(policy, model, 0)
    step = policy.prefill_chunk_tokens or T
    for start in range(0, T, step):
        now = slice(start, min(start + step, T))
        if policy.chunked:
            layer.append_chunk(q[:, :, now], k[:, :, now], v[:, :, now], valid[:, now], ARGS)
        else:
            layer.store_prompt(q[:, :, now], k[:, :, now], v[:, :, now], valid, ARGS)
    at, elastic = T, policy.layers[0].evictor.forgets_after is not None
    for count in (1, 1, 7, 1, 9, 1):
        held, planned = sum(layer.bytes_by_kind().values()), plan(policy, model, lengths, at - T).total
        assert held <= planned if elastic else held == planned
        now = slice(at, at + count)
        out, _ = layer.append(q[:, :, now], k[:, :, now], v[:, :, now], ARGS)
        assert out.shape == (2, count, HQ, D) and out.isfinite().all()
        at += count
    layer.select_rows([1, 1, 0])
    rows = [1, 1, 0]
    out, _ = layer.append(q[rows, :, :1], k[rows, :, :1], v[rows, :, :1], ARGS)
    assert torch.equal(out[0], out[1]) and out.isfinite().all()
    assert sum(layer.row_bytes(row) for row in range(3)) == sum(layer.bytes_by_kind().values())


@pytest.mark.parametrize("evictor", evictors.names())
def test_whatever_the_rules_allow_runs(evictor: str) -> None:
    count = 0
    for layer in every_layer(evictor):
        if layer.slots.is_full and evictor not in ("streaming", "tova"):
            continue  # no evictor is at work: two stand for all
        for chunk in (None, 7):
            policy = Policy(layers=(layer,), prefill_chunk_tokens=chunk)
            if allowed(policy, MODEL):
                try:
                    run(policy, MODEL)
                except Exception as error:
                    raise AssertionError(dump_policy(policy)) from error
                count += 1
    assert count >= (3 if evictor == "corm" else 20)


def test_whatever_the_rules_allow_beside_a_window_runs() -> None:
    model, count = ModelSpec((LayerSpec(HKV, D, D, window=6),), HQ, "float32"), 0
    for layer in itertools.chain(every_layer("streaming"), every_layer("corm")):
        for chunk in (None, 7):
            policy = Policy(layers=(layer,), prefill_chunk_tokens=chunk)
            if allowed(policy, model):
                try:
                    run(policy, model)
                except Exception as error:
                    raise AssertionError(dump_policy(policy)) from error
                count += 1
    assert count == 12  # full slots, three pairs of codecs whose slots stand alone, with and without chunks, twice


def test_a_file_gives_the_policy_back_whatever_it_composes() -> None:
    for layer in itertools.chain(every_layer("streaming"), every_layer("h2o")):
        policy = Policy(layers=(layer, layer))
        if allowed(Policy(layers=(layer,)), MODEL):
            assert parse_policy(dump_policy(policy)) == policy
