import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplan.errors import KVPlanError, PolicyError
from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.methods.evictors.tova import TOVA
from kvplan.methods.params import Choice, search_ranges
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.json_schema import json_schema
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots, Target
from kvplan.policy.serialize import (
    SCHEMA_FILE,
    check_model,
    check_policy,
    dump_policy,
    load_policy,
    parse_policy,
    policy_fingerprint,
    save_policy,
)

ONE = {"layers": 1, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
MODEL = "model: {layers: 8, kv_heads: 2, head_dim: 32, dtype: bfloat16}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return caught.value.problems


def layers(*lines: str) -> str:
    return "kvplan: 1\nlayers:\n" + "".join(f"  {line}\n" for line in lines)


def windowed(extra: str) -> str:
    block = f"{{layers: 2, kv_heads: 2, head_dim: 32, dtype: float16, {extra}}}"
    return f"kvplan: 1\nmodel: {block}\nlayers: {{0-1: {{slots: full}}}}\n"


@st.composite
def any_evictor(draw):
    cls = evictors[draw(st.sampled_from(evictors.names()))]
    params = {}
    for name, search in search_ranges(cls).items():
        values = search.values if isinstance(search, Choice) else range(search.low, search.high + 1)
        params[name] = draw(st.sampled_from(values))
    return cls(**params)


@st.composite
def any_layer(draw):
    sinks, recent = draw(st.integers(0, 20)), draw(st.integers(1, 90))
    slots = draw(
        st.one_of(
            st.just(FULL), st.integers(110, 9999).map(Slots), st.integers(1, 10_000).map(lambda s: Slots(share=s))
        )
    )
    floor = draw(st.integers(110, 300))
    return LayerPolicy(
        slots=slots, sink_tokens=sinks, recent_tokens=recent, min_slots=floor, evictor=draw(any_evictor())
    )


@st.composite
def any_policy(draw):
    palette = draw(st.lists(any_layer(), min_size=1, max_size=3))
    chosen = []
    for _ in range(draw(st.integers(1, 10))):
        stores = [i for i, layer in enumerate(chosen) if layer.shares is None]
        shares = draw(st.one_of(st.none(), st.sampled_from(stores))) if stores else None
        chosen.append(draw(st.sampled_from(palette)) if shares is None else LayerPolicy(shares=shares))
    heads = draw(st.one_of(st.integers(1, 8), st.just([2, 4])))
    model = {"type": "llama", "layers": len(chosen), "kv_heads": heads, "head_dim": 64, "dtype": "float16"}
    if draw(st.booleans()):
        model |= {"window": draw(st.integers(1, 9999)), "window_layers": str(len(chosen) - 1)}
    count = st.integers(1, 2**40)
    target = st.one_of(
        st.none(),
        st.builds(Target, share=st.integers(1, 10_000)),
        st.builds(Target, bytes=count, context_tokens=st.one_of(st.none(), count), batch=st.integers(1, 9)),
    )
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.sampled_from(TRAPS)
    )
    plain = st.recursive(
        leaf, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=5
    )
    provenance = draw(st.dictionaries(st.text(), plain, max_size=3))
    return Policy(
        layers=tuple(chosen), model=draw(st.sampled_from([{}, model])), target=draw(target), provenance=provenance
    )


TRAPS = [
    "on",
    "no",
    "017",
    "12:30",
    "1e-3",
    "2026-01-01",
    "=",
    "<<",
    "~",
    "null",
    "0x1f",
    "1_000",
    ".5",
    "true",
    "- a",
    "#",
    "",
]


@settings(max_examples=120, deadline=None)
@given(any_policy())
def test_a_dumped_policy_loads_as_itself(policy):
    assert parse_policy(dump_policy(policy)) == policy


@pytest.mark.parametrize(
    "text", ["\x85", " \x85 ", "a\x85b", "\u2028", "a\u2029", "\ufeff", "\x00", "\x7f", "\xa0", "\n"]
)
def test_unprintable_text_survives_as_key_and_value(text):
    policy = Policy(
        layers=(LayerPolicy(),), provenance={text: text, "inner": {text: [text]}}, model={**ONE, "name": text}
    )
    assert parse_policy(dump_policy(policy)) == policy


