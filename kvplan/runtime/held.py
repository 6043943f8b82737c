"""Which tokens a cache holds: for pictures and tests, at the price of a position a slot."""

from __future__ import annotations

from torch import Tensor

from kvplan.runtime.attach import Runtime
from kvplan.runtime.cache import PolicyCache, build_layer


def cache_with_positions(runtime: Runtime) -> PolicyCache:
    """A new cache that evicts as the policy says and also knows the position in every slot.

    Rings store none of their own, which keeps them small; its bytes are therefore not those that the policy plans.
    """
    cache = runtime.new_cache()
    policy, spec = cache.policy, cache.spec
    cache.layers = [build_layer(policy, spec, i, with_positions=True) for i in range(spec.num_layers)]
    return cache


def held_positions(cache: PolicyCache, layer: int, row: int = 0) -> list[Tensor]:
    """Positions that a layer's queries can look at: one ascending [n] int64 per KV head, of its source if it shares."""
    found: list[Tensor] = cache.layers[cache.policy.source(layer)].held_positions(row)
    return found
