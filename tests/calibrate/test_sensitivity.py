import dataclasses

import pytest

from kvplan.calibrate.prompts import Example
from kvplan.calibrate.sensitivity import CODECS, EVICTORS, SHARES, measure, num_replays, stores, stratified
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
    sums = measure(score, SPEC, 3, codecs={}, progress=lambda done, total: steps.append((done, total)))
    assert seen == [(e, s, i) for e in EVICTORS for s in SHARES for i in (0, 2)]
    assert steps[-1] == (30, 30) and len(steps) == 30
    moments = sums.moments["h2o"][2500]
    assert moments.count == 3
    assert moments.mean == pytest.approx([0.25, 0.0, 2.25])
    assert moments.std == pytest.approx([0.25, 0.0, 0.25])


def test_one_layer_alone_is_encoded_by_the_codecs_that_can_store_its_heads():
    def score(policy, prompts):
        stored = [(i, layer.key_codec) for i, layer in enumerate(policy.layers) if layer.key_codec.name != "dense"]
        if not stored:
            return scores([0.0, 0.0])
        ((layer, codec),) = stored
        assert all(other.slots.is_full for other in policy.layers) and layer != 1
        assert policy.layers[layer].value_codec == codec
        return scores([layer + 0.1, layer + 0.3])

    sums = measure(score, SPEC, 2, evictors=("streaming",), shares=(1000,))
    assert list(sums.codecs) == list(CODECS)
    assert sums.codecs["int8"].mean == pytest.approx([0.2, 0.0, 2.2])
    assert num_replays(SPEC) == (len(EVICTORS) * len(SHARES) + len(CODECS)) * 2
    # 3 bits pack 8 channels at a time, 2 bits 4; two float16 numbers beside 4 bytes are no gain.
    six, four = (ModelSpec((LayerSpec(1, dim, dim),), 1, "bfloat16") for dim in (6, 4))
    assert [label for label in CODECS if stores(CODECS[label], six)] == ["int8", "turboquant4"]
    assert [label for label in CODECS if stores(CODECS[label], four)] == ["turboquant4", "turboquant2"]


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
