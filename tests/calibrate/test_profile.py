import copy
import json

import numpy as np
import pytest
from tiny_models import example, tiny
from typer.testing import CliRunner

from kvplan.calibrate.collect import collect
from kvplan.calibrate.profile import Profile, merge
from kvplan.calibrate.sensitivity import measure
from kvplan.calibrate.statistics import LATER_NAMES, MOMENT_NAMES, Moments, token_l2
from kvplan.cli.profile import app
from kvplan.errors import ProfileError
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.report.profile import table
from kvplan.stats import PromptScores

LENGTHS = (70, 66, 30, 12, 90)


def det(shape, seed):
    n = np.arange(np.prod(shape), dtype=np.int64)
    return (((31 * n * n + 7919 * n + 104729 * seed) % 2003) / 1001.5 - 1).astype(np.float32).reshape(shape)


def make(indices, *, sensitivity=True, batch_size=1):
    model = tiny("llama")
    spec = ModelSpec.from_config(model.config, "float32", "sha256:abc")
    statistics = collect(model, [example(i, LENGTHS[i]) for i in indices], batch_size=batch_size)
    sums = None
    if sensitivity:
        # A KL that depends on the prompt, not on the shard that it is in.
        sums = measure(
            lambda p, prompts: PromptScores(*[tuple(0.1 * (indices[n] + 1) / 3 for n in prompts)] * 4),
            spec,
            len(indices),
            evictors=("knorm", "streaming"),
            shares=(1000, 5000),
        )
    return Profile(spec, statistics, sums, {"seed": 0}, {"kvplan": "0", "python": "3"})


