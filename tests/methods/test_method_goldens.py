"""Golden vectors and special properties of CORM, Ada-KV, ThinK, KVMerger and CaM.

Sources: for Ada-KV, FFY0/AdaKV (its adaptive SnapKV cluster, query group reduced, average pooling) and kvpress 0.5.4,
which agree here; for CaM, zyxxmu/cam (Llama path); for ThinK, SalesforceAIResearch/ThinK and kvpress by their formulas.
CORM and KVMerger have no public reference: their vectors follow the papers' definitions by hand.

Fixtures of integer arithmetic: `gen` is that of `test_goldens.py`; `det` is
x = ((31i^2 + 7919i + 104729s) mod 2003) / 1001.5 - 1 over i = 0, 1, ...
"""

from __future__ import annotations

import itertools
import math
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from kvplan.errors import MethodError
from kvplan.methods.channels.think import ThinK
from kvplan.methods.evictors import PromptView, Step
from kvplan.methods.evictors.corm import CORM
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.methods.mergers.cam import CaM
from kvplan.methods.mergers.kvmerger import KVMerger

T, D = 48, 8


def gen(shape: tuple[int, ...], seed: int) -> Tensor:
    n = torch.arange(torch.Size(shape).numel())
    return (((7 * n**3 + 31 * n**2 + 17 * n + 101 * seed) % 1009) / 1009 - 0.5).float().reshape(shape)


def det(shape: tuple[int, ...], seed: int) -> Tensor:
    i = torch.arange(torch.Size(shape).numel())
    return (((31 * i * i + 7919 * i + 104729 * seed) % 2003).double() / 1001.5 - 1).float().reshape(shape)


Q, K, V = 4 * gen((1, 4, T, D), 1), 4 * gen((1, 2, T, D), 2), gen((1, 2, T, D), 3)


def view(queries: Tensor, keys: Tensor, valid: Tensor | None = None) -> PromptView:
    if valid is None:
        valid = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
    return PromptView(keys=keys, values=keys, valid=valid, scaling=keys.shape[-1] ** -0.5, queries=queries)


