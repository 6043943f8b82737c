from __future__ import annotations

import pytest

from kvplan.calibrate.facts import LayerFacts
from kvplan.calibrate.precision import CODECS
from kvplan.check.baselines import Baseline
from kvplan.errors import MethodError, ProfileError, TargetError
from kvplan.methods.evictors import evictors
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import Target
from kvplan.search.allocators import allocators

SPEC = ModelSpec(layers=(LayerSpec(2, 32, 32),) * 6, query_heads=4, dtype="bfloat16")
FACTS = [
    LayerFacts(
        importance=x,
        head_change=x,
        mass_curve=((0.5, x / 4), (0.9, x)),
        prefix_curve=((0.5, x / 4), (0.9, x)),
        norm_curve=((0.5, x / 4), (0.9, x)),
    )
    for x in (0.1, 0.9, 0.8, 0.2, 0.7, 0.6)
]
CONTEXT = 1000
BUDGETED = [name for name in evictors if evictors[name]().forgets_after is None]


@pytest.mark.parametrize("allocator", allocators.names())
@pytest.mark.parametrize("evictor", BUDGETED)
def test_every_baseline_holds_its_share_of_the_bytes(allocator: str, evictor: str) -> None:
    policy = Baseline.parse(f"{allocator}:{evictor}@40%").policy(SPEC, CONTEXT, FACTS)
    assert 0.38 < plan(policy, SPEC, [CONTEXT]).ratio <= 0.4
    assert policy.target == Target(share=4000)
    assert all(layer.evictor.name == evictor for layer in policy.layers if not layer.slots.is_full)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_codec_buys_more_slots_for_the_same_bytes(codec: str) -> None:
    plain = Baseline.parse("uniform:streaming@15%").policy(SPEC, CONTEXT)
    packed = Baseline.parse(f"uniform:streaming+{codec}@15%").policy(SPEC, CONTEXT)
    held = plan(packed, SPEC, [CONTEXT])
    assert held.ratio <= 0.15 and sum(held.slots) > 1.5 * sum(plan(plain, SPEC, [CONTEXT]).slots)
    assert all(layer.key_codec == layer.value_codec == CODECS[codec] for layer in packed.layers)


def test_keys_and_values_may_have_codecs_of_their_own() -> None:
    made = Baseline.parse("uniform:snapkv+int8/turboquant2@20%")
    policy = made.policy(SPEC, CONTEXT)
    assert made.name == "uniform:snapkv+int8/turboquant2@20%" and plan(policy, SPEC, [CONTEXT]).ratio <= 0.2
    assert {(layer.key_codec, layer.value_codec) for layer in policy.layers} == {
        (CODECS["int8"], CODECS["turboquant2"])
    }


def test_a_codec_that_fits_whole_holds_less_than_the_share() -> None:
    policy = Baseline.parse("uniform:streaming+turboquant2@50%").policy(SPEC, CONTEXT)
    assert all(layer.slots.is_full for layer in policy.layers)
    assert plan(policy, SPEC, [CONTEXT]).ratio < 0.2


def test_squeeze_gives_the_least_important_layers_less_and_needs_a_profile() -> None:
    made = Baseline.parse("squeeze:snapkv@40%")
    shares = [layer.slots.share or 0 for layer in made.policy(SPEC, CONTEXT, FACTS).layers]
    assert max(shares[0], shares[3]) < min(shares[1], shares[2], shares[4], shares[5])
    with pytest.raises(ProfileError, match="squeeze splits by the layers' importance; give the --profile"):
        made.policy(SPEC, CONTEXT)


def test_a_profile_of_an_earlier_build_may_lack_what_an_allocator_splits_by() -> None:
    early = [LayerFacts(importance=facts.importance) for facts in FACTS]
    with pytest.raises(
        ProfileError, match="'dbudget:snapkv@40%': the profile lacks what dbudget splits by; .*calibrate"
    ):
        Baseline.parse("dbudget:snapkv@40%").policy(SPEC, CONTEXT, early)


def test_a_name_is_written_in_one_way() -> None:
    assert (
        Baseline.parse("uniform:snapkv@0.4").name == Baseline.parse(" uniform:snapkv@40% ").name == "uniform:snapkv@40%"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("snapkv@40%", "'snapkv@40%' is not a baseline; write ALLOCATOR:EVICTOR@SHARE"),
        ("uniform:snapkv", "is not a baseline"),
        ("unifrm:snapkv@40%", "unknown allocator 'unifrm'; did you mean 'uniform'"),
        ("uniform:snapvk@40%", "unknown evictor 'snapvk'; did you mean 'snapkv'"),
        ("uniform:corm@40%", "corm holds what it likes"),
        (
            "uniform:snapkv+int4@40%",
            "unknown codec 'int4'; choose among: dense, int8, .*; other codecs need a policy file",
        ),
    ],
)
def test_a_wrong_spelling_is_explained(text: str, told: str) -> None:
    with pytest.raises(MethodError, match=told):
        Baseline.parse(text)


@pytest.mark.parametrize("share", ["0%", "140%", "much"])
def test_a_wrong_share_is_explained(share: str) -> None:
    with pytest.raises(TargetError, match="is not a share"):
        Baseline.parse(f"uniform:snapkv@{share}")


def test_a_share_below_the_least_slots_is_explained() -> None:
    with pytest.raises(
        TargetError, match=r"baseline 'uniform:snapkv@1%': 64 slots in each of 6 layers are more than 1%"
    ):
        Baseline.parse("uniform:snapkv@1%").policy(SPEC, CONTEXT)
