"""Over random layers at the edge of their slots: bytes, rows, turns, and what is lent to other layers."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplan.errors import MethodError, PolicyError
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.rules import check_model, check_policy
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.policy.serialize import dump_policy
from kvplan.runtime.cache import build_layer
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer, attend_seen, heads_to_rows, rows_to_heads

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXAMPLES = int(os.environ.get("KVPLAN_EXAMPLES", "40"))


def some_codec(draw: random.Random) -> Any:
    name = draw.choice(["dense", *codecs.names()])
    if name != "kivi":
        return codecs[name]()
    return codecs["kivi"](bits=draw.choice([2, 4]), group=4, residual_tokens=draw.choice([4, 8, 12]))


def some_layer(draw: random.Random, kv_heads: int) -> LayerPolicy:
    """As few slots as its rules allow, or a few more."""
    evictor = draw.choice(evictors.names())
    layer = LayerPolicy(
        slots=Slots(1),
        min_slots=1,
        sink_tokens=draw.randint(0, 6),
        recent_tokens=draw.randint(1, 20),
        evictor=evictors[evictor](**({"window_tokens": draw.randint(1, 12)} if evictor in ("corm", "snapkv") else {})),
        head_split=draw.choice([None, None, head_splits["adakv"](floor=draw.choice([0.0, 0.2, 1.0]))]),
        merger=draw.choice(
            [
                *[None] * 3,
                mergers["cam"](span=draw.randint(1, 9)),
                mergers["kvmerger"](similarity=draw.choice([-1.0, 0.5]), heavy=draw.choice([0.0, 0.25, 1.0])),
            ]
        ),
        channels=draw.choice(
            [
                *[None] * 2,
                channel_selectors["think"](
                    recent=draw.choice([1, 4, 9]), window=draw.choice([1, 8]), drop=draw.choice([0.0, 0.4, 0.9])
                ),
            ]
        ),
        key_codec=some_codec(draw),
        value_codec=some_codec(draw),
    )
    least = least_slots(layer)

    def slots() -> Slots:
        few = Slots(least + draw.choice([0, 0, 1, 2, 3, 5, 11]))
        return draw.choice([few, few, Slots(share=draw.randint(500, 10_000))])

    kind = draw.choice(["one", "one", "full", "heads"])
    chosen = FULL if kind == "full" else slots()
    if kind == "heads":
        chosen = Slots(heads=tuple(slots() for _ in range(max(2, kv_heads))))
    return replace(layer, slots=chosen, min_slots=least + draw.choice([0, 0, 1, 7]))


def least_slots(layer: LayerPolicy) -> int:
    try:
        check_policy(Policy(layers=(layer,)))
    except PolicyError as error:
        told = re.search(r"raise slots to at least (\d+)", str(error))
        return int(told[1]) if told else 1
    return 1


@dataclass
class Case:
    """A layer, a left-padded batch of prompts and the tokens after them."""

    policy: Policy
    model: ModelSpec
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: list[int]
    T: int
    S: int
    args: AttentionArgs

    def filled(self, row: int | None = None) -> PolicyLayer:
        """The layer after the prompts, or after one of them without its padding."""
        start, rows = (0, slice(None)) if row is None else (self.T - self.lengths[row], slice(row, row + 1))
        valid = torch.arange(self.T) >= self.T - torch.tensor(self.lengths)[rows, None]
        layer = build_layer(self.policy, self.model, 0)
        step = self.policy.prefill_chunk_tokens or self.T
        for first in range(start, self.T, step):
            now = slice(first, min(self.T, first + step))
            take = layer.append_chunk if self.policy.chunked else layer.store_prompt
            take(self.q[rows, :, now], self.k[rows, :, now], self.v[rows, :, now], valid[:, now], self.args)
        return layer

    def append(self, layer: PolicyLayer, at: int, count: int = 1, row: int | None = None, shared: bool = False) -> Any:
        rows = slice(None) if row is None else slice(row, row + 1)
        now = slice(self.T + at, self.T + at + count)
        return layer.append(self.q[rows, :, now], self.k[rows, :, now], self.v[rows, :, now], self.args, shared)

    def read(self, layer: PolicyLayer, seen: Any, at: int) -> Tensor:
        """What a layer that shares this one's cache would see."""
        q, heads = self.q[:, :, self.T + at, None], layer.heads_as_rows
        if not heads:
            return attend_seen(q, seen, self.args)
        by_head = self.args.by_head(len(self.lengths), heads)
        return rows_to_heads(attend_seen(heads_to_rows(q, heads), seen, by_head), heads)


