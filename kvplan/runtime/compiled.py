"""generate_compiled(): the prompt as ever, then a captured decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplan.runtime.attach import Runtime
from kvplan.runtime.prompt import row_lengths
from kvplan.runtime.replay import prefill
from kvplan.runtime.static import StaticCache, common_slots, decode


def generate_compiled(
    runtime: Runtime, ids: Tensor, mask: Tensor | None, max_new_tokens: int, temperature: float
) -> Tensor:
    """The arguments and the result of `Runtime.generate`."""

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]

    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    cache = runtime.new_cache()
    common_slots(cache, row_lengths(valid), max_new_tokens)  # what cannot be is said before the prompt is read
    with torch.no_grad():
        first = choose(prefill(runtime, cache, ids, valid))
    ends = runtime.model.generation_config.eos_token_id
    stops = None if ends is None else torch.tensor([ends] if isinstance(ends, int) else ends, device=ids.device)
    new = decode(runtime.model, StaticCache(cache, max_new_tokens), first, max_new_tokens, choose, stops)
    return torch.cat([ids, new], 1)