def test_the_fixture_is_the_published_one() -> None:
    expected = torch.tensor([-0.427858, -0.489765, -0.489765, -0.427858, -0.304044, -0.118323])
    torch.testing.assert_close(det((6,), 1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(Q[0, 0, 0, :4], torch.tensor([-1.599604, -1.381566, -0.751239, 0.457879]))


# -- CORM ---------------------------------------------------------------------------------------------------------


def corm_keeps(queries: Tensor, keys: Tensor, window: int, recent: int) -> list[list[int]]:
    scores = CORM(window_tokens=window).score(view(queries, keys))[0]
    now = keys.shape[2] - 1
    kept = (now - scores < window) | (torch.arange(now + 1) > now - recent)
    return [head.nonzero()[:, 0].tolist() for head in kept]


def test_corm_keeps_what_the_definition_keeps() -> None:
    per_query_head = corm_keeps(3 * Q, K.repeat_interleave(2, 1), 8, 8)
    assert [len(head) for head in per_query_head] == [30, 29, 33, 38]
    assert per_query_head[0] == [1, 4, 5, 6, 9, 11, 12, 13, 18, 21, 22, 23, 26, 28, 30, *range(32, 38), *range(39, 48)]
    per_kv_head = corm_keeps(3 * Q, K, 8, 8)
    assert [len(head) for head in per_kv_head] == [37, 45]
    assert set(per_kv_head[0]) == set(per_query_head[0]) | set(per_query_head[1])


def test_corm_with_a_longer_window_keeps_a_superset() -> None:
    kept = [corm_keeps(3 * Q, K, window, 1) for window in range(1, 48)]
    for shorter, longer in itertools.pairwise(kept):
        assert all(set(one) <= set(other) for one, other in zip(shorter, longer, strict=True))


def test_corm_drops_nothing_before_its_window_is_full() -> None:
    for window in (48, 256):
        prompt = 47
        scores = CORM(window_tokens=window).score(view(9 * Q[:, :, :prompt], K[:, :, :prompt]))
        assert ((prompt - 1) - scores < window).all()


def test_corm_keeps_everything_under_even_attention() -> None:
    kept = corm_keeps(torch.zeros_like(Q), K, 8, 1)
    assert kept == [list(range(T))] * 2


def test_corm_keeps_the_one_key_that_all_look_at() -> None:
    keys = torch.zeros(1, 1, T, D)
    keys[0, 0, 5, 0] = 1e3
    assert corm_keeps(torch.ones(1, 2, T, D), keys, 8, 8) == [[5, *range(40, 48)]]


def test_corm_counts_positions_and_means_without_padding() -> None:
    valid = torch.ones(1, T, dtype=torch.bool)
    valid[:, :9] = False
    corm = CORM(window_tokens=16)
    padded = corm.score(view(3 * Q, K, valid))
    assert torch.equal(padded[..., 9:], corm.score(view(3 * Q[:, :, 9:], K[:, :, 9:])))


def test_corm_reads_long_windows_in_blocks() -> None:
    tokens = 300  # two and a half blocks of queries
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 2, tokens, D, generator=generator), torch.randn(1, 1, tokens, D, generator=generator)
    logits = (3 * queries @ keys.mT * D**-0.5)[0]
    probs = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    important = (probs >= 1 / torch.arange(1, tokens + 1)[:, None]).any(0)
    expected = [
        max([token - 1, *(row for row in range(tokens - 290, tokens) if important[row, token])])
        for token in range(tokens)
    ]
    scores = CORM(window_tokens=290).score(view(3 * queries, keys))[0, 0]
    assert (scores != torch.tensor(expected)).float().mean() < 0.01  # weights within rounding of the mean


@given(prompt=st.integers(1, 12), window=st.integers(1, 9), seed=st.integers(0, 99))
@examples(max_examples=40, deadline=None)
def test_corm_decodes_like_a_history_of_messages(prompt: int, window: int, seed: int) -> None:
    """Against a list of the last messages per token; a token without `window` messages of its own stays."""
    generator = torch.Generator().manual_seed(seed)
    steps, groups, corm = 25, 2, CORM(window_tokens=window)
    assert corm.forgets_after == window
    width = prompt + steps
    queries = 3 * torch.randn(1, groups, prompt, D, generator=generator)
    keys = torch.randn(1, 1, prompt, D, generator=generator)
    logits = (queries @ keys.mT * D**-0.5)[0]
    first = logits.masked_fill(torch.ones(prompt, prompt).triu(1).bool(), -torch.inf).softmax(-1)  # [G, prompt, prompt]
    messages: dict[int, deque[bool]] = {token: deque(maxlen=window) for token in range(width)}
    for row in range(prompt):
        for token in range(row + 1):
            messages[token].append(bool((first[:, row, token] >= 1 / (row + 1)).any()))

    scores = torch.zeros(1, 1, width)
    scores[..., :prompt] = corm.score(view(queries, keys))
    alive = list(range(prompt))
    for now in range(prompt - 1, width):
        if now >= prompt:
            alive.append(now)
            probs = torch.zeros(1, 1, groups, width)
            probs[..., alive] = (3 * torch.randn(groups, len(alive), generator=generator)).softmax(-1)
            held = torch.full((1, 1, 1), len(alive))
            scores = corm.observe(scores, probs, Step(now=torch.full((1, 1, 1), now), held=held))
            for token in alive:
                messages[token].append(bool((probs[0, 0, :, token] >= 1 / len(alive)).any()))
        stay = [token for token in alive if any(messages[token]) or len(messages[token]) < window]
        assert stay == [token for token in alive if now - scores[0, 0, token] < window]
        assert (scores[0, 0, alive] != 0).all()  # 0 is the score of a slot just filled
        assert (scores[0, 0, now + 1 :] == 0).all()  # of tokens to come, nothing is known
        alive = stay


# -- Ada-KV -------------------------------------------------------------------------------------------------------

ADAKV_KEEPS = [
    [1, 2, 3, 5, *range(7, 14), 20, *range(33, 38)],
    [6, 8, *range(17, 23), *range(27, 32), 36, 37],
]


def test_adakv_splits_as_the_references_do() -> None:
    scores = SnapKV(window_tokens=8, pool_width=5, pooling="avg").score(view(Q, K))[0, :, :40]
    lengths = AdaKV(floor=0.2).split(scores, 32, 0)
    assert lengths == [17, 15]
    kept = [sorted(head.topk(n).indices.tolist()) for head, n in zip(scores, lengths, strict=True)]
    assert kept == ADAKV_KEEPS
    assert AdaKV(floor=1.0).split(scores, 32, 0) == [16, 16]


def test_adakv_without_a_floor_keeps_the_highest_scores_of_the_layer() -> None:
    scores = (torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9)[:, None]).softmax(
        1
    )
    for total in (1, 7, 200, 799):
        shares = AdaKV(floor=0.0).split(scores, total, 0)
        best = scores.flatten().topk(total).indices // 100
        assert shares == best.bincount(minlength=8).tolist()