@pytest.mark.parametrize("name", evictors.names())
def test_evictor_parameters_survive_the_file(name):
    policy = Policy(layers=(LayerPolicy(slots=Slots(200), evictor=evictors[name]()),))
    assert parse_policy(dump_policy(policy)) == policy


def test_equal_layers_become_one_readable_entry():
    window = LayerPolicy(slots=Slots(share=3725), evictor=SnapKV(window_tokens=16))
    policy = Policy(
        layers=(*(LayerPolicy(),) * 4, window, LayerPolicy(shares=4), window, window), target=Target(share=4000)
    )
    assert dump_policy(policy).splitlines() == [
        "kvplan: 1",
        "target: {share: 40%}",
        "layers:",
        "  0-3: {slots: full}",
        '  "4,6-7": {slots: 37.25%, sink_tokens: 4, recent_tokens: 16, min_slots: 64, '
        "evictor: {snapkv: {window_tokens: 16}}}",
        "  5: {shares: 4}",
    ]


def test_target_bytes_are_exact():
    text = "kvplan: 1\ntarget: {bytes: 1.5GiB, context_tokens: 32768}\nlayers: {0: {slots: full}}\n"
    policy = parse_policy(text)
    assert policy.target == Target(bytes=3 * 2**29, context_tokens=32768)
    assert "bytes: 1536MiB" in dump_policy(policy)


def test_save_then_load(tmp_path):
    policy = Policy(layers=(LayerPolicy(slots=Slots(100), evictor=TOVA()),))
    save_policy(policy, tmp_path / "p.yaml")
    assert load_policy(tmp_path / "p.yaml") == policy


def test_a_file_names_the_schema_only_where_it_lies_beside_it(tmp_path):
    policy = Policy(layers=(LayerPolicy(),))
    save_policy(policy, tmp_path / "p.yaml")
    assert (tmp_path / "p.yaml").read_text() == dump_policy(policy)
    (tmp_path / SCHEMA_FILE).write_text("{}")
    save_policy(policy, tmp_path / "p.yaml")
    first, rest = (tmp_path / "p.yaml").read_text().split("\n", 1)
    assert (first, rest) == (f"# yaml-language-server: $schema=./{SCHEMA_FILE}", dump_policy(policy))
    assert load_policy(tmp_path / "p.yaml") == policy


def test_fingerprints_of_old_results_hold():
    shipped = Path(__file__).parents[2] / "policies" / "bundled"
    assert policy_fingerprint(load_policy(shipped / "40pct.yaml")) == "sha256:436378820feefbe8264c3c1dda78de39"
    for path in shipped.glob("*.yaml"):
        assert path.read_text().startswith(f"# yaml-language-server: $schema=./{SCHEMA_FILE}\n")
    assert json.loads((shipped / SCHEMA_FILE).read_text()) == json_schema()


def test_rules_of_chunks_are_told_with_all_others():
    text = "kvplan: 1\nprefill: {chunk_tokens: 128}\nlayers:\n  0: {slots: 64, codec: kivi}\n"
    assert [line.split(": ")[1] for line in problems(text)] == ["prefill", "layers.0.slots"]


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(PolicyError, match="do not fit in 8 slots"):
        save_policy(Policy(layers=(LayerPolicy(slots=Slots(8)),)), tmp_path / "p.yaml")
    with pytest.raises(PolicyError, match=r"provenance\.where: a policy file cannot hold a PosixPath"):
        save_policy(Policy(layers=(LayerPolicy(),), provenance={"where": Path("/x").resolve()}), tmp_path / "p.yaml")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_a_plain_error(tmp_path):
    with pytest.raises(KVPlanError, match="cannot read the policy file"):
        load_policy(tmp_path / "none.yaml")


