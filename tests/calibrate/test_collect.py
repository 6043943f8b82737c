import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import EXTRA, example, examples, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from kvplan.calibrate import collect as collecting
from kvplan.calibrate.attention_shape import attention_shape, head_cosine, sampled_rows
from kvplan.calibrate.collect import collect
from kvplan.calibrate.residual import decoder_layers
from kvplan.calibrate.statistics import MASS_LEVELS, MOMENT_NAMES, NORM_LEVELS, PREFIX_LEVELS
from kvplan.errors import DataError, ModelError


@pytest.mark.parametrize("family", list(EXTRA))
def test_results_do_not_depend_on_batching_and_padding(family):
    model = tiny(family)
    implementation = model.config._attn_implementation
    prompts = examples(70, 64, 41, 9)
    alone, together = collect(model, prompts, batch_size=1), collect(model, prompts, batch_size=4)
    assert model.config._attn_implementation == implementation
    assert alone.prompt_hashes == together.prompt_hashes
    assert alone.sharing_prompts == together.sharing_prompts == 2
    for a, b in zip(alone.layers, together.layers, strict=True):
        for name in MOMENT_NAMES:
            tolerance = 1e-3 if name.endswith("_tokens") else 1e-5  # a count may flip at a tie
            np.testing.assert_allclose(getattr(a, name).mean, getattr(b, name).mean, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(a.key_sum, b.key_sum, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(a.value_sum, b.value_sum, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", list(EXTRA))
def test_instrumented_forward_is_the_models_own(family):
    """The hidden states behind the statistics are those of the plain model, also with soft caps and learned sinks."""
    reference = tiny(family, "eager")
    model = tiny(family)
    prompt = example("x", 50)
    seen = []
    handle = model.base_model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    collect(model, [prompt])
    handle.remove()
    with torch.no_grad():
        expected = reference.base_model(torch.tensor([prompt.prompt_ids]), use_cache=False).last_hidden_state
    assert torch.allclose(seen[0], expected, atol=2e-4, rtol=1e-3)


# What each family adds to its residual stream, written out by hand: norm of the attention output, if there is one.
BRANCH_NORM = {
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
}


@pytest.mark.parametrize("family", list(EXTRA))
def test_cosine_equals_a_hand_loop(family):
    model = tiny(family)
    prompt = example("x", 30)
    inputs, outputs = {}, {}
    handles = []
    for i, (layer, attention) in enumerate(decoder_layers(model.base_model)):
        handles.append(layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0])))
        branch = getattr(layer, BRANCH_NORM[family]) if family in BRANCH_NORM else attention
        handles.append(
            branch.register_forward_hook(
                lambda _, __, out, i=i: outputs.__setitem__(i, out[0] if isinstance(out, tuple) else out)
            )
        )
    statistics = collect(model, [prompt])
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(statistics.layers):
        before, after = inputs[i], inputs[i] + outputs[i]
        expected = F.cosine_similarity(before[0], after[0], dim=-1).mean().item()
        assert float(layer.cosine.mean) == pytest.approx(expected, abs=1e-6)
    assert 0.0 < float(statistics.layers[0].cosine.mean) < 0.999


