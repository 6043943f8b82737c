import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvplan.cli.policy import app
from kvplan.errors import PolicyError
from kvplan.methods.evictors.h2o import H2O
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.policy.json_schema import json_schema
from kvplan.policy.schema import LayerPolicy, Policy, Slots, Target
from kvplan.policy.serialize import save_policy

MODEL = {"type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
LAYERS = (
    LayerPolicy(),
    LayerPolicy(slots=Slots(share=500), evictor=SnapKV(window_tokens=17, pool_width=7, pooling="max")),
    LayerPolicy(shares=1),
    LayerPolicy(slots=Slots(256), evictor=H2O()),
)


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "a.yaml"
    save_policy(Policy(layers=LAYERS, model=MODEL, target=Target(share=4000)), path)
    return path


@pytest.fixture
def other_file(tmp_path):
    path = tmp_path / "b.yaml"
    layers = (LAYERS[0], LayerPolicy(slots=Slots(512)), LayerPolicy(slots=Slots(512)), LAYERS[3])
    save_policy(Policy(layers=layers, model=MODEL), path)
    return path


def run(*args) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception:
        raise result.exception
    assert "--json" in args or all(len(line) <= 80 for line in result.stdout.splitlines())
    return result.stdout


def test_show_draws_every_layer_without_colour(policy_file):
    lines = run("show", policy_file).splitlines()
    assert lines[:2] == ["model   llama, bfloat16, 4 layers", "target  40% of the full cache"]
    rows = lines[4:10]
    assert rows[0] == "    0     full  [" + "#" * 28 + "]"
    assert rows[1].startswith("    1       5%  [##....") and "snapkv(" in rows[1]
    assert rows[2] == " " * 48 + "pool_width=7, pooling=max)"  # what does not fit goes on below
    assert rows[3] == " " * 48 + "(min 64)"
    assert rows[4] == "    2        -  -> layer 1"
    assert rows[5] == "    3      256  [" + "#" * 7 + "." * 21 + "]  h2o"
    assert lines[-1] == "32.8% of slots, 33.2% of bytes of a full cache, after a prompt of 1024 tokens"


def test_show_takes_the_prompt_that_the_policy_was_planned_for(tmp_path):
    path = tmp_path / "p.yaml"
    for planned, tokens in ((None, 1024), ({"prompt_tokens": 700}, 700), ({"prompt_tokens": "many"}, 1024)):
        save_policy(Policy(layers=LAYERS, model=MODEL, provenance={"planned": planned}), path)
        assert run("show", path).splitlines()[-1].endswith(f"after a prompt of {tokens} tokens")
        assert run("show", path, "--context", 90).splitlines()[-1].endswith("after a prompt of 90 tokens")


def test_show_leaves_the_bytes_out_where_the_file_does_not_say_the_shape(tmp_path):
    save_policy(Policy(layers=LAYERS), tmp_path / "p.yaml")
    assert "bytes" not in run("show", tmp_path / "p.yaml")


def test_validate_prints_ok_and_reports_every_bad_file(policy_file, tmp_path):
    assert CliRunner().invoke(app, ["validate", str(policy_file)]).stdout == f"{policy_file}: ok\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("kvplan: 1\nlayers: {0: {slots: 0}}\n")
    result = CliRunner().invoke(app, ["validate", str(bad), str(tmp_path / "none.yaml"), str(policy_file)])
    assert result.stdout == f"{policy_file}: ok\n"
    assert isinstance(result.exception, PolicyError)
    assert result.exception.exit_code == 2
    assert [problem.split(": ")[0] for problem in result.exception.problems] == [
        f"{bad}:2:21",
        str(tmp_path / "none.yaml"),
    ]


def test_diff_names_what_changed(policy_file, other_file):
    text = run("diff", policy_file, other_file)
    assert "64 -> 512" in text and "slots: 5% -> 512" in text
    assert "shares: layer 1 -> 512 by streaming" in text
    assert "evictor: snapkv(window_tokens=17, pool_width=7, pooling=max) -> streaming" in " ".join(text.split())
    assert "for 1 row of 1024 prompt + 0 new tokens" in text
    data = json.loads(run("diff", policy_file, other_file, "--json"))
    assert [change["layers"] for change in data["changes"]] == [[1], [2]]
    assert data["total"][0] < data["total"][1]


def test_diff_names_no_evictor_of_a_full_layer(policy_file, tmp_path):
    full = (LayerPolicy(evictor=H2O()), LayerPolicy(), LayerPolicy(), LayerPolicy(slots=Slots(256)))
    save_policy(Policy(layers=full, model=MODEL), tmp_path / "full.yaml")
    changes = json.loads(run("diff", policy_file, tmp_path / "full.yaml", "--json"))["changes"]
    assert [(change["layers"], change["settings"]) for change in changes] == [
        ([1], ["slots: 5% -> full", "evictor: snapkv(window_tokens=17, pool_width=7, pooling=max) -> none"]),
        ([2], ["shares: layer 1 -> full"]),
        ([3], ["evictor: h2o -> streaming"]),
    ]


def test_a_policy_does_not_differ_from_itself(policy_file):
    assert run("diff", policy_file, policy_file).startswith("no layer differs")


def test_policies_of_different_depth_are_not_compared(policy_file, tmp_path):
    path = tmp_path / "c.yaml"
    save_policy(Policy(layers=LAYERS[:2], model={**MODEL, "layers": 2}), path)
    with pytest.raises(PolicyError, match="for 4 and 2 layers"):
        run("diff", policy_file, path)


def test_bytes_as_table_and_json_agree(policy_file):
    data = json.loads(run("bytes", policy_file, "--context", 1000, "--new-tokens", 1, "--batch", 2, "--json"))
    assert [row["slots"] for row in data["layers"]] == [2 * 1001, 2 * 64, 0, 2 * 256]
    assert data["total"] == sum(row["total"] for row in data["layers"])
    assert data["layers"][3]["scores"] == 2 * 256 * 2 * 4
    assert data["full"] == 4 * 256 * 2 * 1001
    assert data["min_slots_binds"] == [1]
    text = run("bytes", policy_file, "--context", 1000, "--new-tokens", 1, "--batch", 2)
    assert f"({data['ratio']:.2%}) for 2 rows of 1000 prompt + 1 new tokens" in text
    assert "min_slots raises the percentage in layers 1" in text


def test_schema_prints_the_schema():
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == json_schema()


def test_the_command_module_imports_nothing_heavy():
    code = "import sys, kvplan.cli.policy; sys.exit(bool({'torch', 'yaml', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stated_window_bounds_the_bytes(policy_file, tmp_path):
    path = tmp_path / "w.yaml"
    save_policy(Policy(layers=(LayerPolicy(),) * 4, model={**MODEL, "window": 100, "window_layers": "0,2-3"}), path)
    data = json.loads(run("bytes", path, "--context", 1000, "--json"))
    assert [row["slots"] for row in data["layers"]] == [100, 1000, 100, 100]
    assert data["total"] == data["full"] == 1300 * 256


def test_the_schema_describes_every_field():
    schema = json_schema()
    blocks = [schema, *(schema["$defs"][name] for name in ("ModelBlock", "TargetBlock", "LayerBlock"))]
    fields = {name: field for block in blocks for name, field in block["properties"].items()}
    assert [name for name, field in fields.items() if not field.get("description")] == []
    pooling = fields["evictor"]["anyOf"][1]["properties"]["snapkv"]["properties"]["pooling"]
    assert pooling == {"default": "avg", "enum": ["avg", "max"], "type": "string"}
