from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from byte_model import byte_model, byte_tokenizer

from kvplan.calibrate.examples import Example, to_example
from kvplan.calibrate.records import parse_record
from kvplan.check.cases import length_generated
from kvplan.check.evaluate import Candidate, evaluate
from kvplan.check.results import FULL_CACHE, Results, load_results, save_results
from kvplan.check.scoring import Scorer
from kvplan.check.tasks import generated
from kvplan.errors import DataError, MethodError, RuntimeLimitError
from kvplan.methods.evictors import evictors
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, full_policy, spec_of
from kvplan.runtime.generation import generate

CONTEXT = " ".join(f"{n} is {n * 37 % 101}." for n in range(40))
CUT = LayerPolicy(slots=Slots(tokens=48), sink_tokens=2, recent_tokens=8, evictor=evictors["tova"]())


@pytest.fixture(scope="module")
def model() -> Any:
    made = byte_model()
    made.generation_config.eos_token_id = None
    return made


def cut(**changes: Any) -> Policy:
    return replace(Policy(layers=(CUT, CUT)), **changes)


def example(name: str = "a", **fields: Any) -> Example:
    record = {"id": name, "task": "t", "max_new_tokens": 6, **fields}
    return to_example(parse_record(record, name), byte_tokenizer())


def asked(name: str = "a", **fields: Any) -> Example:
    messages = [{"role": "user", "content": CONTEXT}]
    for n in (3, 17):
        messages += [{"role": "user", "content": f"{n} is"}, {"role": "assistant", "content": f"{n * 37 % 101}."}]
    return example(name, messages=messages, **fields)


def run(model: Any, examples: list[Example], *policies: Policy, **options: Any) -> Results:
    candidates = [Candidate(name=f"p{i}", source=f"p{i}.yaml", policy=policy) for i, policy in enumerate(policies)]
    given = {"model_name": "tiny", "sources": ["x"], "speed_tokens": 0, **options}
    return evaluate(model, byte_tokenizer(), spec_of(model), examples, candidates, **given)


@pytest.mark.parametrize("change", ["plain", "shared", "chunked"])
def test_answers_are_what_the_runtime_generates(model: Any, change: str) -> None:
    """A question-aware prompt: the compressed cache goes on as `generate` does."""
    policy = {
        "plain": cut(),
        "shared": Policy(layers=(CUT, LayerPolicy(shares=0))),
        "chunked": cut(prefill_chunk_tokens=64),
    }[change]
    made = example(prompt=CONTEXT, answer="x", scorer="substring", max_new_tokens=20)
    found = Scorer(model, spec_of(model), [made], generate={0: 20}).measure(policy).answers
    with attach(model, policy) as runtime:
        (row,) = generate(runtime, byte_tokenizer(), [made.prompt_ids], max_new_tokens=20)
    assert found == ((row.tokens,),)


def test_answers_follow_the_true_ones_before_them(model: Any) -> None:
    """Each answer of a conversation is what single steps give behind the true text so far."""
    made = asked(scorer="substring")
    (found,) = Scorer(model, spec_of(model), [made], generate={0: 6}).measure(cut()).answers
    assert len(found) == 2
    for (start, _), tokens in zip(made.answers, found, strict=True):
        with attach(model, cut()) as runtime, torch.no_grad():
            cache, n = runtime.new_cache(), len(made.prompt_ids)
            logits = model(torch.tensor([made.prompt_ids]), past_key_values=cache).logits[0, -1]
            expected: list[int] = []
            for i, token in enumerate([*made.continuation_ids[:start], *tokens]):
                if i >= start:
                    expected.append(int(logits.argmax()))
                at = torch.tensor([[n + i]])
                logits = model(torch.tensor([[token]]), position_ids=at, past_key_values=cache).logits[0, -1]
        assert list(tokens) == expected


def test_generating_changes_no_other_score(model: Any) -> None:
    plain, generated_too = run(model, [asked()], cut()), run(model, [asked(scorer="f1")], cut())
    a, b = plain.policy("p0").rows[0], generated_too.policy("p0").rows[0]
    assert (a.kl, a.nll, a.top1, a.kv_bytes) == pytest.approx((b.kl, b.nll, b.top1, b.kv_bytes))
    assert (a.scorer, b.scorer) == ("predicted", "f1")
    assert a.answers == () and len(b.answers) == 2


def test_the_full_cache_is_its_own_measure(model: Any) -> None:
    results = run(model, [asked(scorer="f1"), *generated("continuation", byte_tokenizer(), 600, 1)], full_policy(model))
    for row in (*results.full.rows, *results.policy("p0").rows):
        assert row.kl < 1e-6 and row.top1 == 1.0 and row.nll == pytest.approx(row.full_nll)
        assert row.score == row.full_score and row.kv_bytes == row.planned_bytes == row.full_bytes
    assert results.policy("p0").rows[1].score == 1.0  # its own text, word for word
    assert results.policy("p0").rows[1].task == "continuation"


