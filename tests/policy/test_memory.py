import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplan.errors import PolicyError
from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.h2o import H2O
from kvplan.methods.evictors.tova import TOVA
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.memory import LayerBytes, allocated_slots, grown_tokens, plan, stated_spec
from kvplan.policy.schema import LayerPolicy, Policy, Slots

LAYER = LayerSpec(kv_heads=2, key_dim=32, value_dim=16)


def spec_of(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec(layers=layers, query_heads=4, dtype="bfloat16")


@pytest.mark.parametrize(
    ("layer", "spec", "prompt", "appended", "slots"),
    [
        (LayerPolicy(), LAYER, 100, 0, 100),
        (LayerPolicy(), LAYER, 100, 1, 101),
        (LayerPolicy(), LAYER, 100, 5, 108),
        (LayerPolicy(), LAYER, 100, 64, 164),
        (LayerPolicy(), LAYER, 100, 65, 180),
        (LayerPolicy(slots=Slots(80)), LAYER, 100, 0, 80),
        (LayerPolicy(slots=Slots(120)), LAYER, 100, 0, 100),
        (LayerPolicy(slots=Slots(120)), LAYER, 100, 1, 101),
        (LayerPolicy(slots=Slots(share=2500)), LAYER, 1003, 500, 250),
        (LayerPolicy(slots=Slots(share=2500)), LAYER, 100, 0, 64),
        (LayerPolicy(slots=Slots(share=2500)), LAYER, 10, 0, 10),
        (LayerPolicy(slots=Slots(share=2500)), LAYER, 10, 1, 11),
        (LayerPolicy(), LayerSpec(2, 32, 16, window=96), 100, 5, 96),
        (LayerPolicy(), LayerSpec(2, 32, 16, window=96), 20, 5, 28),
        (LayerPolicy(shares=0), LAYER, 100, 5, 0),
    ],
)
def test_allocated_slots(layer, spec, prompt, appended, slots):
    assert allocated_slots(layer, spec, prompt, appended) == slots


@given(st.integers(1, 5000), st.integers(0, 500), st.integers(1, 10_000))
def test_slots_never_shrink_nor_pass_the_capacity(prompt, appended, share):
    layer = LayerPolicy(slots=Slots(share=share))
    now, later = (allocated_slots(layer, LAYER, prompt, n) for n in (appended, appended + 1))
    assert now <= later <= layer.capacity(prompt)
    assert now >= min(prompt + appended, layer.capacity(prompt))
    assert now <= prompt + grown_tokens(prompt, appended)


def test_bytes_by_hand_over_a_ragged_batch():
    layers = (LayerPolicy(), LayerPolicy(slots=Slots(50), evictor=H2O()), LayerPolicy(shares=0))
    held = plan(Policy(layers=layers), spec_of(LAYER, LAYER, LAYER), [100, 30], 3)
    assert held.slots == (104 + 34, 50 + 34, 0)
    assert held.layers[0] == LayerBytes(keys=138 * 2 * 32 * 2, values=138 * 2 * 16 * 2)
    assert held.layers[1] == LayerBytes(keys=84 * 128, values=84 * 64, positions=84 * 2 * 4, scores=84 * 2 * 4)
    assert held.layers[2].total == 0
    assert held.total == held.by_kind.total == sum(layer.total for layer in held.layers)
    assert held.full == 3 * 192 * (103 + 33)
    assert held.ratio == held.total / held.full


@pytest.mark.parametrize("name", evictors.names())
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_side_bytes_are_the_ones_that_the_evictor_declares(name, kv_heads):
    evictor = evictors[name]()
    policy = Policy(layers=(LayerPolicy(slots=Slots(64), evictor=evictor),))
    (held,) = plan(policy, spec_of(LayerSpec(kv_heads, 32, 32)), [100]).layers
    assert held.positions + held.scores == 64 * evictor.side_bytes_per_slot(kv_heads)


def test_a_full_or_windowed_layer_keeps_no_side_arrays():
    policy = Policy(layers=(LayerPolicy(evictor=TOVA()),) * 2)
    held = plan(policy, spec_of(LAYER, LayerSpec(2, 32, 16, window=8)), [100])
    assert held.by_kind.positions == held.by_kind.scores == 0
    assert held.total == held.full
    assert held.ratio == 1


def test_min_slots_that_bind_are_listed():
    share = LayerPolicy(slots=Slots(share=1000))
    policy = Policy(layers=(LayerPolicy(), share, LayerPolicy(shares=1), LayerPolicy(slots=Slots(64))))
    spec = spec_of(*(LAYER,) * 4)
    assert plan(policy, spec, [1000, 600]).min_slots_binds == (1,)
    assert plan(policy, spec, [1000, 640]).min_slots_binds == ()


def test_the_model_block_gives_a_spec():
    policy = Policy(layers=(LayerPolicy(),) * 2, model={"layers": 2, "kv_heads": 2, "head_dim": 32, "dtype": "float16"})
    assert stated_spec(policy).layers == (LayerSpec(2, 32, 32),) * 2
    with pytest.raises(PolicyError, match="lacks layers, kv_heads, head_dim, dtype"):
        stated_spec(Policy(layers=(LayerPolicy(),)))
    with pytest.raises(PolicyError, match=r"model.kv_heads differs between layers"):
        stated_spec(Policy(layers=policy.layers, model={**policy.model, "kv_heads": [2, 4]}))


def test_layers_must_match():
    with pytest.raises(PolicyError, match="the policy has 1 layers, the model 2"):
        plan(Policy(layers=(LayerPolicy(),)), spec_of(LAYER, LAYER), [10])


def test_a_model_with_windows_gives_the_spec_back():
    window = LayerSpec(2, 32, 32, window=96)
    spec = spec_of(window, LayerSpec(2, 32, 32), window, window)
    block = spec.policy_block()
    assert (block["window"], block["window_layers"]) == (96, "0,2-3")
    policy = Policy(layers=(LayerPolicy(),) * 4, model=block)
    assert stated_spec(policy).layers == spec.layers
    assert plan(policy, stated_spec(policy), [500], 3) == plan(policy, spec, [500], 3)


def test_windows_that_differ_are_not_guessed():
    block = spec_of(LayerSpec(2, 32, 32, window=96), LayerSpec(2, 32, 32, window=64)).policy_block()
    assert (block["window"], block["window_layers"]) == ([64, 96], "0-1")
    with pytest.raises(PolicyError, match=r"model.window differs between layers \(\[64, 96\]\)"):
        stated_spec(Policy(layers=(LayerPolicy(),) * 2, model=block))
