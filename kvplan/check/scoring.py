"""Scorer: what a policy does to the model's next-token distributions on given prompts."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvplan.calibrate.examples import Example
from kvplan.check.decode import copied, greedy
from kvplan.errors import DataError
from kvplan.loading import check_tokens
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.placement import input_device
from kvplan.policy.layout import evicts
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy
from kvplan.runtime.attach import Runtime, attach
from kvplan.runtime.cache import PolicyCache
from kvplan.runtime.replay import PromptCapture, capture, forward, must_prefill, prefill, replay
from kvplan.runtime.restart import Output, can_start_at, decoder_layers, recorded, started_at
from kvplan.runtime.store import Store, free_bytes
from kvplan.stats import PromptScores

Answers = tuple[tuple[int, ...], ...]
Shares = tuple[int | None, ...]
MOST_SHARED = 8  # choices of shared layers whose prompts are kept


@dataclass
class _Batch:
    """Prompts prefilled together, with the full cache's predictions over their continuations.

    Attributes:
        prompts: What was captured, by the sources of the layers that share; without sharing first.
        continuation: [B, C] padded on the right with 0.
        reference: [B, C, V] float32 log-probabilities of the full cache.
        outputs: What each decoder layer handed on over the continuation, under the full cache.
    """

    indices: list[int]
    ids: Tensor
    valid: Tensor
    prompts: dict[Shares, PromptCapture]
    continuation: Tensor
    reference: Tensor
    outputs: dict[int, Output]

    def rows(self) -> list[_Batch]:
        """Each prompt as a batch of its own, without padding and to be prefilled anew; all of them if none has any."""
        if bool(self.valid.all()):
            return [self]
        apart = []
        for row, index in enumerate(self.indices):
            now, own = slice(row, row + 1), self.valid[row]
            ids, valid = self.ids[now, own], self.valid[now, own]
            apart.append(_Batch([index], ids, valid, {}, self.continuation[now], self.reference[now], {}))
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
        sharing: Layers will share caches: keep what layers hand on over the prompts too, so that the prefill of the
            first such policy starts at the first layer that shares. One hidden state more per token and layer.
        replay_memory: Most bytes of captured prompts that are kept in memory, on the model's device; what is more lies
            in memory-mapped temporary files. Default: half of what is free there now.

    Raises:
        DataError: an example has nothing to score, or tokens that the model does not know.
        KVPlanError: (from `prepare`, `score` and `measure`) the temporary files cannot be written.
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
        sharing: bool = False,
        replay_memory: int | None = None,
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
        self._keep, self._progress, self._sharing = keep, progress, sharing
        self.store = Store(free_bytes(input_device(model)) // 2 if replay_memory is None else replay_memory)
        self._unshared: Shares = (None,) * spec.num_layers
        self._decoder = decoder_layers(model, spec.num_layers) if keep else None
        self._starts: dict[int, bool] = {}  # by layer, whether a forward can start there
        self._shared: list[Shares] = []  # least recently used first

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
        return self._measure([policy], indices, count_bytes=False)[0].scores

    def measure(self, policy: Policy, indices: Sequence[int] | None = None) -> Measured:
        """Scores, and bytes counted in the caches' storage right after the prompts."""
        return self.measure_all([policy], indices)[0]

    def measure_all(self, policies: Sequence[Policy], indices: Sequence[int] | None = None) -> list[Measured]:
        """Every policy on a batch of prompts before the next batch is prefilled."""
        return self._measure(policies, indices, count_bytes=True)

    def _measure(self, policies: Sequence[Policy], indices: Sequence[int] | None, count_bytes: bool) -> list[Measured]:
        wanted = list(range(len(self.examples))) if indices is None else list(indices)
        found: list[dict[int, _Row]] = [{} for _ in policies]
        for part in self._parts(wanted):
            batch = self._batch(part)
            for policy, rows in zip(policies, found, strict=True):
                # Where a prompt's chunks end, and so what they evict, would depend on the padding before it.
                for piece in batch.rows() if policy.chunked else [batch]:
                    rows.update(self._score_batch(policy, piece, count_bytes))
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
        decoder = self._decoder if self._sharing else None
        prompt = capture(self.model, self._full, self.spec, ids, valid, self._kept, decoder)
        prompt.has_room = self._has_room
        batch = _Batch(indices, ids, valid, {prompt.shares: prompt}, continuation, torch.empty(0), {})
        with attach(self.model, self._full, self.spec) as runtime, torch.no_grad():
            with recorded(self._decoder and self._decoder[:-1], self._kept) as batch.outputs:
                found = self._continue(runtime, replay(runtime, prompt), batch, prompt.last_logits)
        batch.reference = self._kept(found)
        if self._keep:
            self._batches[key] = batch
        return batch

    def _kept(self, tensor: Tensor) -> Tensor:
        return self.store.keep(tensor) if self._keep else tensor

    def _has_room(self, size: int) -> bool:
        return self._keep and self.store.has_room(size)

    def _captured(self, policy: Policy, batch: _Batch) -> PromptCapture:
        """The batch's prompt with the same layers shared, captured from the first layer on that no other has alike."""
        shares = tuple(layer.shares for layer in policy.layers)
        if any(source is not None for source in shares):
            self._use(shares)
        if shares not in batch.prompts:
            known = max(batch.prompts.values(), key=lambda p: self._first_unlike(p, shares))
            first = self._first_unlike(known, shares)
            full = replace(self._full, layers=tuple(LayerPolicy(slots=FULL, shares=s) for s in shares))
            made = capture(
                self.model, full, self.spec, batch.ids, batch.valid, self._kept, self._decoder,
                known if first else None, first,
            )  # fmt: skip
            # Layers before the first that shares are the same whatever is shared: one copy is enough.
            unshared = next(i for i, source in enumerate(shares) if source is not None)
            made.has_room = self._has_room
            made.layers[:unshared] = batch.prompts[self._unshared].layers[:unshared]
            batch.prompts[shares] = made
        return batch.prompts[shares]

    def _use(self, shares: Shares) -> None:
        """Note a choice of shared layers; of too many, the one that was not asked for the longest is forgotten."""
        self._shared = [*(s for s in self._shared if s != shares), shares]
        for batch in self._batches.values():
            for old in self._shared[:-MOST_SHARED]:
                batch.prompts.pop(old, None)
        self._shared = self._shared[-MOST_SHARED:]

    def _first_unlike(self, known: PromptCapture, shares: Shares) -> int:
        """The layer from which a prefill with these layers shared must run when another one is known; 0: all of it."""
        same = (a == b for a, b in zip(known.shares, shares, strict=True))
        first = next((i for i, alike in enumerate(same) if not alike), 0)
        return first if first - 1 in known.outputs and self._can_start_at(first) else 0

    def _can_start_at(self, layer: int) -> bool:
        if layer not in self._starts:
            assert self._decoder is not None
            ids = torch.tensor([self.examples[0].prompt_ids[-8:]], device=input_device(self.model))
            self._starts[layer] = can_start_at(self.model, self._decoder, layer, ids)
        return self._starts[layer]

    def _first_changed(self, policy: Policy, batch: _Batch) -> int:
        """The layer from which the continuation must run: those before it do what they do under the full cache."""
        layers = zip(policy.layers, self.spec.layers, strict=True)
        changed = (i for i, (layer, spec) in enumerate(layers) if not _keeps_all(layer, spec))
        lent = [layer.shares for layer in policy.layers if layer.shares is not None]  # these must run to be read
        first = min(next(changed, self.spec.num_layers), self.spec.num_layers - 1, *lent)
        return first if first and first - 1 in batch.outputs and self._can_start_at(first) else 0

    def _continue(self, runtime: Any, cache: PolicyCache, batch: _Batch, last_logits: Tensor) -> Tensor:
        """Log-probabilities [B, C, V] that predict each continuation token."""
        lengths = batch.valid.sum(-1, keepdim=True)
        width = batch.continuation.shape[1]
        first = last_logits[:, None].float()
        if width == 1:
            return first.log_softmax(-1)
        positions = lengths + torch.arange(width - 1, device=lengths.device)
        cache.stop_storing()
        logits = forward(runtime, cache, batch.continuation[:, :-1], positions, None)
        return torch.cat([first, logits], 1).log_softmax(-1)

    @torch.no_grad()
    def _score_batch(self, policy: Policy, batch: _Batch, count_bytes: bool) -> dict[int, _Row]:
        anew = must_prefill(policy) and (policy.chunked or not self._keep)
        prompt = None if anew else self._captured(policy, batch)
        first = 0 if anew else self._first_changed(policy, batch)
        most = self._generate.get(batch.indices[0]) if count_bytes else None
        with attach(self.model, policy, self.spec) as runtime:
            cache, last = _compressed(runtime, batch, prompt, 0 if count_bytes else first)
            held = _bytes(runtime, cache) if count_bytes else [_NOT_COUNTED] * len(batch.indices)
            with ExitStack() as stack:
                if first:
                    assert self._decoder is not None
                    stack.enter_context(started_at(self._decoder, first, batch.outputs[first - 1]))
                found = self._continue(runtime, cache, batch, last)
            answers = () if most is None else self._answers(runtime, batch, prompt, most)
        reference = batch.reference.to(found.device)
        kl = (reference.exp() * (reference - found)).sum(-1)
        agree = found.argmax(-1) == reference.argmax(-1)
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

    def _answers(self, runtime: Runtime, batch: _Batch, prompt: PromptCapture | None, most: int) -> Answers:
        """What is generated for each answer of a prompt that is a batch of its own."""
        (index,) = batch.indices
        example = self.examples[index]
        cache, logits = _compressed(runtime, batch, prompt)
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


def _keeps_all(layer: LayerPolicy, spec: LayerSpec) -> bool:
    """Whether a layer does what the full cache does, to the bit."""
    stored = layer.key_codec.name == layer.value_codec.name == "dense" and layer.channels is None
    return stored and layer.shares is None and not evicts(layer, spec)


def _compressed(
    runtime: Runtime, batch: _Batch, prompt: PromptCapture | None, first: int = 0
) -> tuple[PolicyCache, Tensor]:
    """The cache that the policy leaves after the prompts, and the logits [B, V] that follow them.

    Args:
        prompt: As it was captured; None: it is run anew.
        first: Layers before it stay empty.
    """
    if prompt is not None:
        return replay(runtime, prompt, first), prompt.last_logits
    cache = runtime.new_cache()
    return cache, prefill(runtime, cache, batch.ids, batch.valid)


def _bytes(runtime: Runtime, cache: PolicyCache) -> list[PromptBytes]:
    planned = [plan(runtime.policy, runtime.spec, [tokens], cache.appended) for tokens in cache.prompt_lengths]
    return [PromptBytes(p.total, cache.row_bytes(row), p.full) for row, p in enumerate(planned)]


_NOT_COUNTED = PromptBytes(0, 0, 0)


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