@given(floor=st.floats(0, 1), total=st.integers(0, 160), seed=st.integers(0, 99), least=st.integers(0, 40))
@examples(max_examples=100, deadline=None)
def test_adakv_is_exact_for_any_floor(floor: float, total: int, seed: int, least: int) -> None:
    scores = (9 * torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    shares = AdaKV(floor=floor).split(scores, total, min(least, total // 4))
    assert sum(shares) == total
    assert all(max(min(least, total // 4), math.floor(total / 4 * floor)) <= share <= 40 for share in shares)


def test_adakv_raises_poor_heads_to_the_least_and_shrinks_the_others_alike() -> None:
    scores = torch.zeros(3, 100)
    scores[0, :60], scores[1, :30] = 2.0, 1.0
    assert AdaKV(floor=0.0).split(scores, 90, 0) == [60, 30, 0]
    assert AdaKV(floor=0.0).split(scores, 90, 15) == [50, 25, 15]


def test_adakv_gives_ties_to_the_later_token() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert AdaKV(floor=0.0).split(scores, 1, 0) == [0, 1, 0]
    assert AdaKV(floor=0.0).split(scores, 2, 0) == [0, 1, 1]


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_adakv_refuses_a_floor_that_is_no_share(floor: float) -> None:
    with pytest.raises(MethodError, match=r"adakv\.floor is .*; it must be between 0 and 1"):
        AdaKV(floor=floor)


# -- ThinK --------------------------------------------------------------------------------------------------------


def test_think_scores_and_channels_are_those_of_the_formula() -> None:
    queries, keys, valid = det((1, 4, 8, 8), 30), det((1, 2, 16, 8), 31), torch.ones(1, 16, dtype=torch.bool)
    think = ThinK(drop=0.4, window=4)
    head = [0.119990, 0.092972, 0.197611, 0.153873, 0.127006, 0.124397, 0.063857, 0.121181]
    torch.testing.assert_close(think.contributions(queries, keys, valid)[0, 0], torch.tensor(head), atol=2e-6, rtol=0)
    assert dropped(think.select(queries, keys, valid)) == [{0, 1, 6}, {3, 4, 7}]
    per_query_head = think.select(queries, keys.repeat_interleave(2, 1), valid)
    assert dropped(per_query_head) == [{1, 6, 7}, {1, 2, 6}, {3, 5, 7}, {3, 4, 7}]


def dropped(channels: Tensor, dim: int = 8) -> list[set[int]]:
    return [set(range(dim)) - set(head) for head in channels[0].tolist()]


@pytest.mark.parametrize(
    ("dim", "drop", "kept"), [(128, 0.4, 77), (128, 0.5, 64), (64, 0.3, 45), (1, 0.9, 1), (8, 0, 8)]
)
def test_think_rounds_the_dropped_channels_down(dim: int, drop: float, kept: int) -> None:
    assert ThinK(drop=drop).num_kept(dim) == kept


def test_think_drops_channels_that_nobody_asks_for_first() -> None:
    queries, keys, valid = det((1, 4, 8, 8), 30), det((1, 2, 16, 8), 31), torch.ones(1, 16, dtype=torch.bool)
    queries[..., [2, 3]] = 0
    assert all({2, 3} < head for head in dropped(ThinK(drop=0.4).select(queries, keys, valid)))


def test_think_does_not_care_how_a_product_is_shared_out() -> None:
    queries, keys, valid = det((1, 4, 8, 8), 30), det((1, 2, 16, 8), 31), torch.ones(1, 16, dtype=torch.bool)
    scale = 2.0 ** torch.arange(-4, 4)
    think = ThinK(drop=0.5)
    assert torch.equal(think.select(queries * scale, keys / scale, valid), think.select(queries, keys, valid))


@pytest.mark.parametrize("wrong", [{"drop": 1.0}, {"drop": -0.1}, {"recent": 0}, {"window": 0}])
def test_think_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=rf"think\.{next(iter(wrong))} is"):
        ThinK(**wrong)  # type: ignore[arg-type]


# -- KVMerger -----------------------------------------------------------------------------------------------------

ANGLES = torch.deg2rad(torch.tensor([0.0, 10, 20, 90, 95, 180]))
FAN = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)[None]  # [1, 6, 2]
FAN_SCORES = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.4, 0.6]])


def test_kvmerger_merges_the_runs_and_weights_of_the_definition() -> None:
    # Values are one-hot, so merged values are the weights.
    merged = KVMerger(heavy=0.0).merge_prompt(FAN, torch.eye(6)[None], FAN_SCORES, 3, 0, 0)
    weights = torch.tensor([[0.2741, 0.4519, 0.2741, 0, 0, 0], [0, 0, 0, 0.3775, 0.6225, 0], [0, 0, 0, 0, 0, 1]])
    torch.testing.assert_close(merged.values[0], weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(merged.keys[0], weights @ FAN[0], atol=2e-4, rtol=0)
    assert merged.positions.tolist() == [[1, 4, 5]]
    assert merged.counts.tolist() == [[3, 2, 1]]
    torch.testing.assert_close(merged.scores, torch.tensor([[0.5, 0.4, 0.6]]))


def test_kvmerger_joins_the_most_alike_first_and_no_more_than_needed() -> None:
    for slots, counts in ((5, [1, 1, 1, 2, 1]), (4, [1, 2, 2, 1]), (3, [3, 2, 1])):
        merged = KVMerger(heavy=0.0).merge_prompt(FAN, FAN, FAN_SCORES, slots, 0, 0)
        assert merged.counts.tolist() == [counts]


def test_kvmerger_drops_the_lowest_run_where_none_are_alike_enough() -> None:
    merged = KVMerger(heavy=0.0).merge_prompt(FAN, FAN, FAN_SCORES, 2, 0, 0)
    assert merged.positions.tolist() == [[1, 5]]
    assert merged.counts.tolist() == [[3, 1]]


def test_kvmerger_that_merges_nothing_keeps_the_highest_scores_bit_by_bit() -> None:
    values = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    merged = KVMerger(heavy=0.0, similarity=1.0).merge_prompt(FAN, values, FAN_SCORES, 3, 0, 0)
    assert merged.positions.tolist() == [[1, 4, 5]]
    assert merged.counts.tolist() == [[1, 1, 1]]
    assert torch.equal(merged.keys, FAN[:, [1, 4, 5]])
    assert torch.equal(merged.values, values[:, [1, 4, 5]])


def test_kvmerger_leaves_heavy_tokens_alone() -> None:
    # One of two slots is heavy: token 5; of three with two thirds heavy: tokens 5 and 1, which cuts the first run.
    merged = KVMerger(heavy=0.67, similarity=-1.0).merge_prompt(FAN, FAN, FAN_SCORES, 3, 0, 0)
    assert merged.positions.tolist() == [[1, 4, 5]]
    assert merged.counts.tolist() == [[1, 3, 1]]  # token 0 is dropped
    assert torch.equal(merged.keys[:, [0, 2]], FAN[:, [1, 5]])


def test_kvmerger_with_a_fixed_width_weighs_by_distance() -> None:
    values = torch.eye(6)[None]
    narrow, wide = (
        KVMerger(heavy=0.0, sigma=sigma).merge_prompt(FAN, values, FAN_SCORES, 3, 0, 0).values[0]
        for sigma in (0.01, 50)
    )
    torch.testing.assert_close(narrow[0], torch.eye(6)[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(wide[0, :3], torch.full((3,), 1 / 3), atol=1e-4, rtol=0)


def test_kvmerger_counts_make_merging_equal_tokens_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(1, 5, D, generator=generator), torch.randn(1, 5, D, generator=generator)
    runs = torch.tensor([1, 4, 1, 3, 2])
    merged = KVMerger(heavy=0.0).merge_prompt(
        keys.repeat_interleave(runs, 1), values.repeat_interleave(runs, 1), torch.ones(1, 11), 5, 0, 0
    )
    assert merged.counts.tolist() == [runs.tolist()]
    query = torch.randn(1, 3, D, generator=generator)
    full = (query @ keys.repeat_interleave(runs, 1).mT).softmax(-1) @ values.repeat_interleave(runs, 1)
    logits = query @ merged.keys.mT
    torch.testing.assert_close((logits + merged.counts[:, None].log()).softmax(-1) @ merged.values, full)
    assert not torch.allclose(logits.softmax(-1) @ merged.values, full, atol=1e-3)


def test_kvmerger_heads_merge_different_runs() -> None:
    keys = torch.cat([FAN, FAN.flip(1)])
    merged = KVMerger(heavy=0.0).merge_prompt(keys, keys, FAN_SCORES.expand(2, 6), 3, 0, 0)
    assert merged.counts.tolist() == [[3, 2, 1], [1, 2, 3]]


@given(seed=st.integers(0, 199), tokens=st.integers(3, 30), data=st.data())
@examples(max_examples=60, deadline=None)
def test_kvmerger_equals_a_plain_loop(seed: int, tokens: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, tokens - 1))
    sinks = data.draw(st.integers(0, slots))
    recent = data.draw(st.integers(0, slots - sinks))
    heavy = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    similarity = data.draw(st.sampled_from([-1.0, 0.0, 0.75]))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, tokens, 3, generator=generator).cumsum(1)
    scores = torch.rand(1, tokens, generator=generator)
    merger = KVMerger(heavy=heavy, similarity=similarity)
    merged = merger.merge_prompt(keys, torch.eye(tokens)[None], scores, slots, sinks, recent)
    expected = plain_runs(keys[0], scores[0].tolist(), slots, sinks, recent, heavy, similarity)
    members = [row.nonzero()[:, 0].tolist() for row in merged.values[0]]
    # A member far from its pivot may weigh nothing in float32.
    assert merged.counts[0].tolist() == [len(run) for run in expected]
    assert all(set(mine) <= set(run) for mine, run in zip(members, expected, strict=True))
    assert merged.positions[0].tolist() == [max(run, key=lambda t: scores[0, t].item()) for run in expected]
    torch.testing.assert_close(merged.values.sum(-1), torch.ones(1, slots))


def plain_runs(
    keys: Tensor, scores: list[float], slots: int, sinks: int, recent: int, heavy: float, similarity: float
) -> list[list[int]]:
    """Lower the threshold from pair to pair until the runs fit, then drop the lowest."""
    tokens = len(keys)
    protected = {*range(sinks), *range(tokens - recent, tokens)}
    free = sorted(set(range(tokens)) - protected, key=lambda t: -scores[t])
    whole = protected | set(free[: int(heavy * (slots - sinks - recent))])
    units = keys / keys.norm(dim=-1, keepdim=True)
    cosines = [float(units[t] @ units[t + 1]) for t in range(tokens - 1)]
    runs: list[list[int]] = []
    for threshold in sorted((c for c in {*cosines, 2.0} if c > similarity), reverse=True):
        runs = [[0]]
        for t in range(1, tokens):
            if cosines[t - 1] >= threshold and not {t - 1, t} & whole:
                runs[-1].append(t)
            else:
                runs.append([t])
        if len(runs) <= slots:
            break
    droppable = sorted((r for r in runs if not set(r) & protected), key=lambda r: max(scores[t] for t in r))
    for run in droppable[: len(runs) - slots]:
        runs.remove(run)
    return runs


@pytest.mark.parametrize("wrong", [{"similarity": 1.5}, {"heavy": -0.1}, {"sigma": 0.0}, {"sigma": "wide"}])
def test_kvmerger_refuses_what_makes_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(MethodError, match=rf"kvmerger\.{next(iter(wrong))} is"):
        KVMerger(**wrong)  # type: ignore[arg-type]


# -- CaM ----------------------------------------------------------------------------------------------------------


def test_cam_hands_over_what_the_reference_does() -> None:
    tokens, recent = 64, 40
    leaving = tokens - recent + 1
    values = torch.randn(1, 2, tokens, D, generator=torch.Generator().manual_seed(0))
    probs = torch.zeros(1, 2, tokens)
    probs[0, 0, leaving] = 0.5  # certain; the other head's token is worth nothing
    followers = torch.arange(leaving + 1, tokens)[None]
    after = CaM().merge_step(values, probs, torch.tensor([leaving]), followers)
    assert torch.equal(after[0, 1], values[0, 1])
    gained = torch.zeros(tokens, D)
    gained[26:58] = values[0, 0, 25] / 32
    torch.testing.assert_close(after[0, 0], values[0, 0] + gained)
    unchanged = [*range(26), *range(58, 64)]
    assert torch.equal(after[0, 0, unchanged], values[0, 0, unchanged])


def cam_step(own: float, followers: int, span: int) -> tuple[Tensor, Tensor]:
    """Values before and after; each follower has attention 0.1."""
    values = torch.randn(1, 1, followers + 3, D, generator=torch.Generator().manual_seed(1))
    probs = torch.full((1, 1, followers + 3), 0.1)
    probs[0, 0, 2] = own
    return values, CaM(span=span).merge_step(values, probs, torch.tensor([2]), torch.arange(3, followers + 3)[None])


@pytest.mark.parametrize(("followers", "span"), [(1, 32), (5, 32), (32, 32), (50, 32), (50, 8)])
def test_cam_conserves_the_sum_when_it_is_certain(followers: int, span: int) -> None:
    before, after = cam_step(0.3, followers, span)
    torch.testing.assert_close(after[:, :, 3:].sum(2), before[:, :, 2:].sum(2))
    assert torch.equal(after[:, :, :3], before[:, :, :3])


def test_cam_hands_over_in_proportion_to_attention() -> None:
    before, after = cam_step(0.025, 10, 32)
    expected = before[:, :, 3:].sum(2) + 0.25 * before[:, :, 2]
    torch.testing.assert_close(after[:, :, 3:].sum(2), expected)


def test_cam_without_attention_is_plain_eviction() -> None:
    before, after = cam_step(0.0, 10, 32)
    assert torch.equal(before, after)


def test_cam_refuses_an_empty_span() -> None:
    with pytest.raises(MethodError, match=r"cam\.span is 0; it must be at least 1"):
        CaM(span=0)
