"""Golden vectors: what the reference implementations keep on a fixture of integer arithmetic.

Sources: kvpress 0.5.4 (`ScorerPress.score`, then top-k), FMInference/H2O `H2OKVCache_LayerWise`, schwartz-lab-NLP/TOVA,
FasterDecoding/SnapKV. Fixture: x = ((7n^3 + 31n^2 + 17n + 101s) mod 1009) / 1009 - 0.5 over n = 0, 1, ...
"""

from __future__ import annotations

import pytest
import torch

from kvplan.methods.evictors import PromptView, evictors
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