# Each error: the file, the whole message.
ONE_PROBLEM = {
    "half a character": (
        'kvplan: 1\nprovenance: {by: "\\ud800"}\nlayers: {0: {slots: full}}\n',
        "p.yaml:2:18: provenance.by: '\\ud800' is half a character; write the character itself, in UTF-8",
    ),
    "empty": ("", "p.yaml:1:1: the file is empty"),
    "not a mapping": ("- 1\n", "p.yaml:1:1: a policy file is a mapping with the keys kvplan and layers"),
    "no version": (
        "layers: {0: {slots: full}}\n",
        "p.yaml:1:1: no format version; a policy file starts with kvplan: 1",
    ),
    "newer": ("kvplan: 2\nlayerz: 3\n", "p.yaml:1:9: kvplan: format 2 needs a newer kvplan; this one reads format 1"),
    "text version": ("kvplan: '1'\n", "p.yaml:1:9: kvplan: must be the format version, a number like 1, not '1'"),
    "duplicate": (
        "kvplan: 1\nlayers: {0: {slots: full, slots: 50}}\n",
        "p.yaml:2:27: layers.0.slots: duplicate key; it is already on line 2",
    ),
    "alias": (
        "kvplan: 1\nlayers: {0: &a {slots: full}, 1: *a}\n",
        "p.yaml:2:13: not a readable YAML file: tags, anchors and aliases are not part of a policy file",
    ),
    "unknown top key": (
        "kvplan: 1\ntraget: {share: 40%}\nlayers: {0: {slots: full}}\n",
        "p.yaml:2:1: traget: unknown key 'traget'; did you mean 'target'? "
        "(known: kvplan, model, target, prefill, layers, provenance)",
    ),
    "no layers": ("kvplan: 1\n", "p.yaml:1:1: layers: is required"),
    "unknown layer key": (
        layers("0: {slots: 64, evicter: tova}"),
        "p.yaml:3:18: layers.0.evicter: unknown key 'evicter'; did you mean 'evictor'? "
        "(known: slots, sink_tokens, recent_tokens, min_slots, evictor, head_split, merger, channels, codec, shares)",
    ),
    "unknown evictor": (
        layers("0-3: {slots: full}", "4-15: {slots: 64, evictor: snapvk}"),
        "p.yaml:4:30: layers.4-15.evictor: unknown evictor 'snapvk'; did you mean 'snapkv'? "
        "(known: corm, expected, h2o, keydiff, knorm, lagkv, scissorhands, sliding, snapkv, streaming, tova)",
    ),
    "unknown parameter": (
        layers("0: {slots: 64, evictor: {snapkv: {window: 8}}}"),
        "p.yaml:3:37: layers.0.evictor.snapkv.window: unknown parameter of snapkv 'window'; did you mean "
        "'window_tokens'? (known: window_tokens, pool_width, pooling)",
    ),
    "parameter of none": (
        layers("0: {slots: 64, evictor: {tova: {x: 8}}}"),
        "p.yaml:3:35: layers.0.evictor.tova.x: unknown parameter of tova 'x' (it has none)",
    ),
    "parameter type": (
        layers("0: {slots: 64, evictor: {snapkv: {window_tokens: '8'}}}"),
        "p.yaml:3:52: layers.0.evictor.snapkv.window_tokens: must be an integer, not '8'",
    ),
    "method error": (
        layers("0: {slots: 64, evictor: {snapkv: {pool_width: 4}}}"),
        "p.yaml:3:36: layers.0.evictor.snapkv: snapkv.pool_width is 4; it must be odd (1 turns pooling off)",
    ),
    "two evictors": (
        layers("0: {slots: 64, evictor: {tova: {}, h2o: {}}}"),
        "p.yaml:3:27: layers.0.evictor: must be a name, or one name with its parameters like "
        "{snapkv: {window_tokens: 16}}, not {'tova': {}, 'h2o': {}}",
    ),
    "evictor by number": (
        layers("0: {slots: 64, evictor: {5: {}}}"),
        "p.yaml:3:27: layers.0.evictor: unknown evictor '5' "
        "(known: corm, expected, h2o, keydiff, knorm, lagkv, scissorhands, sliding, snapkv, streaming, tova)",
    ),
    "overlap": (
        layers("0-3: {slots: full}", "2-5: {slots: 64}"),
        "p.yaml:4:3: layers.2-5: layers 2-3 given by 0-3 too; give each layer once",
    ),
    "overlap in one key": (
        layers("'0-2,1': {slots: full}"),
        "p.yaml:3:3: layers.0-2,1: layer 1 given more than once by this key; give each layer once",
    ),
    "gap": (
        layers("0: {slots: full}", "2,5-6: {slots: 64}"),
        "p.yaml:2:1: layers: nothing is said about layers 1,3-4",
    ),
    "too few": (
        "kvplan: 1\n" + MODEL + "layers: {0-6: {slots: full}}\n",
        "p.yaml:3:1: layers: nothing is said about layer 7",
    ),
    "out of range": (
        "kvplan: 1\n" + MODEL + "layers: {0-8: {slots: full}}\n",
        "p.yaml:3:10: layers.0-8: layer 8 is out of range; the last layer is 7",
    ),
    "not a range": (
        layers("0: {slots: full}", "two: {slots: full}"),
        "p.yaml:4:3: layers.two: 'two' names no layers; write for example 5, 0-3 or '4,6-7'",
    ),
    "chain": (
        layers("0: {slots: full}", "1: {shares: 0}", "2: {shares: 1}"),
        "p.yaml:5:15: layers.2.shares: layer 2 shares layer 1, which itself shares; name the layer that stores: 0",
    ),
    "later": (
        layers("0: {shares: 1}", "1: {slots: full}"),
        "p.yaml:3:15: layers.0.shares: layer 0 cannot share the cache of layer 1; "
        "only an earlier layer's exists by then",
    ),
    "itself": (layers("0: {shares: 0}"), "p.yaml:3:15: layers.0.shares: layer 0 cannot share its own cache"),
    "shares and slots": (
        layers("0: {slots: full}", "1: {shares: 0, slots: 64, evictor: tova}"),
        "p.yaml:4:6: layers.1: shares stands alone, a sharing layer stores nothing; remove evictor, slots",
    ),
    "nothing": (layers("0: {recent_tokens: 8}"), "p.yaml:3:6: layers.0: needs slots or shares"),
    "protected, slots": (
        layers("0: {slots: 19}"),
        "p.yaml:3:14: layers.0.slots: 4 sink + 16 recent tokens do not fit in 19 slots; raise slots to at least 20",
    ),
    "protected, floor": (
        layers("0: {slots: 50%, recent_tokens: 61}"),
        "p.yaml:3:6: layers.0.min_slots: 4 sink + 61 recent tokens do not fit in 64 slots, "
        "the floor of the percentage; raise min_slots to at least 65",
    ),
    "zero slots": (layers("0: {slots: 0}"), "p.yaml:3:14: layers.0.slots: must be at least 1 token, not 0"),
    "negative": (
        layers("0: {slots: 50, sink_tokens: -1}"),
        "p.yaml:3:31: layers.0.sink_tokens: must be at least 0, not -1",
    ),
    "zero recent": (
        layers("0: {slots: 50, recent_tokens: 0}"),
        "p.yaml:3:33: layers.0.recent_tokens: must be at least 1, not 0",
    ),
    "above 100 %": (
        layers("0: {slots: 100.01%}"),
        "p.yaml:3:14: layers.0.slots: 100.01% is not above 0% and at most 100%",
    ),
    "zero percent": (
        layers("0: {slots: 0.00%}"),
        "p.yaml:3:14: layers.0.slots: 0.00% is not above 0% and at most 100%",
    ),
    "three decimals": (
        layers("0: {slots: 1.234%}"),
        "p.yaml:3:14: layers.0.slots: '1.234%' is not a percentage with at most two decimals, like 35% or 37.25%",
    ),
    "on": (
        layers("0: {slots: on}"),
        "p.yaml:3:14: layers.0.slots: must be full, a number of tokens, or a percentage like 35%, not 'on'",
    ),
    "octal": (
        layers("0: {slots: 64, sink_tokens: 010}"),
        "p.yaml:3:31: layers.0.sink_tokens: must be an integer, not '010'",
    ),
    "sexagesimal": (
        layers("0: {slots: 64, sink_tokens: 1:30}"),
        "p.yaml:3:31: layers.0.sink_tokens: must be an integer, not '1:30'",
    ),
    "bool as number": (
        layers("0: {slots: 64, sink_tokens: true}"),
        "p.yaml:3:31: layers.0.sink_tokens: must be an integer, not True",
    ),
    "two targets": (
        "kvplan: 1\ntarget: {share: 40%, bytes: 1GiB}\nlayers: {0: {slots: full}}\n",
        "p.yaml:2:9: target: needs either share or bytes",
    ),
    "bad size": (
        "kvplan: 1\ntarget: {bytes: 5 pounds}\nlayers: {0: {slots: full}}\n",
        "p.yaml:2:17: target.bytes: '5 pounds' is not a size; write for example 512MiB or 1.5GiB",
    ),
    "dtype": (
        "kvplan: 1\nmodel: {layers: 1, kv_heads: 2, head_dim: 32, dtype: bf16}\nlayers: {0: {slots: full}}\n",
        "p.yaml:2:54: model.dtype: must be 'float64', 'float32', 'bfloat16' or 'float16', not 'bf16'",
    ),
    "window alone": (
        windowed("window: 64"),
        "p.yaml:2:8: model: window and window_layers go together; give both or neither",
    ),
    "window layers out of range": (
        windowed("window: 64, window_layers: 1-2"),
        "p.yaml:2:90: model.window_layers: layer 2 is out of range; the last layer is 1",
    ),
    "window layers backwards": (
        windowed("window: 64, window_layers: 1-0"),
        "p.yaml:2:90: model.window_layers: '1-0' runs backwards",
    ),
    "window layer twice": (
        windowed("window: 64, window_layers: '0-1,1'"),
        "p.yaml:2:90: model.window_layers: '0-1,1' names a layer twice",
    ),
    "no window layers": (
        windowed("window: 64, window_layers: all"),
        "p.yaml:2:90: model.window_layers: must name layers, like 5, 0-3 or '4,6-7', not 'all'",
    ),
    "not a block": (layers("0: full"), "p.yaml:3:6: layers.0: must be a mapping, not 'full'"),
}


