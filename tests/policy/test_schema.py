import json
from importlib import resources

import jsonschema
import pytest

from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.policy.json_schema import json_schema
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots, Target
from kvplan.policy.serialize import SCHEMA_FILE, dump_policy
from kvplan.policy.yaml_text import read

VALIDATOR = jsonschema.Draft7Validator(json_schema())
MODEL = {"type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16", "fingerprint": "sha256:ab"}


def as_json(text: str):
    return json.loads(json.dumps(read(text, "p").data))


def test_the_shipped_schema_is_current():
    shipped = resources.files("kvplan.policy").joinpath(SCHEMA_FILE).read_text()
    assert shipped == json.dumps(json_schema(), indent=2) + "\n", "write it again: kvplan policy schema"


def test_the_schema_is_draft_7():
    jsonschema.Draft7Validator.check_schema(json_schema())
    assert "prefixItems" not in json.dumps(json_schema())


@pytest.mark.parametrize("target", [None, Target(share=3725), Target(bytes=2**29, context_tokens=4096, batch=2)])
def test_dumped_policies_are_accepted(target):
    layers = tuple(LayerPolicy(slots=Slots(64), evictor=evictors[name]()) for name in evictors)
    window = LayerPolicy(slots=Slots(share=1234), evictor=SnapKV(window_tokens=8))
    policy = Policy(layers=(*layers, LayerPolicy(), window, LayerPolicy(shares=0)), model=MODEL, target=target)
    assert list(VALIDATOR.iter_errors(as_json(dump_policy(policy)))) == []


@pytest.mark.parametrize(
    "layer",
    [
        "{slots: 0}",
        "{slots: fulll}",
        "{slots: 64, evictor: snapvk}",
        "{slots: 64, evictor: {snapkv: {window: 8}}}",
        "{slots: 64, evictor: {tova: {}, h2o: {}}}",
        "{slots: 64, shares: 0}",
        "{sink_tokens: 4}",
        "{slots: 64, evicter: tova}",
    ],
)
def test_mistakes_are_refused(layer):
    assert list(VALIDATOR.iter_errors(as_json(f"kvplan: 1\nlayers: {{0: {layer}}}\n")))


def test_slots_resolve_in_whole_tokens():
    assert Slots(share=3500).resolve(1001, 64) == 350
    assert Slots(share=3500).resolve(100, 64) == 64
    assert Slots(tokens=10).resolve(100, 64) == 10
    assert FULL.resolve(100, 64) is None
    assert [str(slots) for slots in (FULL, Slots(tokens=7), Slots(share=3725))] == ["full", "7", "37.25%"]


def test_a_layer_reads_its_source():
    policy = Policy(layers=(LayerPolicy(), LayerPolicy(shares=0)))
    assert [policy.source(i) for i in range(2)] == [0, 0]
