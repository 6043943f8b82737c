import dataclasses

import pytest

from kvplan.calibrate.examples import Example
from kvplan.calibrate.precision import CODECS, MEASURED, Precision, storable
from kvplan.calibrate.sensitivity import EVICTORS, SHARES, measure, num_replays, stratified
from kvplan.errors import MethodError, ProfileError
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.stats import PromptScores

SPEC = ModelSpec((LayerSpec(2, 8, 8), LayerSpec(2, 8, 8, window=16), LayerSpec(2, 8, 8)), 4, "float32", fingerprint="f")


def scores(kl):
    return PromptScores(tuple(kl), (1.0,) * len(kl), (1.0,) * len(kl), (1.0,) * len(kl))


def test_one_layer_alone_is_cut_and_windows_are_left_whole():
    seen = []

    def score(policy, prompts):
        cut = [i for i, layer in enumerate(policy.layers) if not layer.slots.is_full]
        assert len(cut) == 1 and cut != [1] and prompts == [0, 1, 2]
        layer = policy.layers[cut[0]]
        assert (layer.min_slots, layer.sink_tokens, layer.recent_tokens) == (24, 4, 16)
        seen.append((layer.evictor.name, layer.slots.share, cut[0]))
        return scores([cut[0] + layer.slots.share * n / 1e4 for n in prompts])

    steps = []
    sums = measure(score, SPEC, 3, precisions=(), progress=lambda done, total: steps.append((done, total)))
    assert seen == [(e, s, i) for e in EVICTORS for s in SHARES for i in (0, 2)]
    assert steps[-1] == (42, 42) and len(steps) == 42
    moments = sums.moments["h2o"][2500]
    assert moments.count == 3
    assert moments.mean == pytest.approx([0.25, 0.0, 2.25])
    assert moments.std == pytest.approx([0.25, 0.0, 0.25])


def test_keys_and_values_of_one_layer_alone_are_encoded_by_the_codecs_that_can_store_its_heads():
    def score(policy, prompts):
        stored = [i for i, layer in enumerate(policy.layers) if layer.key_codec.name != "dense"]
        values = [i for i, layer in enumerate(policy.layers) if layer.value_codec.name != "dense"]
        if not stored + values:
            return scores([0.0, 0.0])
        (layer,) = stored + values
        assert all(other.slots.is_full for other in policy.layers) and layer != 1
        return scores([layer + 0.1, layer + 0.3] if stored else [layer, layer])

    sums = measure(score, SPEC, 2, evictors=("streaming",), shares=(1000,))
    assert list(sums.codecs) == [*(f"{label}/dense" for label in CODECS), *(f"dense/{label}" for label in CODECS)]
    assert sums.codecs["int8/dense"].mean == pytest.approx([0.2, 0.0, 2.2])
    assert sums.codecs["dense/int8"].mean == pytest.approx([0.0, 0.0, 2.0])
    assert num_replays(SPEC) == (len(EVICTORS) * len(SHARES) + len(MEASURED)) * 2


def test_a_codec_must_fit_the_heads_and_save_bytes():
    def usable(dim):
        spec = ModelSpec((LayerSpec(1, dim, dim),), 1, "bfloat16")
        return [label for label in CODECS if storable(Precision(label, label), spec)]

    # 3 bits pack 8 channels at a time, 2 bits 4; two float16 numbers beside 4 bytes are no gain.
    assert usable(6) == ["int8", "turboquant4"]
    assert usable(4) == ["turboquant4", "turboquant2"]
    wide_values = ModelSpec((LayerSpec(1, 6, 8),), 1, "bfloat16")
    assert storable(Precision("dense", "turboquant3"), wide_values)
    assert not storable(Precision("turboquant3", "dense"), wide_values)


@pytest.mark.parametrize("text", ["int8", "int8/turboquant2", "dense/int8", "dense"])
def test_precisions_are_read_as_they_are_written(text):
    assert str(Precision.parse(text)) == text


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ProfileError, match="at least one prompt"):
        measure(lambda p, i: scores([0.0]), SPEC, 0)
    with pytest.raises(ProfileError, match="layer 0 cut by snapkv: KL is not finite"):
        measure(lambda p, i: scores([float("nan")]), SPEC, 1)
    with pytest.raises(ProfileError, match="0 basis points"):
        measure(lambda p, i: scores([0.0]), SPEC, 1, shares=(0,))
    with pytest.raises(MethodError, match="did you mean 'snapkv'"):
        measure(lambda p, i: scores([0.0]), SPEC, 1, evictors=("snapvk",))


def test_stratified_takes_tasks_in_turn_and_needs_continuations():
    base = Example(
        id="0",
        task="a",
        prompt_ids=(1,),
        continuation_ids=(2,),
        answers=(),
        question_aware=False,
        text="",
        max_new_tokens=None,
    )
    examples = [dataclasses.replace(base, task=t) for t in "aaaabbc"]
    examples[0] = dataclasses.replace(base, continuation_ids=())
    assert stratified(examples, 4) == [1, 2, 4, 6]
    assert stratified(examples, 100) == [1, 2, 3, 4, 5, 6]
