"""attach(): put a policy on a model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from kvplan.errors import RuntimeLimitError
from kvplan.model_spec import ModelSpec
from kvplan.placement import layer_devices
from kvplan.policy.schema import FULL, LayerPolicy, Policy
from kvplan.policy.serialize import check_model, check_policy, load_policy
from kvplan.probe import check_runs, switched
from kvplan.runtime.attention import register
from kvplan.runtime.cache import Attached, PolicyCache
from kvplan.runtime.rotary import Rotaries, rotaries_for

_ATTACHED = "_kvplan_attached"
CHUNKS_NEED = Version("5.23.0")


@dataclass(frozen=True)
class Runtime:
    """A policy on a model. Caches made here work only while it is attached."""

    model: Any
    policy: Policy
    spec: ModelSpec
    attached: Attached
    rotaries: Rotaries | None = None

    def new_cache(self) -> PolicyCache:
        """An empty cache for one batch of sequences."""
        return PolicyCache(self.policy, self.spec, self.attached, self.rotaries)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        compiled: bool = False,
    ) -> Tensor:
        """Generate on a cache of its own.

        Args:
            input_ids: [B, T] int64, padded on the left.
            attention_mask: [B, T], 0 on padding; None: no padding.
            temperature: 0 takes the likeliest token.
            compiled: Capture the decode step: `torch.compile` on a CPU (a minute to compile, then faster steps), a CUDA
                graph on a GPU. Needs plain slots, as many in every row.

        Returns:
            [B, T + n] int64; rows that met an end token go on until all have (compiled: a few more).

        Raises:
            RuntimeLimitError: `compiled`, and the policy or the batch has no fixed shape.
        """
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        if not compiled:
            return self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
                past_key_values=self.new_cache(),
                max_new_tokens=max_new_tokens,
                **sampling,
            )
        from kvplan.runtime.compiled import generate_compiled  # it needs this module

        return generate_compiled(self, input_ids, attention_mask, max_new_tokens, temperature)


class _NoProjection(nn.Module):
    """Stands in for a key or value projection whose result nobody reads: zeros that take no memory."""

    stands_in = True

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], self.out_features)


def full_policy(model: Any) -> Policy:
    """The policy that keeps everything: generates what the model alone would."""
    spec = spec_of(model)
    return Policy(layers=(LayerPolicy(slots=FULL),) * spec.num_layers, model=spec.policy_block())


def spec_of(model: Any) -> ModelSpec:
    """The model's shape, in the dtype that it runs in."""
    return ModelSpec.from_config(model.config, str(next(model.parameters()).dtype).removeprefix("torch."))


@contextlib.contextmanager
def attach(model: Any, policy: Policy | str | Path, spec: ModelSpec | None = None) -> Iterator[Runtime]:
    """Run `model` under `policy` inside the `with` block; the model is as it was afterwards.

    Args:
        model: A transformers decoder that goes through the attention interface.
        policy: A `Policy`, or the path of a policy file.
        spec: The model's shape, when it is already known (with a fingerprint, the policy's is checked against it).

    Raises:
        PolicyError: the policy does not fit the model.
        ModelError: the model cannot be planned, or does not use its cache and attention as a policy needs, or an
            evictor must know how it rotates its queries and that could not be told.
        RuntimeLimitError: another policy is attached to this model.
    """
    policy = policy if isinstance(policy, Policy) else load_policy(policy)
    spec = spec_of(model) if spec is None else spec
    check_policy(policy)
    check_model(policy, spec)
    if getattr(model, _ATTACHED, False):
        raise RuntimeLimitError("a policy is already attached to this model; leave its `with` block first")
    check_runs(model, spec)
    _refuse_sharing_across_devices(model, policy)
    rotaries = rotaries_for(model, policy, spec)
    attached = Attached()
    with switched(model, register()), _without_projections(model, policy), _in_chunks(model, policy):
        setattr(model, _ATTACHED, True)
        try:
            yield Runtime(model, policy, spec, attached, rotaries)
        finally:
            attached.active = False
            delattr(model, _ATTACHED)


def _refuse_sharing_across_devices(model: nn.Module, policy: Policy) -> None:
    devices = layer_devices(model)
    for layer, plan in enumerate(policy.layers):
        if plan.shares is not None and devices.get(layer) != devices.get(plan.shares):
            raise RuntimeLimitError(
                f"layer {layer} shares the cache of layer {plan.shares}, but they are on the devices {devices[layer]} "
                f"and {devices[plan.shares]}; search with --without sharing, or load the model on one device"
            )


@contextlib.contextmanager
def _without_projections(model: nn.Module, policy: Policy) -> Iterator[None]:
    """Take away the key and value projections of sharing layers (models that fuse them still compute them)."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    shares = any(layer.shares is not None for layer in policy.layers)
    for module in model.modules() if shares else ():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index >= len(policy.layers) or policy.layers[index].shares is None:
            continue
        for name in ("k_proj", "v_proj"):
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                taken.append((module, name, projection))
                setattr(module, name, _NoProjection(projection.out_features))
    try:
        yield
    finally:
        for module, name, projection in taken:
            setattr(module, name, projection)


@contextlib.contextmanager
def _in_chunks(model: Any, policy: Policy) -> Iterator[None]:
    """Let `generate` split prompts as the policy says."""
    config = getattr(model, "generation_config", None)
    if config is None or not policy.chunked:
        yield
        return
    if Version(transformers.__version__) < CHUNKS_NEED:
        raise RuntimeLimitError(
            f"prompts in chunks need transformers {CHUNKS_NEED} or newer, this is {transformers.__version__}: an older "
            "generate() feeds the whole text again on a second turn; update it, or remove prefill from the policy"
        )
    before = config.prefill_chunk_size
    config.prefill_chunk_size = policy.prefill_chunk_tokens
    try:
        yield
    finally:
        config.prefill_chunk_size = before
