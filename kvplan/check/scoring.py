"""Scorer: what a policy does to the model's next-token distributions on given prompts."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplan.calibrate.prompts import Example
from kvplan.check.decode import copied, greedy
from kvplan.errors import DataError
from kvplan.loading import check_tokens
from kvplan.model_spec import ModelSpec
from kvplan.placement import input_device
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy
from kvplan.runtime.attach import Runtime, attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import PromptCapture, capture, forward, must_prefill, prefill, replay
from kvplan.stats import PromptScores

Answers = tuple[tuple[int, ...], ...]


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
class PromptBytes:
    """One prompt's cache right after the prompt: what the policy promises, what is held, what a full cache holds."""

    planned: int
    held: int
    full: int


@dataclass(frozen=True)
class Measured:
    """Scores together with the storage bytes that the caches really held after the prompts.

    Attributes:
        bytes: One entry per prompt.
        answers: Likewise: the tokens generated for each of its answers (once, if it has none), where asked for.
    """

    scores: PromptScores
    bytes: tuple[PromptBytes, ...]
    answers: tuple[Answers, ...]

    @property
    def kv_bytes(self) -> int:
        return sum(b.held for b in self.bytes)

    @property
    def full_kv_bytes(self) -> int:
        return sum(b.full for b in self.bytes)


@dataclass(frozen=True)
class _Row:
    """One prompt under one policy."""

    kl: float
    top1: float
    task: float
    nll: float
    bytes: PromptBytes
    answers: Answers


class Scorer:
    """Scores policies on a fixed set of examples. Each prompt is prefilled once, whatever the number of policies.

    The prompt is prefilled and compressed, then the continuation is fed on the compressed cache (teacher forcing), by
    the same code that generates. Position 0 of the continuation is predicted by the prompt's own pass.

    Args:
        model: The model, in eval mode.
        spec: Its shape.
        examples: The prompts.
        batch_tokens: Most prompt tokens that are run together, padding included; a longer prompt runs alone.
        keep: Keep captured prompts for the next call. Turn off to measure many prompts once.
        generate: Index of an example -> most new tokens of each of its answers, for those whose answers `measure` also
            generates: greedily, on the compressed cache, the earlier answers being the true ones.
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
        generate: Mapping[int, int] | None = None,
    ) -> None:
        empty = next((e for e in examples if not e.continuation_ids), None)
        if empty is not None:
            raise DataError(f"prompt '{empty.id}' has nothing to score: no answer, and too short to cut a continuation")
        for example in examples:
            check_tokens(model, [*example.prompt_ids, *example.continuation_ids], f"prompt {example.id!r}")
        self.model, self.spec, self.examples = model, spec, list(examples)
        self._full = Policy(layers=(LayerPolicy(slots=FULL),) * spec.num_layers)
        self._generate = dict(generate or {})
        self._groups = _groups([len(e.prompt_ids) for e in self.examples], batch_tokens, set(self._generate))
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
        return self.measure_all([policy], indices)[0]

    def measure_all(self, policies: Sequence[Policy], indices: Sequence[int] | None = None) -> list[Measured]:
        """Every policy on a batch of prompts before the next batch is prefilled."""
        wanted = list(range(len(self.examples))) if indices is None else list(indices)
        found: list[dict[int, _Row]] = [{} for _ in policies]
        for part in self._parts(wanted):
            batch = self._batch(part)
            for policy, rows in zip(policies, found, strict=True):
                # Where a prompt's chunks end, and so what they evict, would depend on the padding before it.
                for piece in batch.rows() if policy.chunked else [batch]:
                    rows.update(self._score_batch(policy, piece))
            if self._progress is not None:
                self._progress(len(found[0]), len(set(wanted)))
        return [_gathered([rows[i] for i in wanted]) for rows in found]

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
        device = input_device(self.model)
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
    def _score_batch(self, policy: Policy, batch: _Batch) -> dict[int, _Row]:
        with attach(self.model, policy, self.spec) as runtime:
            cache, last = _compressed(runtime, batch)
            held = _bytes(runtime, cache)
            found = self._continue(runtime, cache, batch, last)
            most = self._generate.get(batch.indices[0])
            answers = () if most is None else self._answers(runtime, batch, most)
        kl = (batch.reference.exp() * (batch.reference - found)).sum(-1)
        agree = found.argmax(-1) == batch.reference.argmax(-1)
        right = found.argmax(-1) == batch.continuation
        nll = -found.gather(-1, batch.continuation[..., None])[..., 0]
        rows = {}
        for row, index in enumerate(batch.indices):
            example = self.examples[index]
            n = len(example.continuation_ids)
            exact = [bool(right[row, a:b].all()) for a, b in example.answers]
            rows[index] = _Row(
                kl=kl[row, :n].double().mean().clamp(min=0).item(),
                top1=agree[row, :n].double().mean().item(),
                task=sum(exact) / len(exact) if exact else float("nan"),
                nll=nll[row, :n].double().mean().item(),
                bytes=held[row],
                answers=answers,
            )
        return rows

    def _answers(self, runtime: Runtime, batch: _Batch, most: int) -> Answers:
        """What is generated for each answer of a prompt that is a batch of its own."""
        (index,) = batch.indices
        example = self.examples[index]
        cache, logits = _compressed(runtime, batch)
        starts, fed, found = [a for a, _ in example.answers] or [0], 0, []
        for start in starts:
            if start > fed:
                at = torch.arange(fed, start, device=batch.ids.device)[None] + len(example.prompt_ids)
                logits = forward(runtime, cache, batch.continuation[:, fed:start], at, None)[:, -1]
                fed = start
            # Later questions follow the true answer, the same one under every policy.
            own = cache if start == starts[-1] else copied(cache)
            found.append(greedy(runtime, own, logits, len(example.prompt_ids) + fed, most))
        return tuple(found)


def _compressed(runtime: Runtime, batch: _Batch) -> tuple[PolicyCache, Tensor]:
    """The cache that the policy leaves after the prompts, and the logits [B, V] that follow them."""
    if must_prefill(runtime.policy):
        cache = runtime.new_cache()
        return cache, prefill(runtime, cache, batch.ids, batch.prompt.valid)
    return replay(runtime, batch.prompt), batch.prompt.last_logits


def _bytes(runtime: Runtime, cache: PolicyCache) -> list[PromptBytes]:
    planned = [plan(runtime.policy, runtime.spec, [tokens], cache.appended) for tokens in cache.prompt_lengths]
    return [PromptBytes(p.total, cache.row_bytes(row), p.full) for row, p in enumerate(planned)]


def _gathered(rows: Sequence[_Row]) -> Measured:
    scores = PromptScores(
        kl=tuple(r.kl for r in rows),
        top1=tuple(r.top1 for r in rows),
        task=tuple(r.task for r in rows),
        nll=tuple(r.nll for r in rows),
    )
    return Measured(scores, tuple(r.bytes for r in rows), tuple(r.answers for r in rows))


def _groups(lengths: list[int], batch_tokens: int, alone: Container[int]) -> list[list[int]]:
    """Indices of prompts of similar length that share a batch, whatever order they are asked for in."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (i in alone, lengths[i])):
        if index in alone:
            groups.append([index])
        # Sorted by length, so this prompt is the longest of its batch so far.
        elif groups and (len(groups[-1]) + 1) * lengths[index] <= batch_tokens:
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
