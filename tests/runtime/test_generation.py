from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import kvplan.runtime.cache
from kvplan.errors import MemoryPlanExceeded, RuntimeLimitError
from kvplan.methods.evictors.h2o import H2O
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, full_policy, spec_of
from kvplan.runtime.generation import Generated, first_difference, generate

LENGTHS = (40, 25, 9)


def policy(slots: int = 20) -> Policy:
    kept = LayerPolicy(slots=Slots(share=slots * 100), min_slots=8, recent_tokens=4, sink_tokens=2, evictor=SnapKV())
    scored = LayerPolicy(slots=Slots(tokens=12), recent_tokens=4, sink_tokens=2, evictor=H2O())
    return Policy(layers=(kept, scored, LayerPolicy(), LayerPolicy(shares=0)))


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 128, (n,), generator=generator).tolist() for n in lengths]


def run(model: Any, tokenizer: Any, used: Policy, batch: list[list[int]], **options: Any) -> list[Generated]:
    with attach(model, used) as runtime:
        return generate(runtime, tokenizer, batch, **{"max_new_tokens": 12, **options})


def ending_at(model: Any, token: int) -> Any:
    changed = copy.copy(model)
    changed.generation_config = copy.deepcopy(model.generation_config)
    changed.generation_config.eos_token_id = [token]
    return changed


def test_the_full_policy_generates_what_the_model_does(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = prompts()
    rows = run(tiny_llama, tiny_tokenizer, full_policy(tiny_llama), batch)
    for ids, row in zip(batch, rows, strict=True):
        output = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert list(row.tokens) == output[0, len(ids) :].tolist()
        assert row.text == tiny_tokenizer.decode(row.tokens, skip_special_tokens=True)


def test_rows_of_a_batch_are_single_rows(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = prompts()
    together = run(tiny_llama, tiny_tokenizer, policy(), batch)
    alone = [run(tiny_llama, tiny_tokenizer, policy(), [ids])[0] for ids in batch]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens and a.new_tokens == 12
        assert (a.kv_bytes, a.kv_bytes_planned, a.kv_bytes_full) == (b.kv_bytes, b.kv_bytes_planned, b.kv_bytes_full)
    assert [row.prompt_tokens for row in together] == list(LENGTHS)
    assert {row.batch_rows for row in together} == {3} and {row.batch_rows for row in alone} == {1}


def test_bytes_are_those_of_the_plan(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows = run(tiny_llama, tiny_tokenizer, policy(), prompts())
    spec = spec_of(tiny_llama)
    for row, length in zip(rows, LENGTHS, strict=True):
        planned = plan(policy(), spec, [length], 11)
        assert row.kv_bytes == row.kv_bytes_planned == planned.total and row.kv_bytes_full == planned.full
        assert row.min_slots_binds == ((0,) if length < 40 else ())
        assert row.kv_ratio == planned.ratio and row.peak_kv_bytes >= sum(r.kv_bytes for r in rows)
        assert row.prefill_seconds > 0 and row.decode_tokens_per_second is not None
    assert set(rows[0].to_json()) >= {"text", "new_tokens", "kv_ratio"} and "tokens" not in rows[0].to_json()


def test_a_row_ends_with_the_models_end_token(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = prompts()
    free = run(tiny_llama, tiny_tokenizer, policy(), batch)
    end = free[0].tokens[3]
    model = ending_at(tiny_llama, end)
    rows = run(model, tiny_tokenizer, policy(), batch)
    for before, after in zip(free, rows, strict=True):
        stop = before.tokens.index(end) + 1 if end in before.tokens else 12
        assert after.tokens == before.tokens[:stop]
        assert after.kv_bytes == after.kv_bytes_planned
    assert rows[0].new_tokens <= 4


def test_one_new_token_has_no_speed(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    row = run(tiny_llama, tiny_tokenizer, policy(), prompts((30,)), max_new_tokens=1)[0]
    assert row.new_tokens == 1 and row.decode_tokens_per_second is None


def test_sampling_repeats_with_its_seed(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    def sample(seed: int) -> Generated:
        return run(tiny_llama, tiny_tokenizer, policy(), prompts((30,)), temperature=1.5, seed=seed)[0]

    assert sample(1).tokens == sample(1).tokens != sample(2).tokens
    assert first_difference(sample(1), sample(1)) is None
    place = first_difference(sample(1), sample(2))
    assert place is not None and sample(1).tokens[place] != sample(2).tokens[place]


def test_bytes_above_the_plan_are_an_error(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvplan.runtime.cache, "plan", lambda p, s, rows, n: plan(p, s, [r - 1 for r in rows], n))
    with pytest.raises(MemoryPlanExceeded, match="the cache holds .* the plan allows"):
        run(tiny_llama, tiny_tokenizer, policy(), prompts())


def test_scores_that_cannot_be_sampled_are_one_line(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    overflowing = copy.deepcopy(tiny_llama)
    torch.nn.init.constant_(overflowing.lm_head.weight, float("inf"))
    with pytest.raises(RuntimeLimitError, match="the model's scores are nan or infinite in float32; try another"):
        run(overflowing, tiny_tokenizer, policy(), prompts()[:1], temperature=1.0)
