from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplan.calibrate.collect import collect
from kvplan.calibrate.examples import Example
from kvplan.check.scoring import Scorer
from kvplan.errors import ModelError, RuntimeLimitError
from kvplan.model_spec import ModelSpec
from kvplan.placement import input_device, layer_devices, spread
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach
from tests.conftest import tiny_model

accelerate = pytest.importorskip("accelerate", reason="no accelerate: pip install 'kvplan[split]'")
EXAMPLES = [
    Example(str(i), "t", tuple(4 + (i * j) % 90 for j in range(1, 40 + i)), (5, 6, 7 + i), ((0, 2),), False, "", None)
    for i in range(3)
]


def offloaded(tmp_path: Path) -> Any:
    """Weights of two layers and of the embeddings on disk or apart in memory, fetched for each forward."""
    placed = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    placed |= {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(
        tiny_model(), placed, offload_dir=str(tmp_path), main_device="cpu", skip_keys="past_key_values"
    )


@pytest.mark.filterwarnings("ignore:.*offloaded:UserWarning")
def test_a_split_model_gives_the_scores_of_a_whole_one(tmp_path: Path) -> None:
    whole, split = tiny_model(), offloaded(tmp_path)
    assert split.model.embed_tokens.weight.is_meta and split.model.layers[1].mlp.up_proj.weight.is_meta
    assert input_device(split) == torch.device("cpu")
    spec = ModelSpec.from_config(whole.config, "float32")
    cut = LayerPolicy(slots=Slots(tokens=12), sink_tokens=2, recent_tokens=4)
    for layers in ((cut,) * 4, (cut, cut, LayerPolicy(shares=1), cut)):
        policy = Policy(layers=layers)
        assert Scorer(split, spec, EXAMPLES).measure(policy) == Scorer(whole, spec, EXAMPLES).measure(policy)
    measured, expected = collect(split, EXAMPLES), collect(whole, EXAMPLES)
    for one, other in zip(measured.layers, expected.layers, strict=True):
        assert (one.cosine.sum == other.cosine.sum).all() and (one.entropy.sum == other.entropy.sum).all()


def test_without_a_gpu_auto_is_the_memory() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = spread(tiny_model())
    assert input_device(model) == torch.device("cpu") and set(layer_devices(model).values()) == {"cpu"}


def test_layers_on_two_devices_do_not_share_a_cache() -> None:
    model = tiny_model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1}
    model.hf_device_map |= {"model.layers.3": "cpu", "lm_head": 1}
    assert layer_devices(model) == {0: "0", 1: "0", 2: "1", 3: "0"}
    cut = LayerPolicy()
    policy = Policy(layers=(cut, cut, LayerPolicy(shares=1), cut))
    told = "layer 2 shares the cache of layer 1, but they are on the devices 1 and 0; search with --without sharing"
    with pytest.raises(RuntimeLimitError, match=told), attach(model, policy):
        pass


def test_accelerate_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match=r"device 'auto' needs accelerate: pip install 'kvplan\[split\]'"):
        spread(tiny_model())


def test_what_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "infer_auto_device_map", lambda model, **options: {"": "disk"})
    with pytest.raises(ModelError, match="does not fit the GPUs and the memory of this machine"):
        spread(tiny_model())


def test_embeddings_without_a_hook_tell_their_own_device() -> None:
    embeddings = torch.nn.Embedding(3, 2)
    assert input_device(SimpleNamespace(get_input_embeddings=lambda: embeddings)) == torch.device("cpu")
