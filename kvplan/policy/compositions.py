"""Which decisions of a layer go together, as data: `validate`, the runtime and the search read the same table.

The order inside a layer is fixed: share, then evict and merge tokens, then prune channels, then encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvplan.policy.schema import LayerPolicy, Policy


@dataclass(frozen=True)
class Rule:
    """A composition that cannot run.

    Attributes:
        field: The decision to change.
        found: What the layer has when the rule is broken.
        broken: Whether a layer breaks it.
        reason: Why it cannot run, and what can.
    """

    field: str
    found: str
    broken: Callable[[LayerPolicy], bool]
    reason: str


def _grouped(layer: LayerPolicy) -> bool:
    return layer.stored_whole[0] > 1


def _frees_single_slots(layer: LayerPolicy) -> bool:
    """Whether the evictor must be able to overwrite any slot alone."""
    return not layer.slots.is_full and layer.evictor.keeps_scores


def _per_head(layer: LayerPolicy) -> bool:
    return bool(layer.slots.heads) or layer.head_split is not None


def _merges(layer: LayerPolicy, when: str) -> bool:
    return layer.merger is not None and bool(getattr(layer.merger, when))


def _elastic(layer: LayerPolicy) -> bool:
    return not layer.slots.is_full and layer.evictor.forgets_after is not None


RULES: tuple[Rule, ...] = (
    Rule(
        "codec",
        "an evictor that frees single slots (h2o, tova, scissorhands, corm) with a codec that encodes groups of tokens "
        "(kivi keys)",
        lambda layer: _grouped(layer) and _frees_single_slots(layer),
        "a token cannot leave its group alone; use an evictor that fills a ring (streaming, sliding, snapkv, knorm, "
        "keydiff, lagkv, expected), or a codec whose slots stand alone (int8, fp8, turboquant)",
    ),
    Rule(
        "head_split",
        "a head split, or slots per KV head, with an evictor that keeps one set of tokens for all heads (tova)",
        lambda layer: _per_head(layer) and layer.evictor.one_set_for_all_heads,
        "the heads cannot hold different numbers of the same tokens; use an evictor that ranks per head",
    ),
    Rule(
        "head_split",
        "a head split with slots that are stated per KV head",
        lambda layer: bool(layer.slots.heads) and layer.head_split is not None,
        "both say how many slots a head gets; leave one out",
    ),
    Rule(
        "head_split",
        "a head split with a codec that encodes groups of tokens",
        lambda layer: layer.head_split is not None and _grouped(layer),
        "a head's share is not a whole number of groups; use a codec whose slots stand alone",
    ),
    Rule(
        "head_split",
        "a head split in a layer that keeps everything",
        lambda layer: layer.head_split is not None and layer.slots.is_full,
        "there is nothing to divide; give the layer slots",
    ),
    Rule(
        "evictor",
        "an evictor without a fixed budget (corm) with slots per KV head, a head split, a merger, pruned channels or a "
        "codec with groups",
        lambda layer: _elastic(layer) and (_per_head(layer) or layer.merger is not None or layer.stored_whole[1] > 0),
        "it decides by itself how much each head holds; use one number of slots as its cap and slots that stand alone",
    ),
    Rule(
        "merger",
        "a merger in a layer that keeps everything",
        lambda layer: layer.merger is not None and layer.slots.is_full,
        "nothing is evicted there; give the layer slots",
    ),
    Rule(
        "merger",
        "a merger that works while decoding (cam) with an evictor that frees single slots",
        lambda layer: _merges(layer, "merges_steps") and _frees_single_slots(layer),
        "it must know one step ahead which token leaves; use an evictor that fills a ring (streaming, sliding)",
    ),
    Rule(
        "merger",
        "a merger that works while decoding (cam) with encoded values or pruned channels",
        lambda layer: (
            _merges(layer, "merges_steps") and (layer.value_codec.name != "dense" or layer.stored_whole[1] > 0)
        ),
        "values would be rounded again at every step; store them dense",
    ),
    Rule(
        "merger",
        "a merger of prompts (kvmerger) with an evictor that keeps one set of tokens for all heads (tova)",
        lambda layer: _merges(layer, "merges_prompt") and layer.evictor.one_set_for_all_heads,
        "each head merges its own runs of tokens; use an evictor that ranks per head",
    ),
)

CHUNK_RULES: tuple[Rule, ...] = (
    Rule(
        "codec",
        "chunked prefill with groups of tokens or pruned channels",
        lambda layer: layer.stored_whole[1] > 0,
        "groups and channels are fixed once, at the end of the prompt; read the prompt at once, or use a codec whose "
        "slots stand alone",
    ),
    Rule(
        "head_split",
        "chunked prefill with budgets that differ between heads",
        lambda layer: layer.head_split is not None or bool(layer.slots.heads) or _elastic(layer),
        "heads would be cut apart before their prompt has been seen; read the prompt at once",
    ),
    Rule(
        "merger",
        "chunked prefill with a merger",
        lambda layer: layer.merger is not None,
        "tokens would be merged again with every chunk; read the prompt at once",
    ),
)


def composition_problems(layer: LayerPolicy) -> Iterator[tuple[str, str]]:
    """Yield (field, message) for each rule that a layer with its own cache breaks."""
    yield from _broken(RULES, layer)


def chunk_problems(policy: Policy) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, field, message) for what cannot run under the policy's chunked prefill."""
    if not policy.chunked:
        return
    for index, layer in enumerate(policy.layers):
        if layer.shares is None:
            yield from ((index, field, told) for field, told in _broken(CHUNK_RULES, layer))


def _broken(rules: tuple[Rule, ...], layer: LayerPolicy) -> Iterator[tuple[str, str]]:
    for rule in rules:
        if rule.broken(layer):
            yield rule.field, f"{rule.found} cannot run: {rule.reason}"
