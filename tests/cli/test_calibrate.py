import json
import sys
from types import ModuleType

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvplan.calibrate.profile import Profile
from kvplan.cli import calibrate
from kvplan.errors import KVPlanError
from kvplan.stats import PromptScores


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(" ".join(chr(97 + (i * i) % 26) for i in range(400)))
    return path


class FakeScorer:
    def __init__(self, model, spec, examples, progress=None):
        self.examples = examples

    def score(self, policy, prompts):
        assert all(self.examples[i].continuation_ids for i in prompts)
        return PromptScores(*[(0.5,) * len(prompts)] * 4)


@pytest.fixture(autouse=True)
def fake_scoring(monkeypatch):
    module = ModuleType("kvplan.check.scoring")
    module.Scorer = FakeScorer
    monkeypatch.setitem(sys.modules, "kvplan.check.scoring", module)


def invoke(*args):
    app = typer.Typer()
    app.command()(calibrate.command)
    return CliRunner().invoke(app, [*map(str, args)])


def test_calibrate_writes_a_profile_and_prints_a_table(folder, tmp_path):
    out = tmp_path / "p.json"
    result = invoke(folder, "--data", folder / "text.txt", "--max-tokens", 80, "-o", out)
    assert result.exit_code == 0, result.output
    profile = Profile.load(out)
    assert profile.statistics.num_prompts > 2
    assert profile.sensitivity["snapkv"][1000] == [0.5, 0.5]
    assert set(profile.seconds) == {"load", "forward", "statistics", "sensitivity"}
    assert profile.spec.fingerprint is not None and str(folder) not in out.read_text()
    assert "importance" in result.stdout and "0.5000" in result.stdout


def test_json_without_sensitivity(folder, tmp_path):
    out = tmp_path / "p.json"
    args = (folder, "--data", folder / "text.txt", "--max-tokens", 80, "--max-prompts", 2, "--no-sensitivity", "--json")
    result = invoke(*args, "-o", out)
    data = json.loads(result.stdout)
    assert data["data"]["prompts"] == 2 and data["sensitivity"] == {}
    assert data["settings"]["max_tokens"] == 80


def test_unwritable_output_fails_before_the_model_is_loaded(tmp_path):
    for output in (tmp_path / "no" / "p.json", tmp_path):
        result = invoke("/no/such/model", "-o", output)
        assert isinstance(result.exception, KVPlanError) and str(output) in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeScorer, "score", interrupt)
    result = invoke(folder, "--data", folder / "text.txt", "--max-tokens", 80, "-o", tmp_path / "p.json")
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []
