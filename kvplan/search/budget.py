"""Budget: the memory target counted in integers, so that no rounding decides whether a plan fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvplan.errors import TargetError
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import DEFAULT_MIN_SLOTS, DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS, FULL, Slots, Target
from kvplan.search.method import Method
from kvplan.units import BASIS_POINTS, format_bytes, format_share


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What every layer keeps whatever its evictor says; not searched.

    Args:
        sink_tokens: First tokens of the sequence.
        recent_tokens: Last tokens.
        min_slots: Fewest slots of a layer. Below it a percentage costs more than it says.
    """

    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    min_slots: int = DEFAULT_MIN_SLOTS

    def __post_init__(self) -> None:
        if self.min_slots < self.sink_tokens + self.recent_tokens:
            raise TargetError(
                f"--min-slots is {self.min_slots}; {self.sink_tokens} sink + {self.recent_tokens} recent tokens do not "
                f"fit; raise it to at least {self.sink_tokens + self.recent_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a row of a batch may hold, in bytes per unit.

    A unit of a layer's budget is a basis point of the row's prompt for a target in percent, else a token.
    Layers with the model's own sliding window are paid first, at `context_tokens`.

    Args:
        spec: The model.
        target: A share of the full cache, or bytes at a context and batch.
        context_tokens: The prompt length that floors and windows are counted at.
        protection: Decides the floor.

    Raises:
        TargetError: the target is incomplete, or there is no layer to plan.
    """

    spec: ModelSpec
    target: Target
    context_tokens: int
    protection: Protection = Protection()

    def __post_init__(self) -> None:
        if (self.target.share is None) == (self.target.bytes is None):
            raise TargetError("a memory target is either a share or bytes; give one of them")
        if self.context_tokens < 1 or self.target.batch < 1:
            raise TargetError("context and batch must be at least 1")
        if not self.layers:
            raise TargetError("every layer has the model's own sliding window; there is nothing left to plan")

    @property
    def layers(self) -> list[int]:
        """Layers that have a budget: all with full attention."""
        return [i for i, layer in enumerate(self.spec.layers) if layer.window is None]

    @property
    def whole(self) -> int:
        """Units of a layer that keeps everything."""
        return self.context_tokens if self.target.share is None else BASIS_POINTS

    @property
    def full_bytes(self) -> int:
        """The full cache of one row at the context."""
        return self.spec.full_kv_bytes([self.context_tokens])

    @property
    def row_bytes(self) -> int:
        """What one row may hold at the context."""
        if self.target.bytes is not None:
            return self.target.bytes // self.target.batch
        assert self.target.share is not None
        return self.full_bytes * self.target.share // BASIS_POINTS

    @property
    def total(self) -> int:
        """Sum over the budgeted layers of units times `cost`; below 0 when the windows alone cost more."""
        windows = self._window_bytes()
        if self.target.share is None:
            return self.row_bytes - windows
        # A basis point of T tokens is T / 10000 tokens: bytes become (byte * basis points) per token of context.
        return (self.full_bytes * self.target.share - windows * BASIS_POINTS) // self.context_tokens

    def cost(self, layer: int, method: Method) -> int:
        """Bytes of one unit: keys, values and what the evictor keeps beside them."""
        return method.slot_bytes(self.spec.layers[layer], self.spec.dtype, full=False)

    def fixed(self, layer: int, method: Method) -> int:
        """What the layer costs beside its units, in the currency of `total`."""
        spec, dtype = self.spec.layers[layer], self.spec.dtype
        beside = max(method.fixed_bytes(spec, dtype, full) for full in (False, True))
        return beside if self.target.share is None else -(-beside * BASIS_POINTS // self.context_tokens)

    def cap(self, layer: int, method: Method) -> int:
        """Units from which on the layer is `full`: it then keeps no side arrays, so it costs no more."""
        full = method.slot_bytes(self.spec.layers[layer], self.spec.dtype, full=True)
        return -(-self.whole * full // self.cost(layer, method))

    def floor(self, layer: int, method: Method) -> int:
        """Units of `min_slots` at the context."""
        least = -(-self.protection.min_slots * self.whole // self.context_tokens)
        return min(least, self.cap(layer, method))

    def slots(self, units: int, layer: int, method: Method) -> Slots:
        if units >= self.cap(layer, method):
            return FULL
        return Slots(tokens=units) if self.target.share is None else Slots(share=units)

    def check(self, methods: Iterable[Method]) -> None:
        """Fail before long work, not after it.

        Raises:
            TargetError: with every method the smallest policy costs more; names the smallest target that works.
        """
        cheapest = min(methods, key=self._least)
        least = self._least(cheapest)
        if least <= self.total:
            return
        if self.target.share is None:
            smallest = least + self._window_bytes()
        else:
            smallest = -(-least * self.context_tokens // BASIS_POINTS) + self._window_bytes()
        share = -(-smallest * BASIS_POINTS // self.full_bytes)
        if share > BASIS_POINTS:
            raise TargetError(
                f"{self.protection.min_slots} slots in each of {len(self.layers)} layers with {cheapest.name} cost as "
                f"much as the full cache of {self.context_tokens} prompt tokens; lower --min-slots, or plan for longer "
                "prompts"
            )
        asked = self.row_bytes * self.target.batch
        lowest = max(self.protection.sink_tokens + self.protection.recent_tokens, 1)
        remedy = "raise --mem or lower --min-slots" if self.protection.min_slots > lowest else "raise --mem"
        rows = f" and batch {self.target.batch}" if self.target.batch > 1 else ""
        raise TargetError(
            f"target {format_share(self.target.share) if self.target.share else format_bytes(asked)} is below the "
            f"smallest policy: {format_share(share)} or {format_bytes(smallest * self.target.batch)} "
            f"({self.protection.min_slots} slots in each of {len(self.layers)} layers with {cheapest.name}, "
            f"at {self.context_tokens} prompt tokens{rows}); {remedy}"
        )

    def affords(self, layers: Iterable[int], methods: Iterable[Method]) -> bool:
        """Whether these layers, each with its method, fit with their fewest slots."""
        return sum(self._floor_cost(i, method) for i, method in zip(layers, methods, strict=True)) <= self.total

    def _least(self, method: Method) -> int:
        """What the smallest policy of that method costs."""
        return sum(self._floor_cost(i, method) for i in self.layers)

    def _floor_cost(self, layer: int, method: Method) -> int:
        return self.cost(layer, method) * self.floor(layer, method) + self.fixed(layer, method)

    def _window_bytes(self) -> int:
        return sum(
            self.spec.token_bytes(i) * min(self.context_tokens, layer.window)
            for i, layer in enumerate(self.spec.layers)
            if layer.window is not None
        )
