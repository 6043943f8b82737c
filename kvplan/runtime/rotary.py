"""How each layer of a model rotates its queries, found out by what it does.

Families write rotary embeddings in many ways (halves or neighbours as pairs, some channels only, other frequencies in
window layers, layers without). A sequence of one token attends to itself alone, so whatever its position, every layer
sees the same; only the rotation of its queries differs. One forward of such sequences at two positions shows which of
the model's frequencies, in which arrangement, turn the one into the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvplan.errors import ModelError
from kvplan.methods.evictors import Signal
from kvplan.methods.rotation import Rotation
from kvplan.model_spec import ModelSpec, layer_ranges
from kvplan.policy.layout import evicts
from kvplan.policy.schema import Policy
from kvplan.probe import switched

IMPLEMENTATION = "kvplan_rotary"
POSITION = 64
TOKENS = 4
TOLERANCE = 0.1  # of a query's norm; bfloat16 needs a hundredth, a wrong arrangement is off by about the norm
_FOUND = "_kvplan_rotary"


@dataclass(frozen=True)
class Rotary:
    """Where a layer's frequencies are, and which channels turn together.

    Frequencies are read anew for each prompt: some models change them with its length (dynamic NTK, LongRoPE).
    """

    module: nn.Module
    buffer: str
    neighbours: bool
    sign: int

    def rotation(self) -> Rotation:
        frequencies = getattr(self.module, self.buffer).detach().float() * self.sign
        P = len(frequencies)
        pairs = torch.arange(2 * P).view(P, 2).T if self.neighbours else torch.arange(2 * P).view(2, P)
        return Rotation(pairs[0], pairs[1], frequencies)


@dataclass(frozen=True)
class Rotaries:
    """One `Rotary` per layer, None where nothing is rotated; `unknown` lists layers in which it could not be told."""

    layers: tuple[Rotary | None, ...]
    unknown: frozenset[int] = frozenset()

    def rotation(self, layer: int) -> Rotation | None:
        """As the layer rotates now."""
        rotary = self.layers[layer]
        return None if rotary is None else rotary.rotation()


_QUERIES: ContextVar[list[Tensor]] = ContextVar("kvplan_rotary")


def find_rotaries(model: Any, spec: ModelSpec) -> Rotaries:
    """Look at a model once; what was found stays with it."""
    known: tuple[ModelSpec, Rotaries] | None = getattr(model, _FOUND, None)
    if known is None or known[0].layers != spec.layers:
        known = spec, _find(model, spec)
        setattr(model, _FOUND, known)
    return known[1]


def unknown_rotation(model: Any, spec: ModelSpec) -> str:
    """The layers whose rotation could not be told, as ranges; empty when all is known."""
    return layer_ranges(sorted(find_rotaries(model, spec).unknown))


def rotaries_for(model: Any, policy: Policy, spec: ModelSpec) -> Rotaries | None:
    """What the policy's evictors must know of the model; None: nothing.

    Raises:
        ModelError: an evictor must know a rotation that could not be told.
    """
    asking = [
        i
        for i, layer in enumerate(policy.layers)
        if layer.shares is None and evicts(layer, spec.layers[i]) and Signal.ROTATION in layer.evictor.needs
    ]
    if not asking:
        return None
    found = find_rotaries(model, spec)
    if lacking := [i for i in asking if i in found.unknown]:
        name = policy.layers[lacking[0]].evictor.name
        raise ModelError(
            f"layers {layer_ranges(lacking)}: how {spec.model_type} rotates its queries is not known, and evictor "
            f"{name} must know it; choose another evictor"
        )
    return found


def _find(model: Any, spec: ModelSpec) -> Rotaries:
    candidates = list(_candidates(model))
    if not candidates:  # positions are learned, or there are none
        return Rotaries((None,) * spec.num_layers)
    try:
        queries = _queries_at_two_positions(model, spec)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model's own code: it takes no positions, for one
        queries = []
    if len(queries) != spec.num_layers:
        return Rotaries((None,) * spec.num_layers, frozenset(range(spec.num_layers)))
    matches = [_match(q, candidates, min(POSITION, _last_position(spec))) for q in queries]
    unknown = frozenset(i for i, (_, error) in enumerate(matches) if error > TOLERANCE)
    return Rotaries(tuple(rotary for rotary, _ in matches), unknown)


def _candidates(model: nn.Module) -> Iterator[Rotary]:
    seen: set[tuple[float, ...]] = set()
    for module in model.modules():
        for name, frequencies in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or frequencies.ndim != 1:
                continue
            # Models that have a module in each layer have the same one many times.
            values = tuple(frequencies.tolist())
            if values not in seen:
                seen.add(values)
                yield from (Rotary(module, name, near, sign) for near in (False, True) for sign in (1, -1))


def _last_position(spec: ModelSpec) -> int:
    return (spec.max_context_tokens or POSITION + 1) - 1


def _queries_at_two_positions(model: Any, spec: ModelSpec) -> list[Tensor]:
    """Per layer [2, tokens, Hq, D] float32: the queries of a few tokens, each a sequence of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if "position_ids" not in inspect.signature(model.forward).parameters:
        return []
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    weight = model.get_input_embeddings().weight
    # Padding tokens may be embedded as zeros: several tokens, none of them the first.
    ids = torch.arange(1, TOKENS + 1, device=weight.device) * (weight.shape[0] - 1) // TOKENS
    positions = torch.tensor([0, min(POSITION, _last_position(spec))], device=weight.device)
    found: list[Tensor] = []
    token = _QUERIES.set(found)
    try:
        with switched(model, IMPLEMENTATION), torch.no_grad():
            model(
                input_ids=ids.repeat(2)[:, None],
                position_ids=positions.repeat_interleave(TOKENS)[:, None],
                use_cache=False,
            )
    finally:
        _QUERIES.reset(token)
    return [q[:, :, 0].float().unflatten(0, (2, TOKENS)) for q in found]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A single token attends to itself: its value is the output (a learned sink's share does not matter here)."""
    _QUERIES.get().append(query)
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2), None


def _match(queries: Tensor, candidates: list[Rotary], position: int) -> tuple[Rotary | None, float]:
    """The candidate that explains queries [2, tokens, Hq, D] best (None: no rotation), and what it leaves over."""
    before, after = queries
    best: tuple[Rotary | None, float] = None, _relative(before, after)
    steps = torch.full(before.shape[:1], position, device=before.device)[:, None]
    for candidate in candidates:
        rotation = candidate.rotation()
        if 2 * len(rotation.frequencies) > before.shape[-1]:
            continue
        error = _relative(rotation.moved(before[:, :, None], steps)[:, :, 0], after)
        if error < best[1]:
            best = candidate, error
    return best


def _relative(guess: Tensor, found: Tensor) -> float:
    return float((guess - found).norm() / found.norm().clamp_min(torch.finfo(found.dtype).tiny))
