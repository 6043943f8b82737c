"""bench(): how fast a model decodes under a policy, beside the caches that a user would otherwise have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvplan.check.cost import decode_seconds, dynamic_cache, prefilled
from kvplan.check.timing import Spread, in_turn, ratio
from kvplan.errors import RuntimeLimitError
from kvplan.model_spec import ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import Policy
from kvplan.runtime.attach import attach, full_policy
from kvplan.runtime.replay import capture

FULL, POOL, CUT, POLICY = "DynamicCache", "kvplan, full", "DynamicCache, cut", "policy"


@dataclass(frozen=True)
class Measured:
    """One cache.

    Attributes:
        tokens_per_second: Of all rows together.
        speedup: Over transformers' full cache, round by round.
        kv_bytes: Storage held after the last token.
    """

    name: str
    tokens_per_second: Spread
    speedup: Spread
    kv_bytes: int
    full_kv_bytes: int

    @property
    def share(self) -> float:
        return self.kv_bytes / self.full_kv_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@torch.no_grad()
def bench(
    model: Any,
    policy: Policy,
    spec: ModelSpec,
    *,
    context: int,
    batch: int,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Decode `new_tokens` tokens after a random prompt, on every cache in turn.

    Every round starts from the same prompt, which is prefilled once. The cut cache of transformers holds the last
    tokens, as many as the policy's bytes after the prompt are worth: each new token pushes the oldest out.

    Args:
        progress: Called `(repeats + 1) * 4` times.

    Raises:
        RuntimeLimitError: the sequence is longer than the model was made for.
    """
    limit = spec.max_context_tokens
    if limit is not None and context + new_tokens > limit:
        raise RuntimeLimitError(
            f"{context} tokens of context and {new_tokens} new ones are more than the model's {limit} positions; "
            f"lower --context to at most {limit - new_tokens}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (batch, context), generator=generator)
    ids = ids.to(model.device)
    prompt = capture(model, full_policy(model), spec, ids, torch.ones_like(ids, dtype=torch.bool))
    planned = plan(policy, spec, [context] * batch)
    kept = min(context, max(1, round(context * planned.ratio)))
    held: dict[str, int] = {}

    def own(name: str, tokens: int, *, cut: bool = False) -> float:
        cache = dynamic_cache(model, prompt, tokens, held=cut)
        spent = decode_seconds(model, cache, ids, new_tokens)
        held[name] = sum(_bytes(t) for layer in cache.layers for t in (layer.keys, layer.values))
        return spent

    def under(name: str, used: Policy) -> float:
        with attach(model, used, spec) as runtime:
            cache = prefilled(runtime, prompt, ids)
            spent = decode_seconds(model, cache, ids, new_tokens)
            held[name] = cache.kv_bytes
        return spent

    cases = {
        FULL: lambda: own(FULL, context),
        POOL: lambda: under(POOL, full_policy(model)),
        CUT: lambda: own(CUT, kept, cut=True),
        POLICY: lambda: under(POLICY, policy),
    }
    times = in_turn(cases, repeats, progress)
    return _rows(times, held, spec.full_kv_bytes([context + new_tokens] * batch), batch * new_tokens)


def _rows(times: Mapping[str, list[float]], held: Mapping[str, int], full: int, tokens: int) -> list[Measured]:
    return [
        Measured(name, Spread.of([tokens / s for s in spent]), ratio(times[FULL], spent), held[name], full)
        for name, spent in times.items()
    ]


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
