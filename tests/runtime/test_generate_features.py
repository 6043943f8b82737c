"""What transformers' generate can do, with a policy of every layer kind: it works, or one clear line refuses it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import CHUNKS, model, prompts
from torch import Tensor

from kvplan.errors import RuntimeLimitError
from kvplan.methods.channels.think import ThinK
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.corm import CORM
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.methods.mergers.cam import CaM
from kvplan.methods.mergers.kvmerger import KVMerger
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import positions_of

H2O, SNAPKV = evictors["h2o"](), evictors["snapkv"](window_tokens=8)
SMALL_KIVI = KIVI(bits=4, group=4, residual_tokens=8)
KINDS: dict[str, dict[str, Any]] = {
    "full": {"slots": FULL},
    "ring": {"evictor": SNAPKV},
    "scored": {"evictor": H2O},
    "one set": {"evictor": evictors["tova"]()},
    "int8": {"evictor": H2O, "key_codec": Int8(), "value_codec": Int8()},
    "kivi": {"slots": Slots(20), "evictor": SNAPKV, "key_codec": SMALL_KIVI, "value_codec": SMALL_KIVI},
    "full kivi": {"slots": FULL, "key_codec": SMALL_KIVI, "value_codec": SMALL_KIVI},
    "think": {"slots": Slots(18), "evictor": H2O, "channels": ThinK(drop=0.4, recent=8)},
    "heads": {"slots": Slots(heads=(Slots(10), Slots(share=5000))), "evictor": H2O},
    "adakv": {"evictor": SNAPKV, "head_split": AdaKV()},
    "corm": {"evictor": CORM(window_tokens=6)},
    "cam": {"merger": CaM(span=4)},
    "kvmerger": {"evictor": H2O, "merger": KVMerger()},
    "chunked": {"evictor": H2O},
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "full": {"slots": FULL},
    "ring": {"evictor": SNAPKV},
    "scored": {"evictor": H2O},
    "think": {"evictor": H2O, "channels": ThinK(drop=0.0, recent=8)},
    "heads": {"slots": Slots(heads=(Slots(64), Slots(share=10_000))), "min_slots": 64, "evictor": H2O},
    "adakv": {"evictor": SNAPKV, "head_split": AdaKV()},
    "corm": {"evictor": CORM(window_tokens=1000)},
    "cam": {"merger": CaM()},
    "kvmerger": {"evictor": H2O, "merger": KVMerger()},
    "chunked": {"evictor": H2O},
}
if not CHUNKS:
    del KINDS["chunked"], LOSSLESS["chunked"]
LENGTHS = (30, 17)
OPTIONS = {"pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def llama() -> Any:
    return model("llama", torch.float64)


def policy_of(kind: str, kinds: dict[str, dict[str, Any]] = KINDS, shared: bool = True, slots: int = 14) -> Policy:
    """That layer everywhere; the last layer reads the one before it."""
    fields = {"slots": Slots(slots), "sink_tokens": 2, "recent_tokens": 4, "min_slots": 8, **kinds[kind]}
    layer = LayerPolicy(**fields)
    last = LayerPolicy(shares=2) if shared else layer
    return Policy(layers=(layer, layer, layer, last), prefill_chunk_tokens=7 if kind == "chunked" else None)


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x[row : row + 1, -LENGTHS[row] :] for name, x in inputs.items()}


# Where the chunks of a row end depends on the padding before it.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chunked"])
def test_greedy_and_beams_of_a_batch_are_those_of_its_rows(llama: Any, kind: str) -> None:
    inputs, new = prompts(LENGTHS), OPTIONS["max_new_tokens"]
    with attach(llama, policy_of(kind)) as runtime:
        for beams in (1, 3):
            cache = runtime.new_cache()
            together = llama.generate(**inputs, past_key_values=cache, do_sample=False, num_beams=beams, **OPTIONS)
            cache.report()
            for row in range(2):
                alone = llama.generate(
                    **row_of(inputs, row), past_key_values=runtime.new_cache(), do_sample=False, num_beams=beams,
                    **OPTIONS,
                )  # fmt: skip
                assert torch.equal(together[row, -new:], alone[0, -new:]), (beams, row)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_kind_that_loses_nothing_gives_the_model_s_own(llama: Any, kind: str) -> None:
    inputs = prompts(LENGTHS)
    policy = policy_of(kind, LOSSLESS, shared=False, slots=64)
    for settings in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        torch.manual_seed(1)
        expected = llama.generate(**inputs, **settings, **OPTIONS)
        torch.manual_seed(1)
        with attach(llama, policy) as runtime:
            found = llama.generate(**inputs, past_key_values=runtime.new_cache(), **settings, **OPTIONS)
        assert torch.equal(found, expected), settings


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_repeats_and_gives_several_sequences(llama: Any, kind: str) -> None:
    inputs, found = prompts(LENGTHS), []
    with attach(llama, policy_of(kind)) as runtime:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            cache = runtime.new_cache()
            found.append(
                llama.generate(
                    **inputs, past_key_values=cache, do_sample=True, temperature=2.0, num_return_sequences=2, **OPTIONS
                )
            )
            assert found[-1].shape == (4, 38) and cache.layers[0].num_rows == 4
            cache.report()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def turn(llama: Any, runtime: Any, cuts: list[int], ids: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    cache = runtime.new_cache()
    mask, parts = inputs["attention_mask"], []
    step = runtime.policy.prefill_chunk_tokens or mask.shape[1]
    with torch.no_grad():
        for start in range(0, mask.shape[1], step):
            now = slice(start, start + step)
            llama(
                inputs["input_ids"][:, now], attention_mask=mask[:, : start + step],
                position_ids=positions_of(mask)[:, now], past_key_values=cache,
            )  # fmt: skip
        for a, b in itertools.pairwise(cuts):
            at = mask.sum(-1, keepdim=True) + torch.arange(a, b)
            parts.append(llama(ids[:, a:b], position_ids=at, past_key_values=cache).logits)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_at_once_equal_the_same_one_by_one(llama: Any, kind: str) -> None:
    inputs = prompts(LENGTHS)
    ids = torch.randint(3, 96, (2, 26), generator=torch.Generator().manual_seed(4))
    with attach(llama, policy_of(kind)) as runtime:
        found = [turn(llama, runtime, cuts, ids, inputs) for cuts in (list(range(27)), [0, 9, 10, 26])]
        for row in range(2):
            assert [layer.held(row) for layer in found[0][1].layers[:3]] == [
                layer.held(row) for layer in found[1][1].layers[:3]
            ]
        for logits, cache in found:
            torch.testing.assert_close(logits, found[0][0], rtol=1e-5, atol=1e-6)
            report = cache.report()
            for layer, policy in zip(report["layers"][:3], runtime.policy.layers, strict=False):
                if not policy.slots.is_full and not policy.slots.heads:
                    assert max(layer["held"]) <= policy.slots.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_through_generate(llama: Any, kind: str) -> None:
    inputs = {"input_ids": prompts((30,))["input_ids"]}
    more = torch.randint(3, 96, (1, 10), generator=torch.Generator().manual_seed(4))
    with attach(llama, policy_of(kind)) as runtime:
        cache = runtime.new_cache()
        first = llama.generate(**inputs, past_key_values=cache, do_sample=False, **OPTIONS)
        whole = torch.cat([first, more], 1)
        second = llama.generate(input_ids=whole, past_key_values=cache, do_sample=False, **OPTIONS)
        assert second.shape == (1, 56) and torch.equal(second[:, :48], whole)
        report = cache.report()
        assert report["tokens_seen"] == [55] and cache.layers[0].prompt_lengths == [30]
        # The same tokens one by one.
        logits, _ = turn(llama, runtime, list(range(26)), second[:, 30:55], prompts((30,)))
        assert torch.equal(logits.argmax(-1)[:, 17:], second[:, 48:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_selected_repeated_and_forgotten(llama: Any, kind: str) -> None:
    inputs = prompts(LENGTHS)
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(4))

    def step(cache: PolicyCache, t: int, rows: list[int]) -> Tensor:
        at = torch.tensor(LENGTHS)[rows][:, None] + t
        return llama(ids[rows, t, None], position_ids=at, past_key_values=cache).logits

    with attach(llama, policy_of(kind)) as runtime, torch.no_grad():
        plain = turn(llama, runtime, [0, 1, 2], ids, inputs)[1]
        chosen = turn(llama, runtime, [0, 1, 2], ids, inputs)[1]
        chosen.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([3, 0, 1]))  # rows 1, 0, 0
        chosen.reorder_cache(torch.tensor([1, 0, 2]))  # rows 0, 1, 0
        for t in range(2, 6):
            expected = step(plain, t, [0, 1])
            torch.testing.assert_close(step(chosen, t, [0, 1, 0]), expected[[0, 1, 0]])
        assert chosen.row_bytes(0) + chosen.row_bytes(1) == sum(chosen.row_bytes(r) for r in (1, 2))
        chosen.report()
        chosen.reset()
        assert chosen.kv_bytes == chosen.peak_kv_bytes == chosen.get_seq_length() == 0
        fresh = runtime.new_cache()
        if not runtime.policy.chunked:
            for cache in (chosen, fresh):
                llama(**inputs, position_ids=positions_of(inputs["attention_mask"]), past_key_values=cache)
            assert torch.equal(step(chosen, 0, [0, 1]), step(fresh, 0, [0, 1]))


@pytest.mark.parametrize("settings", [
    {"prompt_lookup_num_tokens": 2},
    {"assistant_model": "self"},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "quantized"},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
@pytest.mark.parametrize("kind", sorted({"ring", "kivi", "corm", "chunked"} & set(KINDS)))
def test_what_needs_another_cache_is_refused(llama: Any, kind: str, settings: dict[str, Any]) -> None:
    settings = {k: llama if v == "self" else v for k, v in settings.items()}
    inputs = prompts((30,))
    with attach(llama, policy_of(kind)) as runtime:
        with pytest.raises((RuntimeLimitError, ValueError)):
            llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **settings, **OPTIONS)
        # Nothing is left behind.
        again = llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS)
        assert again.shape == (1, 38)
    with attach(llama, policy_of(kind)) as runtime:
        fresh = llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS)
        assert torch.equal(fresh, again)


def test_continuous_batching_is_refused(llama: Any) -> None:
    with attach(llama, policy_of("ring")), pytest.raises(ValueError, match=r"continuous batching|paged\|kvplan"):
        llama.generate_batch([[5, 6, 7], [8, 9]])


@pytest.mark.parametrize("rows", [(30,), (30, 30, 30)])
def test_a_cache_of_another_batch_is_refused(llama: Any, rows: tuple[int, ...]) -> None:
    with attach(llama, policy_of("ring")) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        llama(**prompts((20, 12)), past_key_values=cache)
        with pytest.raises(RuntimeLimitError, match=f"holds 2 rows and this forward brings {len(rows)}"):
            llama(**prompts(rows), past_key_values=cache)


def test_two_models_take_turns(llama: Any) -> None:
    other = model("qwen3", torch.float64)
    inputs = prompts((30,))
    expected = []
    for made, kind in ((llama, "kivi"), (other, "adakv")):
        with attach(made, policy_of(kind)) as runtime:
            expected.append(made.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS))
    with attach(llama, policy_of("kivi")) as one, attach(other, policy_of("adakv")) as two:
        caches, at = (one.new_cache(), two.new_cache()), [inputs["input_ids"]] * 2
        position, rows = torch.arange(30)[None], [inputs["input_ids"]] * 2
        for _ in range(OPTIONS["max_new_tokens"]):
            for i, made in enumerate((llama, other)):
                with torch.no_grad():
                    logits = made(at[i], position_ids=position, past_key_values=caches[i]).logits
                at[i] = logits[:, -1:].argmax(-1)
                rows[i] = torch.cat([rows[i], at[i]], 1)
            position = position[:, -1:] + 1
    for found, alone in zip(rows, expected, strict=True):
        assert torch.equal(found, alone)


def test_policies_one_after_the_other_on_one_model(llama: Any) -> None:
    inputs = prompts((30,))
    before = llama.generate(**inputs, do_sample=False, **OPTIONS)
    runs: dict[str, Tensor] = {}
    for kind in [kind for kind in ("scored", "chunked", "kivi") if kind in KINDS] * 2:
        with attach(llama, policy_of(kind)) as runtime:
            found = llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS)
        assert torch.equal(found, runs.setdefault(kind, found))
        assert torch.equal(llama.generate(**inputs, do_sample=False, **OPTIONS), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [0, 2])
def test_a_forward_that_breaks_off_leaves_nothing_behind(llama: Any, kind: str, broken: int) -> None:
    inputs = prompts((30,))
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[30]])}

    def breaking(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        plain = llama(**inputs).logits
        with attach(llama, policy_of(kind, shared=False)) as runtime:
            expected = llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS)
            for forward in (inputs, step):
                cache = runtime.new_cache()
                if forward is step:
                    llama(**inputs, past_key_values=cache)
                hook = llama.model.layers[broken].mlp.register_forward_pre_hook(breaking)
                with pytest.raises(KeyboardInterrupt):
                    llama(**forward, past_key_values=cache)
                hook.remove()
                assert torch.equal(llama(**inputs).logits, plain)
                # Some layers took the tokens in and others did not: this cache is of no use any more.
                with pytest.raises(RuntimeLimitError, match="broke off"):
                    llama(**forward, past_key_values=cache)
            found = llama.generate(**inputs, past_key_values=runtime.new_cache(), do_sample=False, **OPTIONS)
            assert torch.equal(found, expected)
        assert torch.equal(llama(**inputs).logits, plain)


def test_a_forward_without_our_cache_is_the_model_s_own_unless_layers_share(llama: Any) -> None:
    inputs = prompts((30,))
    with torch.no_grad():
        plain = llama(**inputs).logits
        with attach(llama, policy_of("scored", shared=False)):
            assert torch.equal(llama(**inputs).logits, plain)
        with attach(llama, policy_of("scored")), pytest.raises(RuntimeLimitError, match="works only with its own"):
            llama(**inputs)
        assert torch.equal(llama(**inputs).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_within_its_rounding(llama: Any, kind: str, dtype: torch.dtype) -> None:
    """Held tokens may differ where scores nearly tie; what comes out is finite, in its dtype, and as planned."""
    made = model("llama", dtype)
    inputs = prompts((1, 30, 17))
    with attach(made, policy_of(kind)) as runtime:
        cache = runtime.new_cache()
        out = made.generate(
            **inputs, past_key_values=cache, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **OPTIONS,
        )  # fmt: skip
        assert all(logits.isfinite().all() for logits in out.logits)
        report = cache.report()
        assert kind == "corm" or report["kv_bytes"] == report["kv_bytes_planned"]
        buffers = [b for pool in cache.layers[0].storage for name, b in pool.buffers.items() if name.endswith(".x")]
        assert all(buffer.dtype == dtype for buffer in buffers)
