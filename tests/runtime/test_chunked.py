"""Prompts in chunks: one chunk is one shot, budgets above the length are the model itself, bytes stay bounded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import CHUNKS, model, prompts

import kvplan
from kvplan.calibrate.examples import Example
from kvplan.check.scoring import Scorer
from kvplan.errors import RuntimeLimitError
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.evictors import evictors
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach, spec_of
from kvplan.runtime.generation import generate
from kvplan.runtime.replay import positions_of, prefill

pytestmark = pytest.mark.skipif(not CHUNKS, reason="this transformers is refused: see test_refusals.py")
NAMES = [name for name in evictors.names() if name != "corm"]
CHUNK = 8


def policy_of(made: Any, name: str, slots: Slots, chunk: int | None = CHUNK, **fields: Any) -> Policy:
    """That evictor on every full-attention layer; native windows stay as they are."""
    fields = {"sink_tokens": 2, "recent_tokens": 4, "min_slots": 8, "evictor": evictors[name](), **fields}
    layers = tuple(LayerPolicy(slots=FULL if s.window else slots, **fields) for s in spec_of(made).layers)
    return Policy(layers=layers, prefill_chunk_tokens=chunk)


def greedy(made: Any, inputs: dict[str, torch.Tensor], cache: Any = None, new_tokens: int = 10) -> Any:
    return made.generate(
        **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def assert_same(found: Any, expected: Any, rtol: float = 2e-7, atol: float = 0) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def llama() -> Any:
    return model("llama", torch.float64)


# Prompts that end before, at and after the end of a chunk; a row of one token; rows whose first chunks are padding.
BATCHES = [(40,), (39,), (41,), (7,), (8,), (40, 23, 31, 9), (24, 1), (25, 3, 16)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox", "opt", "gpt_oss"])
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_budget_above_the_length_is_the_model_itself(family: str, name: str) -> None:
    made = model(family, torch.float64)
    for lengths in BATCHES if name == "h2o" else BATCHES[4:6]:
        inputs = prompts(lengths)
        expected = greedy(made, inputs)
        for policy in (policy_of(made, name, Slots(64)), policy_of(made, name, FULL, chunk=5)):
            with attach(made, policy) as runtime:
                cache = runtime.new_cache()
                assert_same(greedy(made, inputs, cache), expected)
                assert cache.report()["tokens_seen"] == [n + 9 for n in lengths]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [40, 64])
def test_one_chunk_decides_as_one_shot(llama: Any, name: str, chunk: int) -> None:
    inputs = prompts((40, 23, 31, 9))
    for slots in (Slots(14), Slots(share=4000)):
        caches, found = [], []
        for size in (None, chunk):
            with attach(llama, policy_of(llama, name, slots, size)) as runtime:
                caches.append(runtime.new_cache())
                # The layers' later inputs come from the cut cache, so only the first layer sees the same prompt.
                llama(**inputs, position_ids=positions_of(inputs["attention_mask"]), past_key_values=caches[-1])
                found.append(caches[-1].layers[0])
        for row in range(4):
            a, b = (layer.pool.row(row).columns for layer in found)
            assert torch.equal(a["keys.x"], b["keys.x"]) and torch.equal(a["values.x"], b["values.x"])


def one_shot_keys(made: Any, inputs: dict[str, torch.Tensor], policy: Policy) -> list[torch.Tensor]:
    with attach(made, policy) as runtime:
        cache = runtime.new_cache()
        made(**inputs, past_key_values=cache)
        return [layer.pool.row(0).columns["keys.x"] for layer in cache.layers]


@pytest.mark.parametrize("name", ["streaming", "sliding"])
@pytest.mark.parametrize("length", [39, 40])
def test_chunks_leave_the_tokens_that_one_shot_leaves(llama: Any, name: str, length: int) -> None:
    """Where what stays is a matter of position alone: the same slots in the same order, in the first layer."""
    inputs = prompts((length,))
    with attach(llama, policy_of(llama, name, Slots(14))) as runtime:
        cache = runtime.new_cache()
        prefill(runtime, cache, inputs["input_ids"], inputs["attention_mask"].bool())
        chunked = cache.layers[0].pool.row(0).columns
    expected = one_shot_keys(llama, inputs, policy_of(llama, name, Slots(14), None))[0]
    torch.testing.assert_close(chunked["keys.x"], expected, rtol=1e-10, atol=1e-12)
    kept = list(range(length - 14, length)) if name == "sliding" else [0, 1, *range(length - 12, length)]
    assert (
        chunked["positions"][
            0,
            0,
            :,
        ].tolist()
        == kept
    )


@pytest.mark.parametrize("name", NAMES)
def test_sinks_and_recent_tokens_stay_in_every_chunk(llama: Any, name: str) -> None:
    inputs = prompts((45, 30))
    valid, T = inputs["attention_mask"].bool(), 45
    with attach(llama, policy_of(llama, name, Slots(12), recent_tokens=5)) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        for start in range(0, T, CHUNK):
            now = slice(start, start + CHUNK)
            at = positions_of(valid)[:, now]
            llama(
                inputs["input_ids"][:, now], attention_mask=valid[:, : now.stop].long(), position_ids=at,
                past_key_values=cache,
            )  # fmt: skip
            for row in range(2):
                seen = int(valid[row, : now.stop].sum())
                layer = cache.layers[2]
                assert layer.seen(row) == seen and layer.held(row) == min(seen, 12)
                positions = layer.pool.row(row).positions[0]
                for head in positions:
                    recent = set(range(max(0, seen - 5), seen))
                    assert recent | (set() if name == "sliding" else set(range(min(2, seen)))) <= set(head.tolist())
                    assert len(set(head.tolist())) == min(seen, 12)
                    assert max(head.tolist(), default=0) < max(seen, 1)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "knorm", "tova", "keydiff", "scissorhands"])
def test_scores_are_those_of_plain_attention_over_slots_and_chunk(llama: Any, name: str) -> None:
    """The second chunk of the first layer by hand: the slots in order of time, then the chunk, ranked as one prompt."""
    evictor = evictors["snapkv"](window_tokens=3) if name == "snapkv" else evictors[name]()
    policy = policy_of(llama, name, Slots(12), 16, evictor=evictor)
    inputs = prompts((32,))
    seen: dict[str, Any] = {}
    with attach(llama, policy) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        layer = cache.layers[0]
        take = layer.append_chunk

        def watching(q: Any, keys: Any, values: Any, valid: Any, args: Any) -> Any:
            if layer.pool is not None:
                seen.update(q=q, keys=keys, args=args, old={k: v.clone() for k, v in layer.pool.row(0).columns.items()})
            return take(q, keys, values, valid, args)

        layer.append_chunk = watching
        prefill(runtime, cache, inputs["input_ids"], inputs["attention_mask"].bool())
    q, new, old, scaling = seen["q"][0], seen["keys"][0], seen["old"], seen["args"].scaling
    for head in range(2):
        at = old["positions"][0, min(head, old["positions"].shape[1] - 1)]
        order = at.argsort()
        keys = torch.cat([old["keys.x"][0, head][order], new[head]])
        times = [*at[order].tolist(), *range(16, 32)]
        N = len(times)
        logits = q[head * 2 : head * 2 + 2] @ keys.T * scaling  # [G, 16, N]
        causal = torch.arange(N) <= N - 16 + torch.arange(16)[:, None]
        probs = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        if name == "h2o":
            scores = probs.mean(0).sum(0) + torch.cat([old["scores"][0, head][order].double(), torch.zeros(16)])
        elif name == "knorm":
            scores = -keys.norm(dim=-1)
        elif name == "keydiff":
            unit = keys / keys.norm(dim=-1, keepdim=True)
            scores = -(unit @ unit.T).sum(-1)
        elif name == "scissorhands":
            seen_by = causal.sum(-1, keepdim=True)
            scores = -((probs <= 1 / seen_by) & causal).double().mean(0).sum(0)
        elif name == "snapkv":
            votes = probs[:, -3:].mean((0, 1))[:-3].tolist()
            padded = [0.0, 0.0, *votes, 0.0, 0.0]
            scores = torch.tensor([sum(padded[i : i + 5]) / 5 for i in range(N - 3)] + [2.0] * 3)
        else:
            continue  # tova is ranked over both heads: below
        check_kept(cache, head, times, scores)
    if name == "tova":
        both = []
        for head in range(2):
            order = old["positions"][0, 0].argsort()
            keys = torch.cat([old["keys.x"][0, head][order], new[head]])
            both.append((q[head * 2 : head * 2 + 2, -1] @ keys.T * scaling).softmax(-1).mean(0))
        check_kept(cache, 0, [*old["positions"][0, 0].sort().values.tolist(), *range(16, 32)], sum(both) / 2)


def check_kept(cache: Any, head: int, times: list[int], scores: torch.Tensor) -> None:
    ranked = sorted((i for i, t in enumerate(times) if 2 <= t < 28), key=lambda i: (-float(scores[i]), -i))
    kept = {0, 1, 28, 29, 30, 31, *(times[i] for i in ranked[:6])}
    assert set(cache.layers[0].pool.row(0).positions[0, head].tolist()) == kept


@pytest.mark.parametrize("codec", [{}, {"key_codec": Int8(), "value_codec": Int8()}], ids=["dense", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_plan_and_the_peak_is_bounded(llama: Any, name: str, codec: dict[str, Any]) -> None:
    lengths = (61, 30, 44)
    inputs, spec = prompts(lengths), spec_of(llama)
    policy = policy_of(llama, name, Slots(share=3000), **codec)
    with attach(llama, policy) as runtime:
        cache = runtime.new_cache()
        greedy(llama, inputs, cache, 6)
        assert cache.kv_bytes == plan(policy, spec, lengths, 5).total == cache.report()["kv_bytes_planned"]
        assert sum(cache.row_bytes(row) for row in range(3)) == cache.kv_bytes
        # The pools, plus one layer twice (before and after) and, as the model made it, beside its chunk.
        prompt = plan(policy, spec, lengths, 0)
        wide = 3 * (max(prompt.slots[0] // 3, 19) + CHUNK) * spec.token_bytes(0)
        assert cache.peak_kv_bytes <= prompt.total + 2 * max(layer.total for layer in prompt.layers) + wide
        assert cache.peak_kv_bytes < cache.full_kv_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_equals_the_same_tokens_one_by_one(llama: Any, name: str) -> None:
    lengths = (41, 30)
    inputs = prompts(lengths)
    valid = inputs["attention_mask"].bool()
    turn = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    outputs = []
    for codec in ({}, {"key_codec": Int8()}):
        outputs.clear()
        for cuts in ([0, 20], [0, 1, 8, 16, 20], list(range(21))):
            with attach(llama, policy_of(llama, name, Slots(14), chunk=16, **codec)) as runtime, torch.no_grad():
                cache = runtime.new_cache()
                prefill(runtime, cache, inputs["input_ids"], valid)
                parts = []
                for a, b in itertools.pairwise(cuts):
                    at = torch.tensor(lengths)[:, None] + torch.arange(a, b)
                    parts.append(llama(turn[:, a:b], position_ids=at, past_key_values=cache).logits)
                assert cache.layers[0].prompt_lengths == list(lengths) and cache.layers[0].appended == 20
                outputs.append(torch.cat(parts, 1))
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv"])
@pytest.mark.parametrize("length", [39, 40, 41])
def test_generate_and_the_scorer_agree(llama: Any, name: str, length: int) -> None:
    policy = policy_of(llama, name, Slots(share=4000))
    inputs = prompts((length,))
    with attach(llama, policy) as runtime:
        found = greedy(llama, inputs, runtime.new_cache(), 12)
    answer = found.sequences[0, length:].tolist()
    example = Example("0", "t", tuple(inputs["input_ids"][0].tolist()), tuple(answer), ((0, 12),), False, "", None)
    scores = Scorer(llama, spec_of(llama), [example]).score(policy)
    nll = -sum(logits[0].log_softmax(-1)[t].item() for logits, t in zip(found.logits, answer, strict=True)) / 12
    assert scores.nll[0] == pytest.approx(nll, abs=1e-6)
    assert scores.task[0] == 1.0


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_s_settings_come_back(llama: Any, failing: bool) -> None:
    for before in (None, 3):
        llama.generation_config.prefill_chunk_size = before
        try:
            with attach(llama, policy_of(llama, "h2o", Slots(14))):
                assert llama.generation_config.prefill_chunk_size == CHUNK
                if failing:
                    raise RuntimeError("broken off")
        except RuntimeError:
            pass
        assert llama.generation_config.prefill_chunk_size == before
        with attach(llama, policy_of(llama, "h2o", Slots(14), None)):
            assert llama.generation_config.prefill_chunk_size == before
    llama.generation_config.prefill_chunk_size = None


def test_padding_between_the_chunks_is_refused(llama: Any) -> None:
    ids = prompts((16,))["input_ids"].repeat(2, 1)
    for hole in ([1] * 8 + [0] * 4 + [1] * 4, [1] * 8 + [0] * 8, [1] * 12 + [0] * 4):
        mask = torch.tensor([[1] * 16, hole])
        with attach(llama, policy_of(llama, "h2o", Slots(14))) as runtime:
            with pytest.raises(RuntimeLimitError, match="left padding"):
                prefill(runtime, runtime.new_cache(), ids, mask.bool())


def test_a_row_without_any_token_is_refused(llama: Any) -> None:
    ids = prompts((20,))["input_ids"].repeat(2, 1)
    mask = torch.tensor([[1] * 20, [0] * 20]).bool()
    with attach(llama, policy_of(llama, "h2o", Slots(14))) as runtime:
        with pytest.raises(RuntimeLimitError, match="no token at all"):
            prefill(runtime, runtime.new_cache(), ids, mask)


def test_a_shared_layer_reads_slots_and_chunk(llama: Any) -> None:
    """With budgets above the length: as the same map without chunks."""
    inputs = prompts((30, 17))
    logits = []
    for chunk in (None, 7):
        own = LayerPolicy(slots=Slots(64), evictor=evictors["h2o"](), recent_tokens=4)
        policy = Policy(layers=(own, LayerPolicy(shares=0), own, LayerPolicy(shares=2)), prefill_chunk_tokens=chunk)
        with kvplan.attach(llama, policy) as runtime:
            logits.append(greedy(llama, inputs, runtime.new_cache()))
    assert_same(logits[1], logits[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", [16, 17, 18])
def test_the_bytes_of_a_generated_row_are_those_of_its_plan(tiny_llama: Any, tiny_tokenizer: Any, length: int) -> None:
    policy = policy_of(tiny_llama, "h2o", Slots(share=6000))
    batch = [list(range(5, 5 + n)) for n in (length, 9)]
    with attach(tiny_llama, policy) as runtime:
        for row in generate(runtime, tiny_tokenizer, batch, max_new_tokens=7):
            assert row.kv_bytes == row.kv_bytes_planned
