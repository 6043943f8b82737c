import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from kvplan import loading
from kvplan.errors import ModelError
from kvplan.loading import check_tokens, load_model
from tests.conftest import tiny_config, tiny_model


@pytest.fixture
def saved(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def save_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(name: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_model_comes_back_with_its_spec(saved: Path, tiny_llama: Any) -> None:
    model, tokenizer, spec = load_model(saved)
    assert (spec.num_layers, spec.query_heads, spec.layers[0].kv_heads, spec.layers[0].key_dim) == (4, 4, 2, 8)
    assert (spec.dtype, spec.model_type, spec.max_context_tokens) == ("float32", "llama", 4096)
    assert spec.fingerprint is not None and spec.fingerprint.startswith("sha256:")
    assert not model.training
    assert tokenizer.padding_side == "left"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits)


def test_dtype_changes_the_spec_but_not_the_fingerprint(saved: Path) -> None:
    specs = [load_model(saved, dtype=dtype)[2] for dtype in ("auto", "bfloat16")]
    assert [spec.dtype for spec in specs] == ["float32", "bfloat16"]
    assert specs[0].fingerprint == specs[1].fingerprint


def test_a_missing_pad_token_becomes_the_end_token(saved: Path, tiny_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    bare.save_pretrained(saved)
    assert load_model(saved)[1].pad_token == "</s>"


@pytest.mark.parametrize("config_class", [GemmaConfig, MistralConfig, Qwen3Config])
def test_other_families_load(tmp_path: Path, tiny_tokenizer: Any, config_class: type) -> None:
    tiny_model(tiny_config(config_class)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path)[2].num_layers == 4


def test_gpt_neox_is_not_taken_for_an_encoder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tiny_model(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path)[2].layers[0].kv_heads == 4


def test_the_bundled_model_is_the_default(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED_FOLDER", saved)
    assert load_model()[2] == load_model("bundled")[2]


def test_a_missing_bundle_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED_FOLDER", tmp_path)
    assert "bundled model is missing" in refusal(None)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "../nowhere/model", "a/b/c"])
def test_a_missing_path_never_asks_the_hub(name: str) -> None:
    assert refusal(name) == f"{name}: no such folder"


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the Hugging Face hub cannot be reached" in refusal("no-such-group/no-such-model")


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    assert "not a model folder (no config.json in it)" in refusal(tmp_path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    assert "a file, not a model folder" in refusal(tmp_path / "model.bin")


def test_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(tmp_path)


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "cannot be loaded" in refusal(tmp_path)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.save_pretrained(tmp_path)
    assert "no usable tokenizer" in refusal(tmp_path)


def test_weights_must_be_safetensors(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(saved)


def test_truncated_weights_are_one_line(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(saved)


def test_weights_of_another_shape_are_one_line(saved: Path) -> None:
    save_config(saved, tiny_config(intermediate_size=48))
    told = "12 weights have another shape than the config says, the first is model.layers.0.mlp.down_proj.weight: "
    assert told in refusal(saved)


def test_missing_weights_are_named(saved: Path) -> None:
    save_config(saved, tiny_config(num_hidden_layers=5))
    assert "weights are not in the checkpoint, the first is model.layers.4." in refusal(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(saved: Path, bad: float) -> None:
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight.data[0, :3] = bad
    model.save_pretrained(saved)
    assert "model.layers.2.mlp.up_proj.weight holds 3 values that are nan or infinite" in refusal(saved)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    save_config(tmp_path, T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2))
    assert "t5 is an encoder-decoder" in refusal(tmp_path)


def test_bloom_is_refused_by_name_before_its_weights_are_read(tmp_path: Path) -> None:
    save_config(tmp_path, BloomConfig(hidden_size=32, n_layer=2, n_head=4))
    assert refusal(tmp_path).startswith("bloom does not use transformers' attention interface")


def test_latent_attention_is_refused_by_name(tmp_path: Path) -> None:
    save_config(tmp_path, DeepseekV3Config())
    assert refusal(tmp_path).startswith("deepseek_v3 caches a compressed latent (MLA)")


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    save_config(tmp_path, MambaConfig(hidden_size=32, num_hidden_layers=2))
    assert refusal(tmp_path).startswith("mamba: ")


def test_an_encoder_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert "bert is an encoder" in refusal(tmp_path)


def test_a_model_that_attends_over_other_values_than_it_caches_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_model(tiny_config(DiffLlamaConfig)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert refusal(tmp_path).startswith("diffllama: layer 0 attends over other values than it caches")


def test_an_unknown_dtype_names_the_closest_one(saved: Path) -> None:
    assert "did you mean 'float16'?" in refusal(saved, dtype="floa16")


def test_an_unknown_device_is_refused(saved: Path) -> None:
    assert "'gpu' is not a device" in refusal(saved, device="gpu")


def test_a_missing_cuda_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refusal(saved, device="cuda")


def test_a_cuda_index_out_of_range_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "the last CUDA device here is cuda:1" in refusal(saved, device="cuda:2")


def test_loading_is_silent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(saved)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("verbose", [False, True])
def test_retries_of_a_download_are_told_with_verbose_alone(
    verbose: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = logging.getLogger("huggingface_hub.utils._http")
    before, wanted = hub.getEffectiveLevel(), logging.INFO if verbose else logging.WARNING

    def retried(*args: object) -> None:
        hub.warning("Retrying in 8s")
        raise OSError("gone")

    monkeypatch.setattr(loading, "_load_config", retried)
    hub.addHandler(caplog.handler)
    try:
        with caplog.at_level(wanted, "kvplan"):
            refusal("no-such-group/no-such-model")
    finally:
        hub.removeHandler(caplog.handler)
    assert ("Retrying" in caplog.text) == verbose
    assert hub.getEffectiveLevel() == before


def test_a_config_that_cannot_run_is_one_line(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_model(tiny_config(MixtralConfig, num_local_experts=2)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    change_config(tmp_path, num_experts_per_tok=3)
    assert "mixtral: fails on its first tokens (RuntimeError: " in refusal(tmp_path)


def test_a_missing_shard_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in refusal(saved)


def test_float16_rounding_does_not_change_the_fingerprint(saved: Path) -> None:
    assert load_model(saved, dtype="float16")[2].fingerprint == load_model(saved)[2].fingerprint


def test_a_token_without_embedding_is_refused(tiny_llama: Any) -> None:
    check_tokens(tiny_llama, [0, 127], "a.jsonl:1")
    with pytest.raises(ModelError, match="a.jsonl:1: holds token 128, but the model has 128 embeddings"):
        check_tokens(tiny_llama, [5, 128], "a.jsonl:1")
