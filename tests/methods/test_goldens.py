"""Golden vectors: what the reference implementations keep on a fixture of integer arithmetic.

Sources: kvpress 0.5.4 (`ScorerPress.score`, then top-k), FMInference/H2O `H2OKVCache_LayerWise`, schwartz-lab-NLP/TOVA,
FasterDecoding/SnapKV, AI-Lab-China-Merchants-Bank/LagKV.

Fixture: x = ((7n^3 + 31n^2 + 17n + 101s) mod 1009) / 1009 - 0.5 over n = 0, 1, ...
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvplan.methods.evictors import PromptView, evictors
from kvplan.methods.rotation import Rotation
from kvplan.model_spec import LayerSpec
from kvplan.policy.schema import LayerPolicy, Slots
from kvplan.runtime.kernels.choose import column_sums
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.budgeted import BudgetedLayer

T, D = 48, 8
ARGS = AttentionArgs(scaling=D**-0.5)


def gen(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    n = torch.arange(torch.Size(shape).numel())
    return (((7 * n**3 + 31 * n**2 + 17 * n + 101 * seed) % 1009) / 1009 - 0.5).float().reshape(shape)


Q, K, V = 4 * gen((1, 4, T, D), 1), 4 * gen((1, 2, T, D), 2), gen((1, 2, T, D), 3)
K_MHA, V_MHA = K.repeat_interleave(2, 1), V.repeat_interleave(2, 1)


def view(keys: torch.Tensor = K, sums: torch.Tensor | None = None) -> PromptView:
    valid = torch.ones(1, keys.shape[2], dtype=torch.bool)
    return PromptView(keys=keys, values=V, valid=valid, scaling=ARGS.scaling, queries=Q, column_sums=sums)


def top(scores: torch.Tensor, count: int) -> list[list[int]]:
    return [sorted(row.topk(count).indices.tolist()) for row in scores]


def test_the_fixture_is_the_published_one() -> None:
    torch.testing.assert_close(Q[0, 0, 0, :4], torch.tensor([-1.599604, -1.381566, -0.751239, 0.457879]))
    torch.testing.assert_close(K[0, 1, 47, :4], torch.tensor([-1.666997, -1.750248, 1.119921, -0.889990]))


def test_key_norm_keeps_what_kvpress_keeps() -> None:
    assert top(evictors["knorm"]().score(view())[0], 16) == [
        [2, 8, 12, 14, 16, 19, 21, 24, 26, 28, 29, 33, 38, 39, 40, 42],
        [1, 2, 8, 10, 11, 12, 13, 14, 16, 21, 25, 30, 32, 42, 43, 45],
    ]


def test_tova_keeps_what_both_references_keep() -> None:
    scores = evictors["tova"]().score(view())
    assert top(scores[0], 16) == [[1, 6, 9, 11, 18, 20, 23, 27, 28, 32, 34, 35, 40, 41, 45, 47]]


def test_snapkv_keeps_what_kvpress_keeps() -> None:
    scores = evictors["snapkv"](window_tokens=8, pool_width=5).score(view())
    window = list(range(40, 48))
    assert top(scores[0], 16) == [
        [2, 10, 11, 33, 34, 35, 36, 37, *window],
        [18, 19, 20, 21, 22, 27, 29, 30, *window],
    ]


def test_h2o_sums_are_the_references() -> None:
    valid = torch.ones(1, T, dtype=torch.bool)
    per_query_head = column_sums(Q, K_MHA, valid, ARGS)[0, :, :40]
    assert top(per_query_head, 8) == [
        [0, 1, 2, 4, 6, 7, 9, 11],
        [0, 1, 2, 3, 5, 6, 7, 11],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 6, 7, 10],
    ]
    per_kv_head = column_sums(Q, K, valid, ARGS)[0, :, :40]
    assert top(per_kv_head, 8) == [[0, 1, 2, 4, 6, 7, 9, 11], [0, 1, 2, 3, 4, 5, 6, 7]]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0 to 47, written as the references do."""
    angles = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    angles = torch.cat([angles, angles], -1)
    half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def future_view() -> PromptView:
    rotation = Rotation(torch.arange(4), torch.arange(4, 8), 10000 ** (-torch.arange(0, D, 2) / D))
    valid = torch.ones(1, T, dtype=torch.bool)
    return PromptView(
        keys=rotated(K), values=V, valid=valid, scaling=ARGS.scaling, queries=rotated(Q), sink_tokens=4,
        rotation=rotation,
    )  # fmt: skip


def test_expected_attention_scores_and_keeps_what_kvpress_does() -> None:
    scores = evictors["expected"](future_tokens=16, epsilon=0.0).score(future_view())[0]
    torch.testing.assert_close(scores[0, 4:8], torch.tensor([0.02544999, 0.01295120, 0.02397384, 0.03151110]))
    assert top(scores, 16) == [
        [0, 1, 2, 3, 4, 7, 9, 17, 18, 22, 31, 32, 35, 43, 44, 45],
        [0, 1, 2, 3, 6, 18, 19, 20, 24, 26, 27, 28, 33, 34, 41, 47],
    ]


def test_expected_attention_by_the_mean_alone_keeps_what_kvpress_keeps() -> None:
    scores = evictors["expected"](future_tokens=16, epsilon=0.0, covariance=False, value_norm=False).score(
        future_view()
    )[0]
    assert top(scores, 16) == [
        [0, 1, 2, 3, 5, 6, 7, 10, 14, 15, 17, 22, 25, 26, 31, 34],
        [0, 1, 2, 3, 6, 8, 14, 18, 20, 21, 26, 28, 32, 33, 41, 47],
    ]


