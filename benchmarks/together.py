"""Whether several trials at once would be cheaper: `python benchmarks/together.py`.

Four policies on the bundled model score the same prompts, one policy after the other as the search does it, and all in
one forward, in which the linear layers see every policy's rows and each policy's cache attends over its own. Times are
of the whole trials (slots filled, forward, KL), in turn in this process; ratios are medians with quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from models import CPU
from torch import Tensor

from kvplan.calibrate.prompts import load_examples
from kvplan.check.scoring import pad
from kvplan.check.timing import in_turn, ratio, seconds
from kvplan.demo.data import calib_data_path
from kvplan.loading import load_model
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import Policy, Slots
from kvplan.runtime.attach import Runtime, attach, full_policy
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import PromptCapture, capture, forward, replay
from kvplan.runtime.rotary import rotaries_for
from kvplan.search.method import named

SHARES = (2000, 4000, 3000)
KINDS = {
    "plain": ("snapkv streaming", "streaming expected", "keydiff snapkv", "expected knorm"),
    "scored": ("h2o streaming", "tova snapkv", "h2o+int8 expected", "tova+turboquant4 keydiff"),
}


class Side(PolicyCache):
    """Caches of several policies as one, the rows of each below those of the one before."""

    caches: Sequence[PolicyCache]

    def run_layer(self, index: int, q: Tensor, keys: Tensor, values: Tensor, args: Any, prefill: Any) -> Tensor:
        found = []
        for cache, *parts in zip(self.caches, *(x.chunk(len(self.caches)) for x in (q, keys, values)), strict=True):
            cache.mask_noted = True
            found.append(cache.run_layer(index, *parts, args, prefill))
        self.mask_noted = self.mask_noted and index < self.spec.num_layers - 1
        return torch.cat(found)


class Trials:
    """Trials on a batch of prompts that were prefilled once."""

    def __init__(self, model: Any, spec: ModelSpec, rows: Sequence[Any]) -> None:
        self.model, self.spec, self.full = model, spec, full_policy(model)
        ids, valid = pad([e.prompt_ids for e in rows], left=True)
        self.continuation, _ = pad([e.continuation_ids for e in rows], left=False)
        self.prompt: PromptCapture = capture(model, self.full, spec, ids, valid)
        self.prompt.has_room = lambda size: True
        width = self.continuation.shape[1] - 1
        self.positions = valid.sum(-1, keepdim=True) + torch.arange(width)
        self.reference = self._log_probabilities(self.apart_logits(self.full))

    @torch.no_grad()
    def apart_logits(self, policy: Policy) -> Tensor:
        with attach(self.model, policy, self.spec) as runtime:
            cache = replay(runtime, self.prompt)
            return forward(runtime, cache, self.continuation[:, :-1], self.positions, None)

    @torch.no_grad()
    def together_logits(self, policies: Sequence[Policy]) -> Sequence[Tensor]:
        count = len(policies)
        with attach(self.model, self.full, self.spec) as runtime:
            side = Side(self.full, self.spec, runtime.attached)
            side.caches = [replay(self._runtime(policy, runtime), self.prompt) for policy in policies]
            for layer, first in zip(side.layers, side.caches[0].layers, strict=True):
                layer.columns = first.columns
            ids, positions = self.continuation[:, :-1].repeat(count, 1), self.positions.repeat(count, 1)
            return forward(runtime, side, ids, positions, None).chunk(count)

    def apart(self, policies: Sequence[Policy]) -> Tensor:
        return torch.stack([self._kl(self.apart_logits(policy)) for policy in policies])

    def together(self, policies: Sequence[Policy]) -> Tensor:
        return torch.stack([self._kl(logits) for logits in self.together_logits(policies)])

    def _runtime(self, policy: Policy, runtime: Runtime) -> Runtime:
        rotaries = rotaries_for(self.model, policy, self.spec)
        return Runtime(self.model, policy, self.spec, runtime.attached, rotaries)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return torch.cat([self.prompt.last_logits[:, None].float(), logits], 1).log_softmax(-1)

    def _kl(self, logits: Tensor) -> Tensor:
        return (self.reference.exp() * (self.reference - self._log_probabilities(logits))).sum(-1).mean(-1)


def policy_of(names: str, spec: ModelSpec) -> Policy:
    """Layers that take turns in these methods, and in SHARES."""
    methods = [named(name) for name in names.split()]
    layers = (methods[i % 2].layer(Slots(share=SHARES[i % 3])) for i in range(spec.num_layers))
    return Policy(layers=tuple(layers), model=spec.policy_block())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, tokenizer, spec = load_model(None)
    examples = load_examples([calib_data_path("search")], tokenizer, context_limit=spec.max_context_tokens)
    examples = sorted((e for e in examples if e.continuation_ids), key=lambda e: len(e.prompt_ids))
    print(f"{torch.get_num_threads()} threads; four policies one after another / in one forward")
    for rows in (1, 16):  # a search runs as many together as make 16384 tokens
        trials = Trials(model, spec, examples[:rows])
        for kind, names in KINDS.items():
            policies = [policy_of(name, spec) for name in names]
            apart, together = trials.apart(policies), trials.together(policies)
            torch.testing.assert_close(apart, together, rtol=1e-2, atol=1e-3)  # bfloat16
            runs = {
                "apart": lambda t=trials, p=policies: seconds(lambda: t.apart(p), CPU),
                "together": lambda t=trials, p=policies: seconds(lambda: t.together(p), CPU),
            }
            times = in_turn(runs, args.rounds)
            print(f"{rows:3} prompts, {kind:6}  {ratio(times['apart'], times['together']).text()}", flush=True)


if __name__ == "__main__":
    main()