def test_rows_hold_what_the_policy_plans(model: Any) -> None:
    examples = [asked("a"), example("b", prompt=CONTEXT[:200], answer="7")]
    results = run(model, examples, cut())
    for made, row in zip(examples, results.policy("p0").rows, strict=True):
        held = plan(cut(), spec_of(model), [len(made.prompt_ids)])
        assert (row.kv_bytes, row.planned_bytes, row.full_bytes) == (held.total, held.total, held.full)
        assert (row.id, row.context_tokens, row.tokens) == (made.id, len(made.prompt_ids), len(made.continuation_ids))
    assert results.policy("p0").rows[0].kl > 1e-4


def test_costs_are_of_the_longest_prompt(model: Any) -> None:
    steps: list[tuple[str, int, int]] = []
    examples = [asked("a"), example("b", prompt=CONTEXT[:100], answer="7")]
    results = run(model, examples, cut(), speed_tokens=2, speed_rounds=1, progress=lambda *told: steps.append(told))
    one = results.policy("p0").cost
    assert one is not None and one.context_tokens == len(examples[0].prompt_ids) and one.new_tokens == 2
    assert one.kv_bytes == one.planned_bytes == plan(cut(), spec_of(model), [one.context_tokens]).total
    # While the second layer reads the prompt, the first is already cut.
    assert one.full_bytes // 2 < one.peak_bytes < one.full_bytes + one.kv_bytes
    assert one.tokens_per_second is not None and one.speedup is not None and min(one.tokens_per_second) > 0
    assert [told for told in steps if told[0] == "bytes and speed"][-1][1:] == (8, 8)
    assert steps[0][0] == "prompts"


def test_results_survive_their_file(model: Any, tmp_path: Path) -> None:
    results = run(model, [asked(scorer="f1")], cut(), speed_tokens=1, speed_rounds=1, settings={"samples": 8})
    save_results(results, tmp_path / "r.json")
    assert load_results(tmp_path / "r.json") == results
    assert results.full.name == FULL_CACHE and results.tool["torch"] == torch.__version__


def test_fingerprints_say_what_was_measured(model: Any) -> None:
    first, again = run(model, [asked()], cut()), run(model, [asked()], cut(provenance={"by": "hand"}))
    assert first.data == again.data and first.policy("p0").fingerprint == again.policy("p0").fingerprint
    assert run(model, [asked(scorer="f1")], cut()).data.fingerprint != first.data.fingerprint
    other = run(model, [asked()], cut(prefill_chunk_tokens=64))
    assert other.policy("p0").fingerprint != first.policy("p0").fingerprint


def test_one_scorer_for_all(model: Any) -> None:
    results = run(model, [asked("a"), asked("b", scorer="f1")], cut(), scorer="rouge_l")
    assert [row.scorer for row in results.full.rows] == ["rouge_l", "rouge_l"]
    assert [r.scorer for r in run(model, [asked("b", scorer="f1")], cut(), scorer="predicted").full.rows] == [
        "predicted"
    ]


def test_other_answers_count_too(model: Any) -> None:
    made = example(prompt=CONTEXT, answers=["nowhere", "else"], scorer="substring", max_new_tokens=1)
    (text,) = run(model, [made], cut()).full.rows[0].answers
    right = example(prompt=CONTEXT, answers=["nowhere", text], scorer="substring", max_new_tokens=1)
    assert run(model, [right], cut()).full.rows[0].score == 1.0


def test_an_unknown_scorer_names_the_prompt(model: Any) -> None:
    with pytest.raises(MethodError, match="prompt 'a': unknown scorer 'rouge'; did you mean 'rouge_l'"):
        run(model, [asked(scorer="rouge")], cut())


def test_no_prompts_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="no prompts"):
        run(model, [], cut())


def test_predictions_that_are_no_numbers_are_refused() -> None:
    broken = byte_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeLimitError, match="nan or infinite"):
        run(broken, [asked()], cut())


def test_answers_must_fit_behind_their_prompt() -> None:
    from tests.conftest import tiny_config, tiny_model

    short = tiny_model(tiny_config(vocab_size=259, num_hidden_layers=2, max_position_embeddings=64))
    made = example(prompt="a" * 50, answer="x", scorer="substring", max_new_tokens=20)
    with pytest.raises(DataError, match="prompt 'a': 50 tokens and up to 20 new ones are more than .* context of 64"):
        run(short, [made], cut())
    assert run(short, [replace(made, max_new_tokens=14)], cut()).full.rows[0].score is not None
    fitted = generated("passkey", byte_tokenizer(), 400, 1)
    assert all(length_generated(e) <= 400 for e in fitted)


def test_rows_say_how_much_is_asked(model: Any) -> None:
    results = run(model, [asked(), example("b", prompt=CONTEXT)], cut())
    assert [row.questions for row in results.full.rows] == [2, 0]
