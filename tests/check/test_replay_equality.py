"""Scores are those of the real runtime: for every evictor, codec, merger, head split and channel selector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from families import model, prompts

from kvplan.calibrate.examples import Example
from kvplan.check.scoring import Scorer
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, spec_of
from kvplan.runtime.replay import capture, replay

LENGTHS = (40, 23, 31)
CONTINUATION = 21  # more than a ring of recent tokens holds, so that units are encoded and overwritten
GROUPS = codecs["kivi"](bits=2, group=4, residual_tokens=8)


def evictor(name: str) -> Any:
    small = {"corm": {"window_tokens": 5}, "snapkv": {"window_tokens": 5}, "lagkv": {"lag_tokens": 5}}
    return evictors[name](**small.get(name, {}))


def small(name: str) -> Any:
    return GROUPS if name == "kivi" else codecs[name]()


KINDS: dict[str, dict[str, Any]] = {
    **{f"evictor {name}": {"evictor": evictor(name)} for name in evictors.names()},
    **{f"codec {name}": {"evictor": evictor("snapkv"), "key_codec": small(name), "value_codec": small(name)}
       for name in codecs.names()},
    **{f"scored {name}": {"evictor": evictor("h2o"), "key_codec": small(name), "value_codec": small(name)}
       for name in codecs.names() if name != "kivi"},
    **{f"full {name}": {"slots": FULL, "key_codec": small(name), "value_codec": small(name)}
       for name in codecs.names()},
    **{f"merger {name}": {"merger": mergers[name](), "evictor": evictor("snapkv")} for name in mergers.names()},
    **{f"channels {name}": {"channels": channel_selectors[name](recent=8), "evictor": evictor("h2o")}
       for name in channel_selectors.names()},
    **{f"split {name}": {"head_split": head_splits[name](), "evictor": evictor("knorm")}
       for name in head_splits.names()},
    "cam in a ring": {"merger": mergers["cam"](span=8), "key_codec": codecs["int8"]()},
    "cam by rank": {"merger": mergers["cam"](span=64), "evictor": evictor("knorm")},
    "corm int8": {"evictor": evictor("corm"), "key_codec": codecs["int8"](), "value_codec": codecs["fp8"]()},
    "tova staged": {"evictor": evictor("tova"), "key_codec": codecs["int8"](), "value_codec": GROUPS},
    "think and kivi": {"channels": channel_selectors["think"](recent=8, drop=0.5), "key_codec": codecs["turboquant"](),
                       "value_codec": GROUPS, "evictor": evictor("knorm")},
    "think, merged": {"channels": channel_selectors["think"](recent=8), "merger": mergers["kvmerger"](),
                      "evictor": evictor("h2o")},
    "adakv and cam": {"head_split": head_splits["adakv"](), "merger": mergers["cam"](), "evictor": evictor("snapkv")},
    "adakv and think": {"head_split": head_splits["adakv"](), "channels": channel_selectors["think"](recent=8),
                        "evictor": evictor("h2o")},
    "heads": {"slots": Slots(heads=(Slots(20), Slots(share=7000))), "evictor": evictor("h2o")},
    "all of it": {"slots": Slots(heads=(Slots(20), Slots(share=7000))), "evictor": evictor("snapkv"),
                  "merger": mergers["kvmerger"](), "channels": channel_selectors["think"](recent=8),
                  "key_codec": codecs["int8"](), "value_codec": GROUPS},
}  # fmt: skip


def policy_of(kind: str, chunk: int | None = None) -> Policy:
    fields = {"slots": Slots(share=4000), "min_slots": 20, "sink_tokens": 2, "recent_tokens": 4, **KINDS[kind]}
    return Policy(layers=(LayerPolicy(**fields),) * 4, prefill_chunk_tokens=chunk)


def examples() -> list[Example]:
    made = []
    for i, n in enumerate(LENGTHS):
        ids = prompts((n + CONTINUATION,), seed=i)["input_ids"][0].tolist()
        made.append(Example(str(i), "t", tuple(ids[:n]), tuple(ids[n:]), ((2, 4),), False, "", None))
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return model("llama", torch.float64)


@pytest.fixture(scope="module")
def scorer(llama: Any) -> Scorer:
    return Scorer(llama, spec_of(llama), examples())


def log_probabilities(llama: Any, policy: Policy, example: Example) -> torch.Tensor:
    """[C, V] by whole prefills (or chunks, as generate cuts them) and single steps."""
    n = len(example.prompt_ids)
    with attach(llama, policy) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        step = policy.prefill_chunk_tokens or n
        for start in range(0, n, step):
            ids = torch.tensor([example.prompt_ids[start : start + step]])
            at = torch.arange(start, start + ids.shape[1])[None]
            rows = [llama(ids, position_ids=at, past_key_values=cache).logits[0, -1]]
        for i, token in enumerate(example.continuation_ids[:-1]):
            at = torch.tensor([[n + i]])
            rows.append(llama(torch.tensor([[token]]), position_ids=at, past_key_values=cache).logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


@pytest.fixture(scope="module")
def full(llama: Any) -> list[torch.Tensor]:
    policy = Policy(layers=(LayerPolicy(slots=FULL),) * 4)
    return [log_probabilities(llama, policy, example) for example in examples()]


def assert_scored(scorer: Scorer, full: list[torch.Tensor], llama: Any, policy: Policy) -> None:
    scores = scorer.score(policy)
    for i, example in enumerate(scorer.examples):
        found = log_probabilities(llama, policy, example)
        kl = (full[i].exp() * (full[i] - found)).sum(-1).mean().item()
        nll = -found[range(CONTINUATION), list(example.continuation_ids)].mean().item()
        assert scores.kl[i] == pytest.approx(max(kl, 0), abs=1e-5)
        assert scores.nll[i] == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_runtime(scorer: Scorer, full: list[torch.Tensor], llama: Any, kind: str) -> None:
    policy = policy_of(kind)
    assert_scored(scorer, full, llama, policy)
    if not policy.layers[0].slots.is_full:
        assert max(scorer.score(policy).kl) > 1e-3


@pytest.mark.parametrize("kind", [f"evictor {name}" for name in evictors.names() if name != "corm"] + ["scored int8"])
@pytest.mark.parametrize("chunk", [10, 11])  # 40 is four whole chunks of 10, and 31 and 23 leave a single token
def test_chunked_scores_are_those_of_each_prompt_alone(
    scorer: Scorer, full: list[torch.Tensor], llama: Any, kind: str, chunk: int
) -> None:
    assert_scored(scorer, full, llama, policy_of(kind, chunk))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoded", [False, True])
def test_a_replayed_cache_is_the_real_one_bit_for_bit(llama: Any, kind: str, encoded: bool) -> None:
    inputs, policy, spec = prompts(LENGTHS), policy_of(kind), spec_of(llama)
    valid = inputs["attention_mask"].bool()
    everything = Policy(layers=(LayerPolicy(slots=FULL),) * 4)
    prompt = capture(llama, everything, spec, inputs["input_ids"], valid)
    prompt.has_room = lambda size: encoded
    with attach(llama, policy) as runtime, torch.no_grad():
        replayed, real = replay(runtime, prompt), runtime.new_cache()
        at = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        llama(**inputs, position_ids=at, past_key_values=real)
        assert replayed.kv_bytes == real.kv_bytes and replayed.get_seq_length() == real.get_seq_length()
        for mine, theirs in zip(replayed.layers, real.layers, strict=True):
            for a, b in zip(mine.storage, theirs.storage, strict=True):
                assert a.sizes == b.sizes
                assert all(torch.equal(a.buffers[name], b.buffers[name]) for name in b.buffers)