def some_case(draw: random.Random, seed: int) -> Case:
    while True:
        kv_heads = draw.choice([1, 2, 3])
        q_heads, dim = kv_heads * draw.choice([1, 2]), draw.choice([8, 16])
        shape = LayerSpec(kv_heads, dim, draw.choice([dim, 8]), window=draw.choice([*[None] * 4, 7]))
        model = ModelSpec((shape,), q_heads, "float64")
        policy = Policy(layers=(some_layer(draw, kv_heads),), prefill_chunk_tokens=draw.choice([*[None] * 3, 2, 5, 9]))
        try:
            check_policy(policy)
            check_model(policy, model)
        except (PolicyError, MethodError):
            continue
        rows, T, S = draw.choice([1, 2, 3]), draw.randint(1, 40), draw.randint(1, 30)
        lengths = [draw.randint(1, T) for _ in range(rows - 1)] + [T]
        generator = torch.Generator().manual_seed(seed)

        def tensor(heads: int, dim: int, tokens: int = T + S, rows: int = rows, g: Any = generator) -> Tensor:
            return torch.randn(rows, heads, tokens, dim, generator=g, dtype=torch.float64)

        # The sharpest attention gives most tokens a weight of exactly 0: scores tie.
        q = tensor(q_heads, dim) * draw.choice([1, 3, 100])
        args = AttentionArgs(
            dim**-0.5,
            softcap=draw.choice([None, None, 2.0]),
            sink_logits=draw.choice([None, None, torch.linspace(-1, 1, q_heads)]),
        )
        return Case(policy, model, q, tensor(kv_heads, dim), tensor(kv_heads, shape.value_dim), lengths, T, S, args)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_random_layer(seed: int) -> None:
    draw = random.Random(seed)
    case = some_case(draw, seed)
    told = f"{dump_policy(case.policy)}{case.model.layers[0]}, prompts {case.lengths}"
    policy, elastic = case.policy.layers[0], case.policy.layers[0].evictor.forgets_after is not None
    layer, outputs = case.filled(), []
    for t in range(case.S):
        held, planned = sum(layer.bytes_by_kind().values()), plan(case.policy, case.model, case.lengths, t).total
        assert held <= planned if elastic else held == planned, told
        out, seen = case.append(layer, t, shared=True)
        torch.testing.assert_close(case.read(layer, seen, t), out, rtol=1e-9, atol=1e-11, msg=f"lent: {told}")
        for row, n in enumerate(case.lengths):
            heads = range(case.model.layers[0].kv_heads)
            most = [case.model.layers[0].window or policy.capacity(n, head) or n + t + 1 for head in heads]
            assert layer.held(row) <= -(-sum(most) // len(most)), told
        outputs.append(out)
    steps = torch.cat(outputs, 1)
    assert steps.isfinite().all(), told

    layer, outputs, at = case.filled(), [], 0
    while at < case.S:
        count = min(case.S - at, draw.choice([1, 2, 7, 20]))
        outputs.append(case.append(layer, at, count, shared=draw.random() < 0.5)[0])
        at += count
    torch.testing.assert_close(torch.cat(outputs, 1), steps, **CLOSE, msg=f"turns: {told}")

    # Where the chunks of a row end depends on the padding before it.
    for row in range(len(case.lengths)) if not case.policy.chunked else ():
        alone = case.filled(row)
        out = torch.cat([case.append(alone, t, row=row)[0] for t in range(case.S)], 1)
        torch.testing.assert_close(out[0], steps[row], **CLOSE, msg=f"row {row}: {told}")


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_a_turn_breaks_ties_as_single_tokens_do(name: str) -> None:
    """Attention so sharp that most scores are exactly 0: of equal ones the first slot's leaves, as one by one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 90, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    layer = LayerPolicy(slots=Slots(12), sink_tokens=1, recent_tokens=3, evictor=evictors[name]())
    model = ModelSpec((LayerSpec(2, 8, 8),), 4, "float64")
    case = Case(Policy(layers=(layer,)), model, q * 300, k, v, [30, 30], 30, 60, AttentionArgs(8**-0.5))
    steps, turns = case.filled(), case.filled()
    one_by_one = torch.cat([case.append(steps, t)[0] for t in range(60)], 1)
    at_once = torch.cat([case.append(turns, t, 20)[0] for t in range(0, 60, 20)], 1)
    torch.testing.assert_close(at_once, one_by_one, **CLOSE)
    assert all(torch.equal(steps.pool.buffers[c], x) for c, x in turns.pool.buffers.items() if c != "scores")
