"""Every evictor's decisions against the plain-Python oracle, layer by layer, and scan against steps."""

from __future__ import annotations

import pytest
import torch
from oracle import ListCache

from kvplan.methods.evictors import evictors
from kvplan.model_spec import LayerSpec
from kvplan.policy.schema import LayerPolicy, Slots
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.budgeted import BudgetedLayer

HQ, HKV, D = 4, 2, 8
ARGS = AttentionArgs(scaling=D**-0.5)
SPEC = LayerSpec(HKV, D, D)
# Small enough to matter on short prompts.
PARAMETERS = {"lagkv": {"lag_tokens": 8}, "scissorhands": {"history_tokens": 13}}
BUDGETED = [name for name in evictors.names() if evictors[name]().forgets_after is None]


def tensors(rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(rows, heads, tokens, D, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(HQ), make(HKV), make(HKV)


def layer(name: str, slots: int, sinks: int = 2, recent: int = 4) -> BudgetedLayer:
    evictor = evictors[name](**PARAMETERS.get(name, {}))
    policy = LayerPolicy(slots=Slots(tokens=slots), sink_tokens=sinks, recent_tokens=recent, evictor=evictor)
    return BudgetedLayer(policy, SPEC)


def prefill(made: BudgetedLayer, q, k, v, valid=None) -> None:
    valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid
    made.store_prompt(q, k, v, valid, ARGS)
    made.columns = k.shape[2]


def held_positions(made: BudgetedLayer, all_keys: torch.Tensor, row: int = 0) -> list[list[int]]:
    """Positions held per head, found by looking each stored key up in the whole sequence."""
    stored = made.pool.row(row).columns["keys.x"][0, :, : made.held(row)]
    return [sorted(int((all_keys[h] == key).all(-1).nonzero()[0]) for key in stored[h]) for h in range(stored.shape[0])]


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(("prompt", "slots"), [(50, 20), (12, 20), (20, 20)])
def test_agrees_with_the_list_oracle(name: str, prompt: int, slots: int) -> None:
    q, k, v = tensors(1, prompt + 40)
    made, oracle = layer(name, slots), ListCache(name, slots, 2, 4, ARGS.scaling)
    prefill(made, q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    oracle.prefill(q[0, :, :prompt], k[0, :, :prompt], v[0, :, :prompt])
    assert held_positions(made, k[0]) == oracle.alive
    for t in range(prompt, prompt + 40):
        made.append(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], ARGS)
        expected = oracle.step(q[0, :, t], k[0, :, t])
        assert held_positions(made, k[0]) == expected, f"token {t}"


@pytest.mark.parametrize("name", BUDGETED)
def test_several_tokens_at_once_equal_the_same_one_by_one(name: str) -> None:
    q, k, v = tensors(3, 90)
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[1, :30], valid[2, :45] = False, False
    once, steps = layer(name, 24), layer(name, 24)
    for made in (once, steps):
        prefill(made, q[:, :, :50], k[:, :, :50], v[:, :, :50], valid)
    # Two blocks, so that the second starts from a pool that a block left behind.
    out_once = torch.cat(
        [once.append(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], ARGS)[0] for a, b in ((50, 63), (63, 90))], 1
    )
    out_steps = torch.cat(
        [steps.append(q[:, :, t, None], k[:, :, t, None], v[:, :, t, None], ARGS)[0] for t in range(50, 90)], 1
    )
    torch.testing.assert_close(out_once, out_steps, rtol=1e-9, atol=1e-9)
    for row in range(3):
        assert held_positions(once, k[row], row) == held_positions(steps, k[row], row)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_ragged_row_equals_its_own_run(name: str) -> None:
    q, k, v = tensors(2, 80)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, :20] = False
    both, alone = layer(name, 24), layer(name, 24)
    prefill(both, q[:, :, :50], k[:, :, :50], v[:, :, :50], valid)
    prefill(alone, q[1:, :, 20:50], k[1:, :, 20:50], v[1:, :, 20:50])
    for t in range(50, 80):
        wide = both.append(q[:, :, t, None], k[:, :, t, None], v[:, :, t, None], ARGS)[0]
        narrow = alone.append(q[1:, :, t, None], k[1:, :, t, None], v[1:, :, t, None], ARGS)[0]
        torch.testing.assert_close(wide[1:], narrow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in evictors.names() if n != "sliding"])
def test_protected_tokens_survive(name: str) -> None:
    q, k, v = tensors(1, 100)
    made = layer(name, 16, sinks=3, recent=5)
    prefill(made, q[:, :, :60], k[:, :, :60], v[:, :, :60])
    for t in range(60, 100):
        made.append(q[:, :, t, None], k[:, :, t, None], v[:, :, t, None], ARGS)
        for head in held_positions(made, k[0]):
            assert {0, 1, 2, *range(t - 4, t + 1)} <= set(head)