@pytest.mark.parametrize(("text", "message"), ONE_PROBLEM.values(), ids=ONE_PROBLEM.keys())
def test_a_problem_is_named_with_its_place(text, message):
    assert problems(text) == [message]


@pytest.mark.parametrize(
    "text", ["a: [1\n", "\x00", "a: b: c\n", "--- 1\n--- 2\n", "[" * 5000, "{[a]: 1, [b]: 2}", "? {a: 1}\n: 2\n"]
)
def test_bad_yaml_is_one_policy_error(text):
    assert len(problems(text)) == 1 or "cannot be a key" in problems(text)[0]


def test_an_endless_file_is_refused_before_it_is_parsed():
    assert problems("#" * 3_000_000) == ["p.yaml: not a policy: 3000000 characters; at most 2000000 are read"]


def test_every_problem_is_reported_at_once():
    text = layers(
        "0-3: {slots: on}", "3-4: {slots: 64, evictor: snapvk}", "6: {slots: 8}", "6: {slots: 9}", "7: {shares: 7}"
    )
    assert [line.split(": ")[0] for line in problems(text)] == [
        f"p.yaml:{place}" for place in ("2:1", "3:16", "4:3", "4:29", "5:14", "6:3", "7:15")
    ]


def test_a_problem_is_one_line_whatever_the_key():
    (line,) = problems('kvplan: 1\n"a\\nb": 1\nlayers: {0: {slots: full}}\n')
    assert line.startswith("p.yaml:2:1: 'a\\nb': unknown key 'a\\nb' (known")