def test_a_rotation_at_the_next_position_alone_is_exact() -> None:
    """With one future position, what is scored is the mean of the queries rotated to just there."""
    view = future_view()
    assert view.rotation is not None and view.queries is not None
    steps = (T - torch.arange(T))[None]
    there = view.rotation.moved(view.queries, steps)
    plain = dataclasses.replace(view, queries=there, rotation=None)
    mine = evictors["expected"](future_tokens=1).score(view)
    torch.testing.assert_close(mine, evictors["expected"]().score(plain), rtol=1e-4, atol=1e-5)
    angles = (T * view.rotation.frequencies).repeat(2)
    half = torch.cat([-Q[..., D // 2 :], Q[..., : D // 2]], -1)
    torch.testing.assert_close(there, Q * angles.cos() + half * angles.sin(), rtol=1e-4, atol=1e-5)


def test_keydiff_keeps_what_kvpress_keeps() -> None:
    assert top(evictors["keydiff"]().score(view())[0], 16) == [
        [1, 2, 3, 5, 6, 9, 10, 11, 13, 18, 20, 25, 37, 43, 44, 47],
        [0, 1, 10, 12, 16, 17, 21, 23, 25, 28, 29, 33, 38, 41, 42, 47],
    ]


def test_lagkv_keeps_what_both_references_keep() -> None:
    policy = LayerPolicy(
        slots=Slots(tokens=32), sink_tokens=2, recent_tokens=1, evictor=evictors["lagkv"](lag_tokens=8)
    )
    layer = BudgetedLayer(policy, LayerSpec(2, D, D))
    layer.store_prompt(Q, K, V, torch.ones(1, T, dtype=torch.bool), ARGS)
    held = layer.pool.row(0).columns["keys.x"][0]
    kept = [sorted(int((K[0, h] == key).all(-1).nonzero()[0]) for key in held[h]) for h in range(2)]
    tail = list(range(34, 48))
    assert kept == [
        [0, 1, 3, 6, 7, 9, 11, 13, 15, 17, 18, 20, 22, 25, 27, 30, 31, 32, *tail],
        [0, 1, 3, 4, 6, 7, 10, 15, 16, 17, 18, 19, 20, 24, 28, 29, 31, 33, *tail],
    ]


def run(
    name: str, keys: torch.Tensor, values: torch.Tensor, slots: int, recent: int, prompt: int
) -> list[BudgetedLayer]:
    """The layer after the prompt, and after all T tokens."""
    policy = LayerPolicy(slots=Slots(tokens=slots), sink_tokens=0, recent_tokens=recent, evictor=evictors[name]())
    layers = []
    for stop in (prompt, T):
        layer = BudgetedLayer(policy, LayerSpec(keys.shape[1], D, D))
        valid = torch.ones(1, prompt, dtype=torch.bool)
        layer.store_prompt(Q[:, :, :prompt], keys[:, :, :prompt], values[:, :, :prompt], valid, ARGS)
        for t in range(prompt, stop):
            layer.append(Q[:, :, t, None], keys[:, :, t, None], values[:, :, t, None], ARGS)
        layers.append(layer)
    return layers


HEAVY = [[0, 1, 2, 4, 7, 9], [0, 1, 2, 4, 6, 7], [0, 1, 3, 4, 5, 7], [0, 1, 2, 3, 4, 6]]


def test_h2o_prefill_equals_the_real_drop_class() -> None:
    after_prompt, _ = run("h2o", K_MHA, V_MHA, slots=12, recent=6, prompt=24)
    assert after_prompt.pool.buffers["positions"].view(4, 12).sort().values.tolist() == [
        h + list(range(18, 24)) for h in HEAVY
    ]


def test_h2o_decoding_equals_the_real_drop_class() -> None:
    # The reference attends over 13 tokens, then drops one; it protects 6 recent ones besides the token to come.
    _, after_all = run("h2o", K_MHA, V_MHA, slots=13, recent=7, prompt=24)
    positions, scores = after_all.pool.buffers["positions"].view(4, 13), after_all.pool.buffers["scores"].view(4, 13)
    for head in range(4):
        held = sorted(zip(positions[head].tolist(), scores[head].tolist(), strict=True))
        old = [(score, position) for position, score in held if position < 42]
        old.remove(min(old))
        assert sorted(p for _, p in old) == HEAVY[head]
        assert [p for p, _ in held if p >= 42] == list(range(42, 48))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (24, [0, 4, 5, 6, 12, 13, 14, 16, 19, 21, 22, 23]),
        (48, [12, 21, 29, 37, 38, 40, 41, 43, 44, 45, 46, 47]),
    ],
)
def test_tova_equals_the_reference_while_decoding(stop: int, expected: list[int]) -> None:
    # 13 slots are the reference's 12: it drops after attending, we when the next token comes.
    layers = run("tova", K, V, slots=13, recent=1, prompt=24)
    layer = layers[0] if stop == 24 else layers[1]
    stored = layer.pool.row(0)
    held = sorted(zip(stored.scores[0, 0].tolist(), stored.positions[0, 0].tolist(), strict=True))
    assert sorted(position for _, position in held[1:]) == expected
