"""PolicyCache: a transformers cache whose layers are slot pools, and the proof of what they hold."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvplan.errors import MemoryPlanExceeded, RuntimeLimitError
from kvplan.model_spec import ModelSpec
from kvplan.policy.layout import evicts
from kvplan.policy.memory import BytesPlan, plan
from kvplan.policy.schema import Policy
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.parts import Part
from kvplan.runtime.layers.base import PolicyLayer, Seen, attend_seen, heads_to_rows, rows_to_heads
from kvplan.runtime.layers.budgeted import BudgetedLayer
from kvplan.runtime.layers.elastic import ElasticLayer
from kvplan.runtime.layers.per_head import PerHeadLayer
from kvplan.runtime.layers.shared import SharedLayer
from kvplan.runtime.layers.staged import StagedLayer
from kvplan.runtime.rotary import Rotaries


@dataclass
class Attached:
    """Whether the policy that a cache was made for is still on its model."""

    active: bool = True


@dataclass
class _Prompt:
    """A layer's whole prompt, kept only until the last layer that shares it has run."""

    keys: Tensor
    values: Tensor


@dataclass
class _Slots:
    """What a layer's queries saw, likewise; `kv_heads` where each KV head is a row of its own, else 0."""

    seen: list[Seen]
    kv_heads: int


class _Thread(threading.local):
    """What one forward pass hands from one transformers call to the next."""

    mask_for: PolicyCache | None = None
    pending: tuple[Tensor, PolicyCache, int] | None = None


HANDOFF = _Thread()


def build_layer(policy: Policy, spec: ModelSpec, index: int, *, with_positions: bool = False) -> PolicyLayer:
    """The cache layer that carries out one layer policy; with every slot's position where that is asked for."""
    layer, shape = policy.layers[index], spec.layers[index]
    with_positions = with_positions or policy.chunked
    if layer.shares is not None:
        return SharedLayer(layer, shape)
    inner = StagedLayer if layer.stored_whole[1] else BudgetedLayer
    if evicts(layer, shape):
        if layer.evictor.forgets_after is not None:
            return PerHeadLayer(layer, shape, ElasticLayer)
        if layer.slots.heads or layer.head_split is not None:
            return PerHeadLayer(layer, shape, inner, with_positions)
    return inner(layer, shape, with_positions)


