import json
import sys
from types import ModuleType

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvplan.calibrate.profile import Profile, merge
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
    def __init__(self, model, spec, examples, *, replay_memory):
        FakeScorer.replay_memory = replay_memory
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
    result = invoke(folder, "--data", folder / "text.txt", "--max-tokens", 80, "--replay-memory", "1MiB", "-o", out)
    assert result.exit_code == 0, result.output
    assert FakeScorer.replay_memory == 2**20
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


def test_merged_shards_are_the_whole(folder, tmp_path):
    """The fake scores are equal, so sensitivity agrees whichever prompts a shard takes; their number tells."""
    args = (folder, "--data", folder / "text.txt", "--max-tokens", 40, "--sensitivity-prompts", 5, "--batch-size", 1)
    assert invoke(*args, "-o", tmp_path / "whole.json").exit_code == 0
    parts = [tmp_path / f"{i}.json" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        result = invoke(*args, "--shard", f"{i}/3", "-o", part)
        assert result.exit_code == 0, result.output
    whole, *shards = [Profile.load(path) for path in (tmp_path / "whole.json", *parts)]
    merged = merge(merge(shards[0], shards[1]), shards[2])
    assert merged.statistics.prompt_hashes == whole.statistics.prompt_hashes
    assert merged.data_fingerprint == whole.data_fingerprint
    counts = [part.sensitivity_sums.moments["snapkv"][1000].count for part in (*shards, merged, whole)]
    assert counts == [2, 2, 1, 5, 5]
    for one, other in zip(merged.statistics.layers, whole.statistics.layers, strict=True):
        assert (one.cosine.sum == other.cosine.sum).all() and (one.entropy.squares == other.entropy.squares).all()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3"])
def test_bad_shards_are_refused_before_the_model_is_loaded(tmp_path, text):
    result = invoke(tmp_path / "none", "--shard", text, "-o", tmp_path / "p.json")
    assert isinstance(result.exception, KVPlanError)
    assert str(result.exception) == f"--shard {text}: write for example 1/4 to 4/4 for the four parts of the prompts"


def test_more_shards_than_prompts_are_refused(folder, tmp_path):
    args = (folder, "--data", folder / "text.txt", "--max-tokens", 80, "-o", tmp_path / "p.json")
    result = invoke(*args, "--shard", "1/4000")
    assert "prompts for sensitivity; use fewer shards" in str(result.exception)
    result = invoke(*args, "--shard", "1/4000", "--no-sensitivity")
    assert "there are only" in str(result.exception) and "prompts; use fewer shards" in str(result.exception)
