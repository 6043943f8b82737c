"""Replay is the runtime: the same scores as prefilling and decoding anew, for every evictor."""

from __future__ import annotations

import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from families import model, prompts

from kvplan.calibrate.examples import Example
from kvplan.check.scoring import Scorer
from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, spec_of
from kvplan.runtime.replay import PromptCapture, capture
from kvplan.runtime.restart import decoder_layers


def examples(lengths: tuple[int, ...], continuation: int = 9) -> list[Example]:
    made = []
    for i, n in enumerate(lengths):
        ids = prompts((n + continuation,), seed=i)["input_ids"][0].tolist()
        made.append(Example(str(i), "t", tuple(ids[:n]), tuple(ids[n:]), ((2, 4), (6, 9)), False, "", None))
    return made


def policy(name: str, layers: int = 4, **kwargs: object) -> Policy:
    layer = LayerPolicy(slots=Slots(share=4000), sink_tokens=2, recent_tokens=4, min_slots=8, evictor=evictors[name]())
    return Policy(layers=(layer,) * layers)


def by_hand(made, chosen: Policy, example: Example) -> tuple[float, float]:
    """KL and top-1 from whole prefills and single steps through the attached model."""

    def logprobs(p: Policy) -> torch.Tensor:
        with attach(made, p) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            rows = [made(torch.tensor([example.prompt_ids]), past_key_values=cache).logits[0, -1]]
            for i, token in enumerate(example.continuation_ids[:-1]):
                position = torch.tensor([[len(example.prompt_ids) + i]])
                rows.append(made(torch.tensor([[token]]), position_ids=position, past_key_values=cache).logits[0, -1])
        return torch.stack(rows).log_softmax(-1)

    full = logprobs(Policy(layers=(LayerPolicy(slots=FULL),) * 4))
    found = logprobs(chosen)
    return (full.exp() * (full - found)).sum(-1).mean().item(), (
        full.argmax(-1) == found.argmax(-1)
    ).double().mean().item()


@pytest.mark.parametrize("name", evictors.names())
def test_replay_equals_the_runtime(name: str) -> None:
    made = model("llama")
    items = examples((40, 23, 31))
    scores = Scorer(made, spec_of(made), items).score(policy(name))
    for i, example in enumerate(items):
        kl, top1 = by_hand(made, policy(name), example)
        assert scores.kl[i] == pytest.approx(kl, abs=1e-5)
        assert scores.top1[i] == pytest.approx(top1)
    assert max(scores.kl) > 1e-4


def test_sharing_is_run_honestly() -> None:
    made = model("qwen3")
    items = examples((40, 23))
    base = policy("snapkv").layers[0]
    shared = Policy(layers=(base, base, LayerPolicy(shares=0), base))
    scores = Scorer(made, spec_of(made), items).score(shared)
    for i, example in enumerate(items):
        assert scores.kl[i] == pytest.approx(by_hand(made, shared, example)[0], abs=1e-5)


@pytest.mark.parametrize(("starts", "sharing"), [(True, False), (True, True), (False, True)])
def test_sharing_is_captured_once_from_the_first_layer_that_shares_otherwise(
    monkeypatch: pytest.MonkeyPatch, starts: bool, sharing: bool
) -> None:
    made, firsts = model("qwen3"), []

    def noting(*args: Any) -> PromptCapture:
        firsts.append(args[-1])
        return capture(*args)

    monkeypatch.setattr("kvplan.check.scoring.capture", noting)
    if not starts:
        monkeypatch.setattr("kvplan.check.scoring.can_start_at", lambda *args: False)
    items = examples((40, 23))
    scorer = Scorer(made, spec_of(made), items, sharing=sharing)
    scorer.prepare()
    firsts.clear()
    full, cut, tight = LayerPolicy(), policy("snapkv").layers[0], policy("h2o").layers[0]
    for layers, first in [
        ((cut, cut, cut, LayerPolicy(shares=1)), 3 if starts and sharing else 0),
        ((tight, cut, tight, LayerPolicy(shares=1)), None),
        ((full, cut, LayerPolicy(shares=1), LayerPolicy(shares=1)), 2 if starts else 0),
        ((tight, cut, LayerPolicy(shares=1), cut), 3 if starts else 0),
        ((full, full, cut, LayerPolicy(shares=2)), 3 if starts else 0),
        ((tight, tight, tight, LayerPolicy(shares=1)), None),
        ((full, full, full, LayerPolicy(shares=1)), None),
    ]:
        scores = scorer.score(Policy(layers=layers))
        assert firsts == ([] if first is None else [first]), layers
        firsts.clear()
        for i, example in enumerate(items):
            assert scores.kl[i] == pytest.approx(by_hand(made, Policy(layers=layers), example)[0], abs=1e-5)