class PolicyCache(Cache):
    """Pass as `past_key_values` to `generate` or to a forward call of the attached model.

    Args:
        policy: What each layer keeps.
        spec: The model's shape.
        attached: Goes false when the policy leaves the model.
        rotaries: How the model rotates its queries; None: no evictor asks.
    """

    def __init__(
        self,
        policy: Policy,
        spec: ModelSpec,
        attached: Attached | None = None,
        rotaries: Rotaries | None = None,
    ) -> None:
        super().__init__(layers=[build_layer(policy, spec, i) for i in range(spec.num_layers)])
        self.rotaries = rotaries
        self.policy, self.spec, self.attached = policy, spec, attached or Attached()
        self.padding: Tensor | None = None
        self.mask_noted = False
        self.peak_kv_bytes = 0
        sources = [policy.source(i) for i in range(spec.num_layers)]
        self._last_reader = {source: max(i for i, s in enumerate(sources) if s == source) for source in set(sources)}
        self._contexts: dict[int, _Prompt | _Slots] = {}
        self._prompt_open = True
        self._last, self._over = False, False

    # -- the transformers interface -------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        # A forward that broke off may have left its keys behind.
        HANDOFF.mask_for, HANDOFF.pending = self, None
        return self.layers[0].get_mask_sizes(query_length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Leave the new keys for the attention call that follows, which knows its layer by the key tensor itself."""
        if not self.attached.active:
            raise RuntimeLimitError(
                "this cache's policy is no longer attached to a model; use it inside its `with` block"
            )
        HANDOFF.pending = (key_states, self, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0].columns

    @property
    def is_compileable(self) -> bool:
        return False

    # -- one layer's turn -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def run_layer(
        self, index: int, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, prefill: Any
    ) -> Tensor:
        """Store the new tokens of one layer under its policy and attend.

        Args:
            q: [B, Hq, T, D]; keys, values: [B, Hkv, T, D].
            prefill: `(keys, values) -> output [B, T, Hq, Dv]`, the model's own attention over a whole prompt.
        """
        if not self.mask_noted:
            raise RuntimeLimitError(
                "this forward brought its own 4-D attention mask, which kvplan's cache cannot honour after eviction; "
                "pass a 2-D attention_mask (or none)"
            )
        layer: PolicyLayer = self.layers[index]
        if index == 0 and layer.columns != self.layers[-1].columns:
            raise RuntimeLimitError(
                "an earlier forward on this cache broke off: some layers hold its tokens and others do not; "
                "start again with a new cache"
            )
        if index == 0 and layer.columns and q.shape[0] != layer.num_rows:
            raise RuntimeLimitError(
                f"the cache holds {layer.num_rows} rows and this forward brings {q.shape[0]}; "
                "make a new cache for each batch of prompts"
            )
        if self._over:
            raise RuntimeLimitError("this cache was told that its last forward had come; make a new one")
        source = self.policy.source(index)
        in_chunks = self.in_prompt_chunks(q.shape[2], layer.columns)
        if self.rotaries is not None and (in_chunks or layer.columns == 0):
            args = replace(args, rotation=self.rotaries.rotation(index))
        if in_chunks:
            output = self._run_later(index, source, q, keys, values, args, self._valid(keys, first=layer.columns == 0))
        elif layer.columns == 0:
            output = self._run_prompt(index, source, q, keys, values, args, prefill)
        else:
            output = self._run_later(index, source, q, keys, values, args, None)
        layer.columns += q.shape[2]
        if self._last_reader.get(source) == index:
            self._contexts.pop(source, None)
        if index == self.spec.num_layers - 1:
            self.mask_noted, self.padding = False, None
            self._over = self._last
            self._prompt_open = self._prompt_open and q.shape[2] == self.policy.prefill_chunk_tokens
        return output

    def in_prompt_chunks(self, num_new: int, columns: int | None = None) -> bool:
        """Whether new tokens are a piece of a prompt that comes in chunks; a single token after others is decoded.

        The prompt ends with the first forward that is not exactly as long as a chunk.
        """
        columns = self.get_seq_length() if columns is None else columns
        return self.policy.chunked and self._prompt_open and (num_new > 1 or columns == 0)

    def close_prompt(self) -> None:
        """The prompt is complete: whatever comes now is appended to it, also where its last piece was a whole chunk."""
        self._prompt_open = False

    def stop_storing(self) -> None:
        """The next forward is the last one, as when a continuation is scored: what it brings need not be stored."""
        self._last = True
        for layer in self.layers:
            layer.stop_storing()

    def lend_prompt(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Hand a layer's whole prompt to the layers that share it, where the layer itself is not run."""
        if self._last_reader[index] != index:
            self._contexts[index] = _Prompt(keys, values)

    def _run_prompt(
        self, index: int, source: int, q: Tensor, keys: Tensor, values: Tensor, args: AttentionArgs, prefill: Any
    ) -> Tensor:
        if source != index:
            prompt = self._contexts[source]
            assert isinstance(prompt, _Prompt)
            return prefill(prompt.keys, prompt.values)
        output = prefill(keys, values)
        self.layers[index].store_prompt(q, keys, values, self._valid(keys), args)
        if self._last_reader[index] != index:
            self._contexts[index] = _Prompt(keys, values)
        self._note_peak(_storage_bytes(keys) + _storage_bytes(values), index)
        return output

    def _run_later(
        self,
        index: int,
        source: int,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        args: AttentionArgs,
        chunk_valid: Tensor | None,
    ) -> Tensor:
        """Tokens that come to what is held: a piece of the prompt where `chunk_valid` [B, T] is given."""
        if source != index:
            context = self._contexts[source]
            assert isinstance(context, _Slots)
            H = context.kv_heads
            if not H:
                return attend_seen(q, context.seen, args)
            return rows_to_heads(attend_seen(heads_to_rows(q, H), context.seen, args.by_head(q.shape[0], H)), H)
        layer = self.layers[index]
        before = layer.storage
        shared = self._last_reader[index] != index
        if chunk_valid is None:
            output, seen = layer.append(q, keys, values, args, shared)
        else:
            output, seen = layer.append_chunk(q, keys, values, chunk_valid, args)
        if shared:
            self._contexts[index] = _Slots(seen, layer.heads_as_rows)
        replaced = [pool for pool in before if pool not in layer.storage]
        if replaced or keys.shape[2] > 1:
            extra = sum(sum(pool.bytes_by_kind().values()) for pool in replaced)
            if keys.shape[2] > 1:
                extra += sum(_part_bytes(part) for s in seen for part in s.parts)
            self._note_peak(extra, index)
        return output

    def _valid(self, keys: Tensor, first: bool = True) -> Tensor:
        """[B, T] bool of these tokens; refuses padding that is not on the left of the prompt."""
        B, _, T, _ = keys.shape
        if self.padding is None:
            return torch.ones(B, T, dtype=torch.bool, device=keys.device)
        mask = (self.padding[:, :T] if first else self.padding).to(keys.device, torch.bool)
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise RuntimeLimitError(
                "the attention mask has padding after text; kvplan's cache needs left padding "
                "(tokenizer.padding_side = 'left')"
            )
        valid = mask[:, -T:]
        # More of a prompt may come while its pieces are as long as a chunk.
        if self.policy.prefill_chunk_tokens != T and not bool(valid[:, -1].all()):
            raise RuntimeLimitError("a row of the batch has no token at all; drop it")
        return valid

    def _note_peak(self, extra_bytes: int, index: int) -> None:
        held = sum(
            _storage_bytes(c.keys) + _storage_bytes(c.values)
            for source, c in self._contexts.items()
            if isinstance(c, _Prompt) and source != index
        )
        self.peak_kv_bytes = max(self.peak_kv_bytes, self.kv_bytes + held + extra_bytes)

    # -- rows -----------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.batch_select_indices(indices)

    def crop(self, max_length: int) -> None:
        self.layers[0].crop(max_length)

    def activate_past_recording(self, *args: Any, **kwargs: Any) -> None:
        self.layers[0].crop(0)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.padding, self.mask_noted, self.peak_kv_bytes, self._prompt_open = None, False, 0, True
        self._contexts.clear()
        self._last, self._over = False, False

    # -- proof ----------------------------------------------------------------------------------------------------

    @property
    def _owner(self) -> PolicyLayer:
        return self.layers[self.policy.source(0)]

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return self._owner.prompt_lengths

    @property
    def appended(self) -> int:
        """Tokens after the prompt, the same in every row."""
        return self._owner.appended

    @property
    def kv_bytes(self) -> int:
        """Storage bytes held now, side arrays included."""
        return sum(sum(layer.bytes_by_kind().values()) for layer in self.layers)

    def row_bytes(self, row: int) -> int:
        """Storage bytes of one row, in all layers."""
        return sum(layer.row_bytes(row) for layer in self.layers)

    @property
    def full_kv_bytes(self) -> int:
        """What a cache that evicts nothing would hold for the same tokens, without padding."""
        owner = self._owner
        return self.spec.full_kv_bytes([owner.seen(b) for b in range(owner.num_rows)])

    @property
    def plan(self) -> BytesPlan:
        """What the policy promises for the tokens seen so far."""
        return plan(self.policy, self.spec, self.prompt_lengths, self.appended)

    def report(self) -> dict[str, Any]:
        """Bytes by layer and kind, planned, held and peak; tokens seen and held per row.

        Raises:
            MemoryPlanExceeded: more bytes are held than were planned.
        """
        planned, owner = self.plan, self._owner
        if self.kv_bytes > planned.total:
            raise MemoryPlanExceeded(f"the cache holds {self.kv_bytes} bytes, the plan allows {planned.total}")
        return {
            "kv_bytes": self.kv_bytes,
            "kv_bytes_planned": planned.total,
            "kv_bytes_full": self.full_kv_bytes,
            "peak_kv_bytes": self.peak_kv_bytes,
            "tokens_seen": [owner.seen(b) for b in range(owner.num_rows)],
            "layers": [
                {**layer.bytes_by_kind(), "held": [layer.held(b) for b in range(layer.num_rows)]}
                for layer in self.layers
            ],
        }


def _part_bytes(part: Part) -> int:
    return sum(_storage_bytes(t) for stored in (part.keys, part.values) for t in stored.codes.values())


def _storage_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values; a view of a fused projection counts only its own part."""
    return tensor.numel() * tensor.element_size()