def test_cosine_of_llama_from_hidden_states():
    model = tiny("llama")
    prompt = example("x", 30)
    branches = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _, __, out: branches.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        hidden = model(torch.tensor([prompt.prompt_ids]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    statistics = collect(model, [prompt])
    for i, layer in enumerate(statistics.layers):
        expected = F.cosine_similarity(hidden[i], hidden[i] + branches[i], dim=-1).mean().item()
        assert float(layer.cosine.mean) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_attention_shape_equals_dense_eager_attention(family):
    model, reference = tiny(family), tiny(family, "eager")
    prompt = example("x", 40)
    n, sinks, recent = 40, 3, 8
    assert sorted(sampled_rows(n)) == list(range(n))
    statistics = collect(model, [prompt], sinks=sinks, recent=recent)
    with torch.no_grad():
        dense = reference(torch.tensor([prompt.prompt_ids]), output_attentions=True, use_cache=False).attentions
    for layer, attention in zip(statistics.layers, dense, strict=True):
        probs = attention[0].double()  # [Hq, n, n]
        Hkv = layer.sink_mass.sum.shape[0]
        grouped = probs.view(Hkv, -1, n, n)
        mean = grouped.mean(1)
        band = torch.tensor([[i - recent < j <= i for j in range(n)] for i in range(n)])
        expected = {
            "sink_mass": mean[..., :sinks].sum(-1).mean(-1),
            "recent_mass": (mean * band).sum(-1).mean(-1),
            "entropy": -(mean * mean.clamp_min(1e-30).log()).sum(-1).mean(-1),
        }
        G = grouped.shape[1]
        unit = grouped / grouped.norm(dim=-1, keepdim=True)
        pairs = [(unit[:, a] * unit[:, b]).sum(-1) for a in range(G) for b in range(a)]
        expected["head_agreement"] = torch.stack(pairs).mean((0, 2)) if pairs else torch.ones(Hkv)
        rows = [n - 1 - r for r in range(0, 32, 4)]
        counts = [
            [[sum(np.cumsum(np.sort(row)[::-1]) < level) + 1 for row in mean[h, rows].numpy()] for level in MASS_LEVELS]
            for h in range(Hkv)
        ]
        expected["effective_tokens"] = torch.tensor(np.mean(counts, -1))
        norms = mean[:, rows].sort(-1, descending=True).values.square().cumsum(-1).sqrt().mean(0)  # [R', n]
        expected["norm_tokens"] = torch.stack([
            (norms < level * norms[:, -1:]).sum(-1).add(1).double().mean() for level in NORM_LEVELS
        ])  # fmt: skip
        received = probs.mean(0).sum(0)  # every query is sampled
        received = (received / received.sum()).sort(descending=True).values.cumsum(0)
        expected["prefix_tokens"] = torch.stack([(received < level).sum() + 1.0 for level in PREFIX_LEVELS])
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(layer, name).mean, value, atol=2e-5, err_msg=name)


def test_query_heads_that_agree_have_cosine_one():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 12, 8).expand(1, 3, 12, 8)
    key = torch.randn(1, 1, 12, 8)
    rows = torch.tensor([sampled_rows(12)])
    shape = attention_shape(q, key, None, rows, torch.full((1, 12), 1 / 12), torch.ones(1, 12).bool(), scaling=1.0)
    assert shape["head_agreement"].item() == pytest.approx(1.0, abs=1e-6)
    assert shape["sink_mass"].item() + shape["recent_mass"].item() >= 1.0  # 12 tokens are all recent


def test_spread_queries_stand_for_all_the_others():
    n = 1000
    torch.manual_seed(0)
    q, key = torch.zeros(1, 1, n, 8), torch.zeros(1, 1, n, 8)
    rows = torch.tensor([sampled_rows(n)])
    weights = torch.full(rows.shape, 1 / rows.shape[1])
    shape = attention_shape(q, key, None, rows, weights, torch.ones(1, n).bool(), scaling=1.0)
    # Even attention of all queries: token j receives the sum of 1 / (i + 1) over i >= j.
    received = np.cumsum((1 / np.arange(1, n + 1))[::-1])[::-1] / n
    exact = np.searchsorted(np.cumsum(received), PREFIX_LEVELS) + 1
    np.testing.assert_allclose(shape["prefix_tokens"][0], exact, atol=n / 16)


def test_a_head_that_looks_at_itself_changes_nothing_and_an_even_one_much():
    torch.manual_seed(0)
    value = torch.randn(1, 2, 400, 64)
    counted = torch.ones(1, 400, dtype=torch.bool)
    itself = value.repeat_interleave(2, 1).transpose(1, 2)
    np.testing.assert_allclose(head_cosine(value, itself, counted), 1.0, atol=1e-5)
    even = (value.cumsum(2) / torch.arange(1, 401)[:, None]).repeat_interleave(2, 1).transpose(1, 2)
    behind = torch.arange(400)[None] >= 200
    assert head_cosine(value, even, behind).abs().max() < 0.1


@pytest.mark.parametrize("n", [1, 5, 32, 33, 47, 48, 49, 1000])
def test_sampled_rows_are_distinct_and_few(n):
    rows = sampled_rows(n)
    assert len(rows) == len(set(rows)) == min(n, 48)
    assert rows[0] == n - 1 and min(rows) == 0


def test_model_is_restored_after_a_failure(monkeypatch):
    model = tiny("llama").train()
    monkeypatch.setattr(collecting, "attention_shape", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(model, examples(10))
    assert model.config._attn_implementation == "sdpa" and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_unusable_input_is_named():
    model = tiny("llama")
    with pytest.raises(DataError, match="no prompts"):
        collect(model, [])
    with pytest.raises(DataError, match="example 7: the prompt is empty"):
        collect(model, [example(7, 0)])
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"layer 1.*not finite"):
        collect(model, examples(12))


def test_model_without_the_attention_interface_is_refused():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError):
        collect(AutoModelForCausalLM.from_config(config), examples(12))