@pytest.fixture(scope="module")
def whole():
    return make([0, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def shards():
    return make([0, 3]), make([1, 2, 4])


def test_golden_distances_of_kvsharer():
    keys = [det((1, 3, 2), 10 + i) for i in range(4)]
    values = [det((1, 3, 2), 20 + i) for i in range(4)]
    expected = {
        (1, 0): 1.778759,
        (3, 1): 1.555127,
        (2, 0): 1.246614,
        (2, 1): 1.052161,
        (3, 2): 0.809131,
        (3, 0): 0.624145,
    }
    found = token_l2(keys, values)
    assert [(i, j) for i, j, _ in found] == list(expected)
    assert [d for *_, d in found] == pytest.approx(list(expected.values()), abs=2e-6)


def test_distances_only_between_layers_that_could_share():
    keys = [det((1, 3, 2), i) for i in range(4)]
    layers = [LayerSpec(1, 2, 2), LayerSpec(1, 2, 2, window=8), LayerSpec(1, 2, 2), LayerSpec(1, 2, 2, window=8)]
    assert {(i, j) for i, j, _ in token_l2(keys, keys, layers)} == {(2, 0), (3, 1)}


def test_moments_are_numpys():
    values = np.random.default_rng(0).normal(0.99, 0.01, (40, 3))
    m = Moments.of(values)
    np.testing.assert_allclose(m.mean, values.mean(0), atol=1e-9)
    np.testing.assert_allclose(m.std, values.std(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(m.se, values.std(0, ddof=1) / 40**0.5, rtol=1e-4)
    assert Moments.of(values[:1]).se.tolist() == [0.0] * 3


def test_shards_merge_to_the_whole(whole, shards):
    for merged in (merge(*shards), merge(*reversed(shards))):
        assert merged.data_fingerprint == whole.data_fingerprint
        a, b = merged.to_json(), whole.to_json()
        for x, y in zip(a["layers"], b["layers"], strict=True):
            for name in MOMENT_NAMES:
                assert x[name] == y[name]  # sums are equal to the last bit
        assert a["sensitivity"]["moments"] == b["sensitivity"]["moments"]
        assert (a["data"], a["sharing_prompts"]) == (b["data"], b["sharing_prompts"]) and a["sharing_prompts"] == 3
        np.testing.assert_allclose(np.array(merged.pair_distances), np.array(whole.pair_distances), rtol=1e-5)
        assert merged.seconds["forward"] > 0


def test_shards_measured_in_other_batches_merge_within_tolerance(whole):
    merged = merge(make([0, 3], batch_size=2), make([1, 2, 4], batch_size=3))
    np.testing.assert_allclose(merged.importance, whole.importance, atol=1e-5)


def test_file_holds_everything(whole, tmp_path):
    whole.save(tmp_path / "p.json")
    loaded = Profile.load(tmp_path / "p.json")
    assert loaded.to_json() == whole.to_json()
    assert loaded.spec == whole.spec
    assert loaded.importance == whole.importance
    assert loaded.sensitivity["knorm"][1000] == pytest.approx([0.1] * 3)
    assert len(loaded.sensitivity_se["knorm"][1000]) == 3
    bare = make([2], sensitivity=False)
    bare.save(tmp_path / "bare.json")
    loaded = Profile.load(tmp_path / "bare.json")
    assert loaded.sensitivity == {}
    with pytest.raises(ProfileError, match="no prompt has 64 tokens"):
        _ = loaded.pair_distances
    json.dumps(loaded.summary(), allow_nan=False)


def without_later(data):
    for layer in data["layers"]:
        for name in LATER_NAMES:
            del layer[name]
    for key in ("prefix_levels", "norm_levels"):
        del data["settings"][key]


def test_a_profile_of_an_earlier_build_loads_without_what_it_lacks(whole, shards, tmp_path):
    early = Profile.from_json(edited(whole, without_later))
    assert {facts.head_change for facts in early.facts} == {None}
    assert [f.mass_curve for f in early.facts] == [f.mass_curve for f in whole.facts]
    early.save(tmp_path / "early.json")
    assert Profile.load(tmp_path / "early.json").to_json() == early.to_json()
    assert "norm_tokens" not in early.summary()["layers"][0]
    with pytest.raises(ProfileError, match="settings differ: norm_levels is None"):
        merge(Profile.from_json(edited(shards[0], without_later)), shards[1])


def test_facts_are_shares_of_the_prompts(whole):
    for facts, layer in zip(whole.facts, whole.statistics.layers, strict=True):
        assert facts.head_change == pytest.approx(1 - layer.head_cosine.mean.mean())
        for curve in (facts.mass_curve, facts.prefix_curve, facts.norm_curve):
            levels, shares = zip(*curve, strict=True)
            assert list(levels) == sorted(levels) and list(shares) == sorted(shares)
            assert shares[0] > 0 and shares[-1] <= 1


def edited(profile, change):
    data = copy.deepcopy(profile.to_json())
    change(data)
    return data


def set_at(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("kind", value="kvplan policy"), "not a kvplan profile"),
        (set_at("schema_version", value=2), "schema version 2 is not 1; it was made by a newer kvplan"),
        (set_at("schema_version", value="1"), "schema version '1' is not 1"),
        (set_at("extra", value=1), "extra: Extra inputs"),
        (lambda d: d.pop("layers"), "layers: Field required"),
        (lambda d: d["layers"].pop(), "layers: 2 layers; the model has 3"),
        (set_at("layers", 1, "cosine", "sum", value=[float("nan")]), r"layers.1.cosine.sum.0: .*finite"),
        (
            set_at("layers", 1, "cosine", "sum", value=[2e100]),
            r"layers.1.cosine.sum.0: .*less than or equal to",
        ),
        (set_at("seconds", value={"\0": 1.0}), "cannot be printed"),
        (
            set_at("settings", value={"sinks": ["\x1f"]}),
            "settings: .*cannot be printed",
        ),
        (set_at("seconds", value={"forward": -1.0}), "seconds.forward: "),
        (set_at("layers", 1, "cosine", "sum", value=[10**400]), "layers.1.cosine.sum.0"),
        (set_at("layers", 1, "cosine", "sum", value=[]), "layers.1.cosine: 0 sums"),
        (
            set_at("layers", 1, "cosine", "sum", value=[1e99]),
            "layers.1.cosine: sums and squares contradict each other",
        ),
        (set_at("layers", 1, "cosine", "squares", value=[-5.0]), "layers.1.cosine: sums and squares contradict"),
        (set_at("spec", "fingerprint", value="a\nb"), "spec.fingerprint: String should match"),
        (
            lambda d: [m.update(count=0) for s in d["sensitivity"]["moments"].values() for m in s.values()],
            "sensitivity.moments.knorm.1000: measured on no prompt",
        ),
        (set_at("layers", 1, "cosine", "sum", value="abc"), "layers.1.cosine.sum"),
        (set_at("layers", 0, "entropy", "count", value=4), "layers.0.entropy: a count of 4; there are 5 prompts"),
        (set_at("layers", 0, "key_sum", value="!!"), "layers.0.key_sum: not base64"),
        (set_at("layers", 0, "key_sum", value="ü"), "layers.0.key_sum: not base64"),
        (set_at("layers", 0, "key_sum", value="AAAA"), "layers.0.key_sum: 3 bytes"),
        (set_at("spec", "layers", 0, "kv_heads", value=10**15), "layers.0.sink_mass: 2 sums"),
        (set_at("spec", "layers", 0, "kv_heads", value=-1), "spec.layers.0.kv_heads"),
        (set_at("spec", "dtype", value="int3"), "spec.dtype: unknown dtype 'int3'"),
        (set_at("data", "prompt_hashes", value=["a"] * 5), "data.fingerprint: not the one"),
        (set_at("data", "prompt_hashes", value=["a"]), "data.prompt_hashes: 1 hashes of 5"),
        (set_at("sharing_prompts", value=6), "sharing_prompts: 6 of 5"),
        (set_at("sensitivity", "moments", "knorm", value={"x": None}), "sensitivity.moments.knorm.x"),
        (set_at("sensitivity", "moments", value={}), "sensitivity.settings: evictors or shares"),
    ],
)
def test_damaged_profile_is_one_line(whole, change, message):
    with pytest.raises(ProfileError, match=message) as caught:
        Profile.from_json(edited(whole, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "1" * 5000, "null", "[]", '{"kind": "kvplan profile"}', "\x00"]
)
def test_any_garbage_is_a_profile_error(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"p\.json: ") as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ProfileError, match="cannot read the profile"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not UTF-8"):
        Profile.load(tmp_path / "b.json")


def test_merge_refuses_what_is_not_a_shard(whole, shards):
    with pytest.raises(ProfileError, match="2 prompts are in both"):
        merge(whole, shards[0])
    with pytest.raises(ProfileError, match="one has sensitivity and the other has not"):
        merge(shards[0], make([1], sensitivity=False))
    other = Profile.from_json(edited(shards[1], set_at("spec", "fingerprint", value="sha256:def")))
    with pytest.raises(ProfileError, match=r"different models .*abc.*def"):
        merge(shards[0], other)
    other = Profile.from_json(edited(shards[1], set_at("spec", "dtype", value="bfloat16")))
    with pytest.raises(ProfileError, match="measured in float32 and bfloat16; calibrate with one --dtype"):
        merge(shards[0], other)
    other = Profile.from_json(edited(shards[1], set_at("settings", "sinks", value=9)))
    with pytest.raises(ProfileError, match="settings differ: sinks is 4 and 9"):
        merge(shards[0], other)


def test_commands_merge_and_show(shards, whole, tmp_path):
    a, b, c = (tmp_path / f"{x}.json" for x in "abc")
    shards[0].save(a)
    shards[1].save(b)
    run = CliRunner().invoke
    merged = run(app, ["merge", str(a), str(b), "-o", str(c)])
    assert merged.exit_code == 0 and merged.output.endswith("; its times are sums over the 2 profiles\n")
    assert Profile.load(c).cosine == whole.cosine
    result = run(app, ["merge", str(a), str(a), "-o", str(c)])
    assert isinstance(result.exception, ProfileError) and "a.json: cannot be merged, 2 prompts" in str(result.exception)
    assert Profile.load(c).cosine == whole.cosine
    assert json.loads(run(app, ["show", str(c), "--json"]).output)["data"]["prompts"] == 5


def test_groups_are_lettered_from_the_least_important(whole, monkeypatch):
    monkeypatch.setattr("kvplan.report.profile.layer_groups", lambda values, **options: [[2, 0], [1]])
    text = table(whole).plain
    assert [line.split()[1] for line in text.splitlines() if "±" in line] == ["a", "b", "a"]
    assert "2 groups, a the least" in " ".join(text.split())


def test_table_fits_and_names_every_layer(whole):
    lines = table(whole).plain.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if "█" in line or "±" in line]
    assert [int(line.split()[0]) for line in rows] == [0, 1, 2]
    timing = [line for line in lines if line.startswith("time ")]
    assert len(timing) == 1 and "forward" in timing[0]
    assert any(line.count("█") == 16 for line in rows)
