"""Small valid files of every kind, as data: what the fuzzer starts from. No model is loaded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from kvplan.calibrate.profile import Profile
from kvplan.calibrate.statistics import (
    MOMENT_NAMES,
    SHARING_TOKENS,
    LayerProfile,
    Moments,
    SensitivitySums,
    Statistics,
    moment_shape,
)
from kvplan.check.results import FULL_CACHE, Cost, DataIdentity, ModelIdentity, PolicyResult, PromptRow, Results
from kvplan.model_spec import LayerSpec, ModelSpec

PROMPTS = 3
SPEC = ModelSpec(
    (LayerSpec(1, 2, 2), LayerSpec(1, 2, 2), LayerSpec(1, 2, 2, 32)),
    query_heads=2,
    dtype="bfloat16",
    max_context_tokens=4096,
    model_type="llama",
    fingerprint="sha256:abc",
)


def profile() -> Profile:
    """Three layers, the last with a sliding window, on three prompts."""
    random = np.random.default_rng(0)

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments.of(random.uniform(0.1, 0.9, (PROMPTS, *shape)))

    def layer(spec: LayerSpec) -> LayerProfile:
        sums = random.uniform(0, 1, (spec.kv_heads, SHARING_TOKENS, spec.key_dim)).astype(np.float32)
        return LayerProfile(**{n: moments(moment_shape(n, spec)) for n in MOMENT_NAMES}, key_sum=sums, value_sum=sums)

    names, shares = ["knorm", "streaming"], [1000, 5000]
    sums = SensitivitySums(
        {name: {share: moments((SPEC.num_layers,)) for share in shares} for name in names},
        {"evictors": names, "shares": shares},
        1.5,
        {label: moments((SPEC.num_layers,)) for label in ("int8/dense", "dense/int8")},
    )
    statistics = Statistics(
        layers=tuple(map(layer, SPEC.layers)),
        prompt_hashes=("a", "b", "c"),
        num_tokens=2400,
        sharing_prompts=PROMPTS,
        settings={"sinks": 4, "recent": 32, "max_tokens": None},
        seconds={"load": 0.5, "forward": 1.0},
    )
    return Profile(SPEC, statistics, sums, {"seed": 0}, {"kvplan": "0.1.0", "python": "3.12"})


def results() -> Results:
    """A full cache and a policy on two prompts."""
    given: dict[str, Any] = {
        "task": "niah", "context_tokens": 700, "question_aware": False, "tokens": 10, "top1": 0.5, "nll": 1.5,
        "full_nll": 1.25, "planned_bytes": 40, "kv_bytes": 39, "full_bytes": 100, "scorer": "f1", "score": 0.5,
        "full_score": 1.0, "answers": ("yes",),
    }  # fmt: skip
    cost = Cost(context_tokens=700, planned_bytes=40, kv_bytes=39, full_bytes=100, peak_bytes=60, new_tokens=8,
                tokens_per_second=(10.0, 9.0, 11.0), speedup=(1.0, 0.9, 1.1))  # fmt: skip
    full, cut = (tuple(PromptRow(id=name, kl=kl, **given) for name in "ab") for kl in (0.0, 0.25))
    return Results(
        tool={"kvplan": "0.1.0"},
        model=ModelIdentity(name="bundled", type="qwen3", fingerprint="sha256:1", dtype="bfloat16", layers=8),
        data=DataIdentity(fingerprint="sha256:2", sources=("x.jsonl",), prompts=2),
        policies=(
            PolicyResult(name=FULL_CACHE, source=FULL_CACHE, fingerprint="sha256:3", rows=full),
            PolicyResult(name="p", source="p.yaml", fingerprint="sha256:4", rows=cut, cost=cost),
        ),
        seed=3,
        settings={"context": None, "scorer": "f1"},
    )


def policies() -> list[dict[str, Any]]:
    model = {"type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
    rich = {
        "0": {"slots": "40%", "sink_tokens": 4, "recent_tokens": 16, "min_slots": 64, "evictor": "tova"},
        "1": {"slots": 512, "evictor": {"snapkv": {"window_tokens": 16}}, "codec": {"keys": "int8", "values": "dense"}},
        "2": {"slots": "full", "codec": "int8"},
        "3": {"shares": 2},
    }
    each = {"slots": [256, "50%"], "sink_tokens": 2, "recent_tokens": 8, "evictor": "streaming"}
    return [
        {"kvplan": 1, "model": model, "target": {"share": "40%"}, "layers": rich, "provenance": {"seed": 0, "a": [1]}},
        {"kvplan": 1, "model": {**model, "window": 64, "window_layers": "3"},
         "layers": {"0-2": each, "3": {"slots": "full"}},
         "target": {"bytes": "512MiB", "context_tokens": 4096, "batch": 2}},
        {"kvplan": 1, "prefill": {"chunk_tokens": 256}, "layers": {"0,2": {"slots": 300}, "1,3": {"slots": "full"}}},
        {"kvplan": 1, "layers": {"0-3": {"slots": 256, "evictor": "streaming", "merger": "cam"}}},
    ]  # fmt: skip


def front() -> dict[str, Any]:
    """Two plans of a search over several memories."""
    points = [
        {"target": f"{share}%", "label": "knapsack", "bytes": 10 * share, "full_bytes": 1000, "kl": 1 / share,
         "policy": f"kvplan: 1\nlayers: {{0-3: {{slots: {share}%, evictor: tova}}}}\n"}
        for share in (20, 40)
    ]  # fmt: skip
    return {"kvplan_front": 1, "model": {}, "prompt_tokens": 700, "step_costs": None, "points": points}


def prompts() -> list[dict[str, Any]]:
    turns = [("system", "Be brief."), ("user", "the key is in the red box"), ("assistant", "yes"), ("user", "where?")]
    return [
        {"id": "a", "task": "fact", "prompt": "where is the red key", "answer": "in the box", "question_aware": True},
        {"id": "b", "task": "chat", "messages": [{"role": role, "content": text} for role, text in turns]},
        {"id": "c", "task": "qa", "prompt": "a b c d", "answers": ["e", "f g"], "scorer": "f1", "max_new_tokens": 8},
        {"id": "d", "task": "text", "prompt": "one two three four five six"},
    ]


def as_file(value: Profile | Results) -> Any:
    """What its file holds."""
    return json.loads(json.dumps(value.to_json()))
