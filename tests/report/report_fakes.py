"""Inputs of a report, without a model: eight layers as usual, or as many and as long as they come."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvplan.check.results import FULL_CACHE, DataIdentity, ModelIdentity, PolicyResult, PromptRow, Results
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Slots, Target
from kvplan.report.inputs import Inputs, NamedPolicy
from kvplan.report.sample import Sample
from kvplan.search.trials import StudyRecord, TrialRecord

EVICTORS = ("h2o", "knorm", "snapkv", "streaming", "tova")
BASELINES = (
    *(f"uniform {name}" for name in EVICTORS), "uniform int8", "uniform turboquant4", "uniform turboquant3",
    "uniform turboquant2", "squeeze streaming", "pyramid streaming",
)  # fmt: skip


def policy(layers: int = 8) -> Policy:
    """Every kind of row: full, a share, per head, encoded both ways, sharing near and far."""
    kinds = [
        LayerPolicy(),
        LayerPolicy(slots=Slots(share=1000), evictor=evictors["streaming"]()),
        LayerPolicy(slots=Slots(heads=(Slots(share=2000), Slots(share=9000))), evictor=evictors["snapkv"]()),
        LayerPolicy(key_codec=codecs["turboquant"](bits=3), value_codec=codecs["int8"]()),
        LayerPolicy(shares=0),
        LayerPolicy(slots=Slots(tokens=128), evictor=evictors["h2o"](), key_codec=codecs["int8"]()),
        LayerPolicy(shares=3),
        LayerPolicy(slots=Slots(share=5000), evictor=evictors["tova"]()),
    ]
    chosen = [
        kinds[i % 8] if kinds[i % 8].shares is None or i < 8 else LayerPolicy(shares=i - 1) for i in range(layers)
    ]
    return Policy(
        layers=tuple(chosen),
        model={
            "name": "a-model",
            "type": "llama",
            "layers": layers,
            "kv_heads": 2,
            "head_dim": 32,
            "dtype": "bfloat16",
        },
        target=Target(share=4000),
        provenance={
            "planned": {"prompt_tokens": 700, "bytes": 4000, "full_bytes": 10000},
            "search": {"kl": 0.0003, "kl_95": [0.0002, 0.0004], "task": 0.97},
        },
    )


def profile(layers: int = 8) -> Any:
    """What a report reads of a profile; one layer has a window of its own."""
    draw = np.random.default_rng(0)
    spec = ModelSpec(
        tuple(LayerSpec(2, 32, 32, 64 if i == layers - 1 else None) for i in range(layers)), 4, "bfloat16", "llama", "f"
    )
    damage = 10 ** draw.uniform(-5, 0, layers)
    return SimpleNamespace(
        spec=spec,
        importance=draw.uniform(0, 0.2, layers).tolist(),
        sensitivity={
            name: {share: (damage * 1000 / share).tolist() for share in (1000, 2500, 5000)} for name in EVICTORS
        },
        codec_sensitivity={
            name: (damage * factor).tolist()
            for name, factor in (("int8", 1e-3), ("turboquant4", 0.02), ("turboquant3", 0.1), ("turboquant2", 0.3))
        },
        statistics=SimpleNamespace(num_prompts=48),
    )


def study(trials: int = 40) -> StudyRecord:
    draw = random.Random(0)
    found = []
    for number in range(trials):
        label = BASELINES[number] if number < len(BASELINES) else "search"
        kl = 10 ** draw.uniform(-4, 0.5)
        params = {
            "split": "knapsack",
            "scale.a": 1.0,
            "scale.b": draw.random(),
            "evictor.a": "tova",
            "shared_layers": 1,
        }
        found.append(TrialRecord(number, label, params, tuple(kl * draw.uniform(0.5, 1.5) for _ in range(8)), 0.4))
    importance = {
        "evictor.a": 0.5,
        "scale.a": 0.2,
        "scale.b": 0.15,
        "shared_layers": 0.1,
        "evictor.ab": 0.04,
        "h2o.window": 0.01,
    }
    return StudyRecord(tuple(found), importance, {"a": (0, 1, 2), "b": (3, 5, 7)})


def results(baselines: tuple[str, ...] = BASELINES) -> Results:
    """Both ways of asking; many baselines of equal bytes."""
    draw = random.Random(0)

    def rows(name: str) -> tuple[PromptRow, ...]:
        full = name == FULL_CACHE
        level = 0.0 if full else 10 ** draw.uniform(-3.5, 0.2)
        held = 100 if full else 25 if name.endswith("4") else 40
        return tuple(
            PromptRow(
                id=f"p{i}", task="facts", context_tokens=700, question_aware=i % 4 == 3, tokens=10, top1=0.9, nll=1.0,
                kl=level * draw.uniform(0.3, 1.7), full_nll=1.0, planned_bytes=held, kv_bytes=held, full_bytes=100,
            )
            for i in range(16)
        )  # fmt: skip

    names = (FULL_CACHE, "policy", *baselines)
    return Results(
        tool={"kvplan": "0"},
        model=ModelIdentity(name="a-model", type="llama", fingerprint=None, dtype="bfloat16", layers=8),
        data=DataIdentity(fingerprint="f", sources=("x",), prompts=16),
        policies=tuple(
            PolicyResult(name=n, source="policy.yaml" if n == "policy" else n, fingerprint=n, rows=rows(n))
            for n in names
        ),
    )


def sample(layers: int = 8, tokens: int = 300) -> Sample:
    draw = np.random.default_rng(0)
    words = [
        "It ",
        "was ",
        "<b>",
        "a",
        "nother ",
        "morn\n",
        "ing ",
        "&",
        "日",
        "",
        "a_long_word_without_a_blank_in_it ",
    ]
    pieces = tuple(words[i] for i in draw.integers(0, len(words), tokens))
    held = np.zeros((layers, tokens))
    for layer in range(layers):
        held[layer] = 1.0 if layer % 3 == 0 else (draw.random(tokens) < 0.4) * 0.5 + (draw.random(tokens) < 0.3) * 0.5
    return Sample(pieces, held, "A made-up prompt")


def inputs(layers: int = 8, tokens: int = 300, **changes: Any) -> Inputs:
    """Everything that a report can show."""
    given: dict[str, Any] = {
        "profile": profile(layers),
        "study": study(),
        "policies": (NamedPolicy(Path("policy.yaml"), policy(layers)),),
        "results": results(),
        "sample": sample(layers, tokens),
    }
    return Inputs(**{**given, **changes})
