"""CORM against lists of tokens: who is still worth keeping, what attention sees, and bytes that follow what is held."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from by_hand import ARGS, D, append, prefill
from families import model, prompts
from torch import Tensor

import kvplan
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.evictors.corm import CORM
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.memory import MIN_GROWTH_TOKENS, plan
from kvplan.policy.rules import check_policy
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.cache import build_layer
from kvplan.runtime.layers.per_head import PerHeadLayer

HQ, HKV = 4, 2
SPEC = LayerSpec(HKV, D, D)
MODEL = ModelSpec((SPEC,), HQ, "float64")
TOKEN_BYTES = 2 * D * 8 + 4 + 4  # key, value, position, score


class Lists:
    """One row: per KV head the tokens held, each with the position of the last query that found it important."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: int, cap: int, sinks: int, recent: int) -> None:
        self.q, self.k, self.v = q, k, v
        self.window, self.cap, self.sinks, self.recent = window, cap, sinks, recent

    def prefill(self, T: int) -> None:
        self.last: list[dict[int, float]] = []
        for head in range(HKV):
            last = {t: t - 1.0 for t in range(T)}
            for now in range(max(0, T - self.window), T):
                self._see(last, head, now, range(now + 1))
            last = {t: s for t, s in last.items() if self._stays(t, s, T - 1)}
            if len(last) > self.cap:
                behind = max(self.sinks, T - self.recent)
                rest = sorted((t for t in last if self.sinks <= t < behind), key=lambda t: (-last[t], -t))
                room = self.cap - sum(t < self.sinks or t >= behind for t in last)
                last = {t: s for t, s in last.items() if t < self.sinks or t >= behind or t in rest[:room]}
            self.last.append(last)

    def _probs(self, h: int, now: int, tokens: Any) -> dict[int, float]:
        head = h // (HQ // HKV)
        logits = [float(self.q[h, now] @ self.k[head, t]) * ARGS.scaling for t in tokens]
        raw = [math.exp(x - max(logits)) for x in logits]
        return {t: r / sum(raw) for t, r in zip(tokens, raw, strict=True)}

    def _see(self, last: dict[int, float], head: int, now: int, tokens: Any) -> None:
        for h in range(head * (HQ // HKV), (head + 1) * (HQ // HKV)):
            for t, p in self._probs(h, now, tokens).items():
                if p >= 1 / len(tokens):
                    last[t] = now

    def _stays(self, t: int, score: float, now: int) -> bool:
        return t < self.sinks or t > now - self.recent or now - score < self.window

    def step(self, now: int) -> Tensor:
        rows = []
        for head in range(HKV):
            last = self.last[head]
            if len(last) == self.cap:
                free = [t for t in last if t >= self.sinks and t <= now - self.recent]
                last.pop(min(free, key=lambda t: (last[t], t)))
            last[now] = now - 1.0
            tokens = list(last)
            for h in range(head * (HQ // HKV), (head + 1) * (HQ // HKV)):
                probs = self._probs(h, now, tokens)
                rows.append(sum(p * self.v[head, t] for t, p in probs.items()))
            self._see(last, head, now, tokens)
            self.last[head] = {t: s for t, s in last.items() if self._stays(t, s, now)}
        return torch.stack(rows)


def tensors(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(rows, heads, tokens, D, generator=generator, dtype=torch.float64)  # noqa: E731
    # Sharp attention: most tokens matter to few queries.
    return make(HQ) * 4, make(HKV), make(HKV)


def policy_of(window: int, cap: int, sinks: int = 2, recent: int = 4, **fields: Any) -> LayerPolicy:
    evictor = CORM(window_tokens=window)
    return LayerPolicy(slots=Slots(cap), sink_tokens=sinks, recent_tokens=recent, evictor=evictor, **fields)


def built(policy: LayerPolicy) -> PerHeadLayer:
    whole = Policy(layers=(policy,))
    check_policy(whole)
    return build_layer(whole, MODEL, 0)


def held_tokens(made: PerHeadLayer, head: int) -> list[int]:
    positions = made.inner.pool.row(head).positions[0, 0]
    return sorted(positions[positions >= 0].tolist())


@pytest.mark.parametrize("prompt", [1, 5, 30])
@pytest.mark.parametrize(("window", "cap"), [(1, 40), (4, 40), (8, 200), (8, 12), (1000, 9)])
def test_agrees_with_lists_of_tokens(window: int, cap: int, prompt: int) -> None:
    q, k, v = tensors(1, prompt + 45)
    made = built(policy_of(window, cap))
    oracle = Lists(q[0], k[0], v[0], window, cap, 2, 4)
    prefill(made, q, k, v, prompt)
    oracle.prefill(prompt)
    fewest = prompt
    for now in range(prompt, prompt + 45):
        for head in range(HKV):
            found = held_tokens(made, head)
            assert found == sorted(oracle.last[head]), now
            keys = made.inner.pool.row(head).columns["keys.x"][0, 0]
            at = made.inner.pool.row(head).positions[0, 0]
            assert torch.equal(keys[at >= 0], k[0, head, at[at >= 0].long()])
        out = append(made, q, k, v, now)
        torch.testing.assert_close(out[0, 0], oracle.step(now), rtol=1e-9, atol=1e-12)
        assert max(made.held_by_head(0)) <= cap
        fewest = min(fewest, min(made.held_by_head(0)))
    if window == 4 and prompt == 30:
        assert fewest < 20  # tokens really left although there was room


@pytest.mark.parametrize("codec", [{}, {"key_codec": Int8(), "value_codec": Int8()}], ids=["dense", "int8"])
def test_bytes_follow_what_is_held_and_never_pass_the_plan(codec: dict[str, Any]) -> None:
    q, k, v = tensors(2, 170)
    policy = policy_of(6, 60, **codec)
    made, lengths = built(policy), [90, 40]
    per_token = TOKEN_BYTES if not codec else 2 * (D + 4) + 8
    prefill(made, q, k, v, 90, torch.arange(90) >= torch.tensor([[0], [50]]))
    assert sum(made.bytes_by_kind().values()) == per_token * sum(sum(made.held_by_head(b)) for b in range(2))
    for t in range(90, 170):
        append(made, q, k, v, t)
        held, planned = sum(made.bytes_by_kind().values()), plan(Policy(layers=(policy,)), MODEL, lengths, t - 89)
        tokens = sum(sum(made.held_by_head(b)) for b in range(2))
        assert per_token * tokens <= held <= planned.total
        # A block per head and row is the most that may lie empty, and what was dropped since rows were last packed.
        assert held <= per_token * (tokens + 2 * MIN_GROWTH_TOKENS * HKV * 2)
        assert sum(made.row_bytes(b) for b in range(2)) == held
    assert held < planned.total * 0.8


def test_the_sinks_and_the_recent_window_are_the_floor() -> None:
    q, k, v = tensors(1, 80)
    q, k = q * 0, k * 0  # every token is exactly the mean: all important
    made = built(policy_of(1, 60))
    prefill(made, q, k, v, 30)
    assert made.held_by_head(0) == [30, 30]
    q, k, v = tensors(1, 80)
    k[:, :, 0] = 0
    k[:, :, 7] = 50 * q[:, ::2].mean(2)  # one token takes all attention for a while
    made = built(policy_of(1, 6, sinks=2, recent=4))  # the smallest cap
    prefill(made, q, k, v, 30)
    for t in range(30, 80):
        append(made, q, k, v, t)
        for head in range(HKV):
            assert {0, 1, *range(t - 3, t + 1)} <= set(held_tokens(made, head))
            assert len(held_tokens(made, head)) <= 6


@pytest.mark.parametrize("cap", [12, 100])
def test_rows_are_their_own_runs_and_turns_are_steps(cap: int) -> None:
    q, k, v = tensors(3, 90)
    lengths, T = (40, 3, 21), 40
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    together, turns = built(policy_of(5, cap)), built(policy_of(5, cap))
    for made in (together, turns):
        prefill(made, q, k, v, T, valid)
    outputs = torch.cat([append(together, q, k, v, t) for t in range(T, 90)], 1)
    parts = torch.cat([append(turns, q, k, v, T, 60), append(turns, q, k, v, 60, 90)], 1)
    torch.testing.assert_close(parts, outputs, rtol=1e-10, atol=1e-12)
    for row, n in enumerate(lengths):
        alone = built(policy_of(5, cap))
        mine = [x[row, None, :, T - n :] for x in (q, k, v)]
        prefill(alone, *mine, n)
        out = torch.cat([append(alone, *mine, n + t) for t in range(50)], 1)
        torch.testing.assert_close(out[0], outputs[row], rtol=1e-10, atol=1e-12)


def test_selected_rows_go_on_as_they_were() -> None:
    q, k, v = tensors(2, 70)
    made, twice = built(policy_of(5, 14)), built(policy_of(5, 14))
    for one in (made, twice):
        prefill(one, q, k, v, 30)
        append(one, q, k, v, 30)
    twice.select_rows([1, 0, 1])
    again = [x[[1, 0, 1]] for x in (q, k, v)]
    for t in range(31, 70):
        torch.testing.assert_close(append(twice, *again, t), append(made, q, k, v, t)[[1, 0, 1]])


def test_a_window_longer_than_the_text_is_the_full_cache() -> None:
    made, inputs = model("llama", torch.float64), prompts((30, 17, 4))
    layer = LayerPolicy(slots=Slots(80), evictor=CORM(window_tokens=1000))
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with kvplan.attach(made, Policy(layers=(layer,) * 4)) as runtime:
        cache = runtime.new_cache()
        found = made.generate(**inputs, past_key_values=cache, **options)
        assert cache.report()["layers"][0]["held"] == [59, 46, 33]
    assert torch.equal(found, made.generate(**inputs, **options))