def test_a_sliding_layer_protects_no_sinks():
    policy = parse_policy(layers("0: {slots: 16, evictor: sliding}"))
    assert policy.layers[0].protected_sinks == 0


def test_check_policy_holds_code_to_the_rules_of_files():
    with pytest.raises(PolicyError, match=r"layers\.1\.shares: layer 1 cannot share its own cache"):
        check_policy(Policy(layers=(LayerPolicy(), LayerPolicy(shares=1))))
    with pytest.raises(PolicyError, match=r"2 layers, but model\.layers is 3"):
        check_policy(Policy(layers=(LayerPolicy(), LayerPolicy()), model={"layers": 3}))


FULL_ATTENTION, WINDOW = LayerSpec(2, 32, 32), LayerSpec(2, 32, 32, window=128)
SPEC = ModelSpec(
    layers=(FULL_ATTENTION, WINDOW, FULL_ATTENTION), query_heads=4, dtype="bfloat16", fingerprint="sha256:aa"
)


def misfit(policy: Policy, spec: ModelSpec = SPEC) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        check_model(policy, spec)
    return caught.value.problems


def test_a_policy_fits_its_model():
    layer = LayerPolicy(slots=Slots(64))
    check_model(Policy(layers=(layer, LayerPolicy(), LayerPolicy(shares=0)), model=SPEC.policy_block()), SPEC)
    unknown = {key: value for key, value in SPEC.policy_block().items() if key != "fingerprint"}
    check_model(Policy(layers=(LayerPolicy(),) * 3, model=unknown), SPEC)


