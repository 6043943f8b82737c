"""Sensitivity: how far the next-token distribution moves when one layer alone is cut."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from kvplan.calibrate.examples import Example
from kvplan.calibrate.precision import MEASURED, Precision, storable
from kvplan.calibrate.statistics import Moments, SensitivitySums
from kvplan.errors import ProfileError
from kvplan.methods.evictors import evictors as registry
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.stats import PromptScores
from kvplan.units import BASIS_POINTS

EVICTORS = ("snapkv", "knorm", "h2o", "tova", "streaming", "expected", "keydiff")
SHARES = (1000, 2500, 5000)  # basis points of the prompt that the cut layer keeps
Score = Callable[[Policy, list[int]], PromptScores]


def measure(
    score: Score,
    spec: ModelSpec,
    num_prompts: int,
    *,
    evictors: Sequence[str] = EVICTORS,
    shares: Sequence[int] = SHARES,
    precisions: Sequence[Precision] = MEASURED,
    min_slots: int = 24,
    sink_tokens: int = 4,
    recent_tokens: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> SensitivitySums:
    """Cut each layer alone, by each evictor, to each share; then store it alone, whole, at each precision.

    Layers with a window of their own cannot be cut and count 0.

    Args:
        score: Scores of the given prompts under a policy; the prompts were prefilled once, so a call is a replay.
        num_prompts: Prompts 0 to `num_prompts` - 1 are used.
        shares: In basis points.
        precisions: Codecs of keys and values; those that cannot store this model's heads are left out.
        progress: Called with (replays done, replays in all).

    Raises:
        ProfileError: no prompts, a bad share, or a score that is not finite.
        MethodError: an unknown evictor.
    """
    if num_prompts < 1:
        raise ProfileError("sensitivity needs at least one prompt")
    if bad := [s for s in shares if not 0 < s <= BASIS_POINTS]:
        raise ProfileError(f"{bad[0]} basis points is not a share; it must be above 0 and at most {BASIS_POINTS}")
    methods = {name: registry[name]() for name in evictors}
    prompts = list(range(num_prompts))
    usable = [precision for precision in precisions if storable(precision, spec)]
    layers = [i for i, layer in enumerate(spec.layers) if layer.window is None]
    done, start = 0, time.perf_counter()
    total = num_replays(spec, len(methods) * len(shares), precisions)
    block = spec.policy_block()
    full = LayerPolicy()

    def one_layer(changed: LayerPolicy, name: str) -> Moments:
        """KL of each layer in turn under the changed policy."""
        nonlocal done
        kl = np.zeros((num_prompts, spec.num_layers))
        for layer in layers:
            policy = Policy(layers=tuple(changed if i == layer else full for i in range(spec.num_layers)), model=block)
            kl[:, layer] = score(policy, prompts).kl
            if not np.isfinite(kl[:, layer]).all():
                raise ProfileError(f"layer {layer} cut by {name}: KL is not finite; has every prompt a continuation?")
            done += 1
            if progress is not None:
                progress(done, total)
        return Moments.of(kl)

    moments: dict[str, dict[int, Moments]] = {}
    for name, evictor in methods.items():
        moments[name] = {}
        for share in shares:
            cut = LayerPolicy(
                slots=Slots(share=share),
                sink_tokens=sink_tokens,
                recent_tokens=recent_tokens,
                min_slots=min_slots,
                evictor=evictor,
            )
            moments[name][share] = one_layer(cut, name)
    rounded = {str(p): one_layer(LayerPolicy(key_codec=p.key_codec, value_codec=p.value_codec), str(p)) for p in usable}
    settings = {
        "evictors": list(methods),
        "shares": list(shares),
        "min_slots": min_slots,
        "sink_tokens": sink_tokens,
        "recent_tokens": recent_tokens,
    }
    return SensitivitySums(moments, settings, time.perf_counter() - start, rounded)


def num_replays(
    spec: ModelSpec, cuts: int = len(EVICTORS) * len(SHARES), precisions: Sequence[Precision] = MEASURED
) -> int:
    """How many replays `measure` makes with that many pairs of an evictor and a share."""
    usable = sum(storable(precision, spec) for precision in precisions)
    return (cuts + usable) * sum(layer.window is None for layer in spec.layers)


def stratified(examples: Sequence[Example], count: int) -> list[int]:
    """Indices of the first examples with a continuation, taken from the tasks in turn; at most `count`, ascending."""
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        if example.continuation_ids:
            by_task[example.task].append(i)
    ranked = sorted((place, i) for indices in by_task.values() for place, i in enumerate(indices))
    return sorted(i for _, i in ranked[:count])
