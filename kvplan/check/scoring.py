"""Scorer: what a policy does to the model's next-token distributions on given prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplan.calibrate.prompts import Example
from kvplan.errors import DataError
from kvplan.loading import check_tokens
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import FULL, LayerPolicy, Policy
from kvplan.runtime.attach import attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import PromptCapture, capture, forward, prefill, replay
from kvplan.stats import PromptScores


@dataclass
class _Batch:
    """Prompts prefilled together, with the full cache's predictions over their continuations."""

    indices: list[int]
    ids: Tensor
    prompt: PromptCapture
    continuation: Tensor  # [B, C] padded on the right with 0
    reference: Tensor  # [B, C, V] float32 log-probabilities of the full cache

    def rows(self) -> list[_Batch]:
        """Each prompt as a batch of its own, without padding and to be prefilled anew; all of them if none has any."""
        if bool(self.prompt.valid.all()):
            return [self]
        apart = []
        for row, index in enumerate(self.indices):
            now, own = slice(row, row + 1), self.prompt.valid[row]
            prompt = PromptCapture([], self.prompt.valid[now, own], self.prompt.last_logits[now])
            apart.append(_Batch([index], self.ids[now, own], prompt, self.continuation[now], self.reference[now]))
        return apart


@dataclass(frozen=True)
class Measured:
    """Scores together with the storage bytes that the caches really held after the prompts."""

    scores: PromptScores
    kv_bytes: int
    full_kv_bytes: int