@pytest.mark.parametrize(("memory", "encoded"), [(0, 3), (2**40, 1)])
def test_prompts_are_encoded_once_where_their_codes_find_room(
    monkeypatch: pytest.MonkeyPatch, memory: int, encoded: int
) -> None:
    made, items, tokens = model("llama"), examples((40,)), []
    encode = Int8.encode

    def noting(self: Int8, x: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens.append(x.shape[-2])
        return encode(self, x)

    scorer = Scorer(made, spec_of(made), items, replay_memory=memory)
    scorer.prepare()
    held = scorer.store.file_bytes
    monkeypatch.setattr(Int8, "encode", noting)
    full = Policy(layers=(LayerPolicy(key_codec=Int8()),) * 4)
    scores = [scorer.score(full) for _ in range(3)]
    assert tokens.count(40) == 4 * encoded and scores[0] == scores[1] == scores[2]
    assert scorer.store.file_bytes == held


def test_few_choices_of_shared_layers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplan.check.scoring.MOST_SHARED", 2)
    made = model("llama")
    scorer = Scorer(made, spec_of(made), examples((20,)))
    full, kept = LayerPolicy(), []
    for shares in (0, 1, 2, 0, 1):
        scorer.score(Policy(layers=(full, full, full, LayerPolicy(shares=shares))))
        kept.append([key[3] for batch in scorer._batches.values() for key in batch.prompts])
    assert kept == [[None, 0], [None, 0, 1], [None, 1, 2], [None, 2, 0], [None, 0, 1]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gemma4_text"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_layers_before_the_first_cut_one_are_not_run_again(family: str, cut: int) -> None:
    made, items = model(family), examples((40, 23))
    chosen, scorer = policy("tova").layers[0], Scorer(made, spec_of(made), items)
    changed = [i for i in range(cut, 4) if scorer.spec.layers[i].window is None]
    layers = tuple(chosen if i in changed else LayerPolicy() for i in range(4))
    scores, ran = scorer.score(Policy(layers=layers)), []
    for i, layer in enumerate(decoder_layers(made, 4) or ()):
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
        attention.register_forward_hook(lambda *args, i=i: ran.append(i))
    assert scorer.score(Policy(layers=layers)) == scores
    assert ran == list(range(changed[0], 4))
    for i, example in enumerate(items):
        assert scores.kl[i] == pytest.approx(by_hand(made, Policy(layers=layers), example)[0], abs=1e-5)


@pytest.mark.parametrize("memory", [0, 60_000])
def test_prompts_in_files_score_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, items = model("qwen3"), examples((40, 23, 31))
    base = policy("h2o").layers[0]
    policies = [
        policy("h2o"),
        policy("snapkv"),
        Policy(layers=(replace(base, channels=ThinK(recent=4)),) * 4),
        Policy(layers=(base, LayerPolicy(), LayerPolicy(shares=0), base)),
        Policy(layers=(LayerPolicy(), LayerPolicy(), LayerPolicy(), base)),
    ]
    small, large = (Scorer(made, spec_of(made), items, replay_memory=m, batch_tokens=80) for m in (memory, 2**40))
    for chosen in policies * 2:
        assert small.measure(chosen) == large.measure(chosen)
    assert small.store.file_bytes > 100_000 and large.store.file_bytes == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    del small
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_scores_do_not_depend_on_batching_or_on_what_else_is_asked() -> None:
    made = model("llama", torch.float64)
    items = examples((40, 23, 31, 12, 36))
    whole = Scorer(made, spec_of(made), items, batch_tokens=120).score(policy("h2o"))
    single = Scorer(made, spec_of(made), items, batch_tokens=1, keep=False).score(policy("h2o"), [3, 0])
    assert single.kl == pytest.approx((whole.kl[3], whole.kl[0]), abs=1e-6)
    assert single.task == (whole.task[3], whole.task[0])


def test_prepared_prompts_are_not_prefilled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, captured, steps = model("llama"), [], []

    def counting(*args: Any) -> PromptCapture:
        captured.append(args)
        return capture(*args)

    monkeypatch.setattr("kvplan.check.scoring.capture", counting)
    scorer = Scorer(made, spec_of(made), examples((40, 23, 31, 12)), batch_tokens=80)
    scorer.prepare([0, 2, 3], lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (3, 3)] and len(captured) == 2
    scores = scorer.score(policy("snapkv"), [3, 0, 2])
    assert len(captured) == 2
    assert scores == Scorer(made, spec_of(made), scorer.examples, batch_tokens=80).score(policy("snapkv"), [3, 0, 2])


def test_the_full_policy_loses_nothing() -> None:
    made = model("llama")
    measured = Scorer(made, spec_of(made), examples((40, 23))).measure(Policy(layers=(LayerPolicy(slots=FULL),) * 4))
    assert measured.kv_bytes == measured.full_kv_bytes
    assert max(measured.scores.kl) < 1e-9
    assert set(measured.scores.top1) == {1.0}
