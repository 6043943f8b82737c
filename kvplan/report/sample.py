"""Which tokens of one prompt every layer of a policy keeps: found by running the model on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvplan.model_spec import ModelSpec
    from kvplan.policy.schema import Policy


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt under a policy.

    Attributes:
        pieces: The text of each token; together they are the prompt.
        held: [layers, tokens] float64, the share of a layer's KV heads that hold the token after the prompt.
        source: What prompt it is.
    """

    pieces: tuple[str, ...]
    held: npt.NDArray[np.float64]
    source: str

    @property
    def layers_holding(self) -> npt.NDArray[np.float64]:
        """[tokens] how many layers hold each token, a head counting as its share of a layer."""
        total: npt.NDArray[np.float64] = self.held.sum(0)
        return total


def sample(model: Any, tokenizer: Any, spec: ModelSpec, policy: Policy, ids: Sequence[int], source: str) -> Sample:
    """Prefill the prompt under the policy and ask every layer what it holds."""
    import torch

    from kvplan.runtime.attach import attach
    from kvplan.runtime.held import cache_with_positions, held_positions
    from kvplan.runtime.replay import prefill

    tokens = torch.tensor([list(ids)], device=model.device)
    held = np.zeros((spec.num_layers, len(ids)))
    with attach(model, policy, spec) as runtime, torch.no_grad():
        cache = cache_with_positions(runtime)
        prefill(runtime, cache, tokens, torch.ones_like(tokens, dtype=torch.bool))
        for layer in range(spec.num_layers):
            heads = held_positions(cache, layer)
            for positions in heads:
                held[layer, positions.cpu().numpy()] += 1 / len(heads)
    return Sample(tuple(token_texts(tokenizer, ids)), held, source)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens stands with its last one."""
    texts: list[str] = []
    first = told = 0  # of the tokens that are decoded together, and of those not yet told
    for end in range(1, len(ids) + 1):
        before, after = tokenizer.decode(ids[first:told]), tokenizer.decode(ids[first:end])
        if len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append(after[len(before) :])
            first, told = told, end
        else:
            texts.append("")
    return texts