class Scorer:
    """Scores policies on a fixed set of examples. Each prompt is prefilled once, whatever the number of policies.

    The prompt is prefilled and compressed, then the continuation is fed on the compressed cache (teacher forcing), by
    the same code that generates. Position 0 of the continuation is predicted by the prompt's own pass.

    Args:
        model: The model, in eval mode.
        spec: Its shape.
        examples: The prompts.
        batch_tokens: Most prompt tokens that are run together, padding included; a longer prompt runs alone.
        keep: Keep captured prompts for the next policy. Turn off to score one policy on many prompts.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        examples: Sequence[Example],
        *,
        batch_tokens: int = 16384,
        keep: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        empty = next((e for e in examples if not e.continuation_ids), None)
        if empty is not None:
            raise DataError(f"prompt '{empty.id}' has nothing to score: no answer, and too short to cut a continuation")
        for example in examples:
            check_tokens(model, [*example.prompt_ids, *example.continuation_ids], f"prompt {example.id!r}")
        self.model, self.spec, self.examples = model, spec, list(examples)
        self._full = Policy(layers=(LayerPolicy(slots=FULL),) * spec.num_layers)
        self._groups = _groups([len(e.prompt_ids) for e in self.examples], batch_tokens)
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._keep, self._progress = keep, progress

    def prepare(
        self, indices: Sequence[int] | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Prefill the examples of these indices (all by default) now, not when they are first scored together.

        Args:
            indices: The ones that `score` will be asked for.
            progress: Called with the prompts done and their number after each batch.
        """
        assert self._keep, "a scorer that keeps nothing has nothing to prepare"
        parts, done = self._parts(indices), 0
        for part in parts:
            self._batch(part)
            done += len(part)
            progress(done, sum(map(len, parts)))

    def score(self, policy: Policy, indices: Sequence[int] | None = None) -> PromptScores:
        """Scores of `policy` on the examples of these indices (all by default), in that order."""
        return self.measure(policy, indices).scores

    def measure(self, policy: Policy, indices: Sequence[int] | None = None) -> Measured:
        """Scores, and bytes counted in the caches' storage right after the prompts."""
        wanted = list(range(len(self.examples))) if indices is None else list(indices)
        rows: dict[int, tuple[float, float, float, float]] = {}
        kv_bytes = full_bytes = 0
        for part in self._parts(wanted):
            batch = self._batch(part)
            # Where a prompt's chunks end, and so what they evict, would depend on the padding before it.
            for piece in batch.rows() if policy.chunked else [batch]:
                found, held, full = self._score_batch(policy, piece)
                rows.update(found)
                kv_bytes, full_bytes = kv_bytes + held, full_bytes + full
            if self._progress is not None:
                self._progress(len(rows), len(set(wanted)))
        columns = list(zip(*(rows[i] for i in wanted), strict=True))
        return Measured(PromptScores(*(tuple(c) for c in columns)), kv_bytes, full_bytes)

    def _parts(self, indices: Sequence[int] | None) -> list[list[int]]:
        """The wanted examples of each group, where there are any."""
        chosen = set(range(len(self.examples)) if indices is None else indices)
        parts = [[i for i in group if i in chosen] for group in self._groups]
        return [part for part in parts if part]

    def _batch(self, indices: list[int]) -> _Batch:
        key = tuple(indices)
        if key in self._batches:
            return self._batches[key]
        examples = [self.examples[i] for i in indices]
        device = next(self.model.parameters()).device
        ids, valid = pad([e.prompt_ids for e in examples], left=True, device=device)
        continuation, _ = pad([e.continuation_ids for e in examples], left=False, device=device)
        prompt = capture(self.model, self._full, self.spec, ids, valid)
        batch = _Batch(indices, ids, prompt, continuation, torch.empty(0))
        with attach(self.model, self._full, self.spec) as runtime, torch.no_grad():
            batch.reference = self._continue(runtime, replay(runtime, prompt), batch, prompt.last_logits)
        if self._keep:
            self._batches[key] = batch
        return batch

    def _continue(self, runtime: Any, cache: PolicyCache, batch: _Batch, last_logits: Tensor) -> Tensor:
        """Log-probabilities [B, C, V] that predict each continuation token."""
        lengths = batch.prompt.valid.sum(-1, keepdim=True)
        width = batch.continuation.shape[1]
        first = last_logits[:, None].float()
        if width == 1:
            return first.log_softmax(-1)
        positions = lengths + torch.arange(width - 1, device=lengths.device)
        logits = forward(runtime, cache, batch.continuation[:, :-1], positions, None)
        return torch.cat([first, logits], 1).log_softmax(-1)

    @torch.no_grad()
    def _score_batch(
        self, policy: Policy, batch: _Batch
    ) -> tuple[dict[int, tuple[float, float, float, float]], int, int]:
        with attach(self.model, policy, self.spec) as runtime:
            if policy.chunked or any(layer.shares is not None for layer in policy.layers):
                cache = runtime.new_cache()
                last = prefill(runtime, cache, batch.ids, batch.prompt.valid)
            else:
                cache, last = replay(runtime, batch.prompt), batch.prompt.last_logits
            held, full = cache.kv_bytes, cache.full_kv_bytes
            found = self._continue(runtime, cache, batch, last)
        kl = (batch.reference.exp() * (batch.reference - found)).sum(-1)
        agree = found.argmax(-1) == batch.reference.argmax(-1)
        right = found.argmax(-1) == batch.continuation
        nll = -found.gather(-1, batch.continuation[..., None])[..., 0]
        rows = {}
        for row, index in enumerate(batch.indices):
            example = self.examples[index]
            n = len(example.continuation_ids)
            answers = [bool(right[row, a:b].all()) for a, b in example.answers]
            rows[index] = (
                kl[row, :n].double().mean().clamp(min=0).item(),
                agree[row, :n].double().mean().item(),
                sum(answers) / len(answers) if answers else float("nan"),
                nll[row, :n].double().mean().item(),
            )
        return rows, held, full


def _groups(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices of prompts of similar length that share a batch, whatever order they are asked for in."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Sorted by length, so this prompt is the longest of its batch so far.
        if groups and (len(groups[-1]) + 1) * lengths[index] <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pad(sequences: Sequence[Sequence[int]], *, left: bool, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """ids [B, T] int64, padded with 0, and valid [B, T] bool."""
    width = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    valid = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        part = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, part] = torch.tensor(sequence)
        valid[row, part] = True
    return ids.to(device), valid.to(device)
