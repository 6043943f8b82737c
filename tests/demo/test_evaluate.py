import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvplan.demo.evaluate import RECENT_TOKENS, SINK_TOKENS, Eviction, documents, evaluate, markdown, outcomes, tables
from kvplan.demo.prompts import TASKS
from kvplan.demo.tokenizer import build_tokenizer
from kvplan.demo.world import vocabulary


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary()), num_hidden_layers=2, **sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_each_head_keeps_its_own_random_share():
    eviction = Eviction(0.25, context_tokens=torch.tensor([100, 60]))
    kept = eviction.kept(0, 2, 110)
    assert kept.shape == (2, 2, 110)
    assert kept[0, :, :100].sum(-1).tolist() == [25, 25]
    assert kept[1, :, :60].sum(-1).tolist() == [SINK_TOKENS + RECENT_TOKENS] * 2
    assert kept[0, :, :SINK_TOKENS].all() and kept[0, :, 100 - RECENT_TOKENS :].all()
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert torch.equal(kept, eviction.kept(0, 2, 110))
    assert not torch.equal(kept, eviction.kept(1, 2, 110))


def test_other_layers_keep_everything():
    eviction = Eviction(0.1, frozenset({1}), context_tokens=torch.tensor([100]))
    assert eviction.kept(0, 2, 110).all()
    assert not eviction.kept(1, 2, 110).all()


def test_keeping_everything_changes_nothing(model, tokenizer):
    examples = documents(tokenizer, "facts", 3, 300)
    for full, kept in zip(outcomes(model, examples), outcomes(model, examples, Eviction(1.0)), strict=True):
        torch.testing.assert_close(kept.log_probs, full.log_probs)
    assert model.config._attn_implementation == "sdpa"


def test_padding_changes_nothing(model, tokenizer):
    examples = documents(tokenizer, "song", 2, 120) + documents(tokenizer, "facts", 1, 300)
    together = outcomes(model, examples, Eviction(0.25, frozenset()))
    for example, batched in zip(examples, together, strict=True):
        (alone,) = outcomes(model, [example])
        torch.testing.assert_close(batched.log_probs, alone.log_probs)


def test_evicting_changes_something(model, tokenizer):
    examples = documents(tokenizer, "facts", 1, 300)
    (full,), (cut,) = outcomes(model, examples), outcomes(model, examples, Eviction(0.25))
    assert (full.log_probs - cut.log_probs).abs().max() > 1e-4


def test_every_task_and_layer_is_reported(model, tokenizer):
    result = evaluate(model, tokenizer, 1, (300,))
    assert [s.task for s in result.full] == [s.task for s in result.random_keep] == list(TASKS)
    assert [layer for layer, _, _ in result.one_layer] == [0, 1]
    assert all(0 <= s.value <= 1 for s in result.full if s.task != "story")
    assert len(tables(result)) == 3
    assert markdown(result).count("| mixed |") == 2