def test_layer_count_mismatch():
    assert "the policy has 2 layers, the model 3" in misfit(Policy(layers=(LayerPolicy(),) * 2))[0]


def test_shape_dtype_and_identity_mismatches_are_all_named():
    model = {"layers": 3, "kv_heads": 4, "head_dim": 64, "dtype": "float32", "fingerprint": "sha256:bb"}
    found = misfit(Policy(layers=(LayerPolicy(),) * 3, model=model))
    assert [line.split(":")[0] for line in found] == [
        "model.kv_heads",
        "model.head_dim",
        "model.dtype",
        "model.fingerprint",
    ]
    assert found[0] == "model.kv_heads: the policy was made for 4, the model has 2; search again"
    assert "load the model in float32" in found[2]
    assert "search again on this model, or delete the fingerprint" in found[3]


def test_native_window_layers_stay_full_and_share_only_alike():
    full = LayerPolicy()
    assert misfit(Policy(layers=(full, LayerPolicy(slots=Slots(64)), full))) == [
        "layers.1.slots: the model limits this layer to a window of 128 tokens by itself; write full, not 64"
    ]
    assert (
        "layer 1 (window 128 tokens) cannot share the cache of layer 0 (full attention)"
        in (misfit(Policy(layers=(full, LayerPolicy(shares=0), full)))[0])
    )


def test_sharing_layers_have_one_shape():
    spec = dataclasses.replace(SPEC, layers=(FULL_ATTENTION, LayerSpec(4, 32, 32)))
    found = misfit(Policy(layers=(LayerPolicy(), LayerPolicy(shares=0))), spec)
    assert found == ["layers.1.shares: layers 1 and 0 have caches of different shape"]


def test_the_windows_must_be_the_models():
    layers = (LayerPolicy(),) * 3
    check_model(Policy(layers=layers, model={"window": 128, "window_layers": 1}), SPEC)
    assert misfit(Policy(layers=layers, model={"window": 64, "window_layers": "0-1"})) == [
        "model.window: the policy was made for a window of 64 tokens in layers 0-1, the model has a window of 128 "
        "tokens in layers 1; search again"
    ]
    full = dataclasses.replace(SPEC, layers=(FULL_ATTENTION,) * 3)
    assert "the model has no window; search again" in misfit(Policy(layers=layers, model=SPEC.policy_block()), full)[0]
