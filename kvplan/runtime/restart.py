"""Starting a forward at a later decoder layer, from what the layers before it once gave.

Nothing is known of a model but that its decoder layers lie in one list. Whether what a layer hands on is all that the
next ones need is tried on a few tokens before it is relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Output:
    """What a layer hands on: tensors as they are kept, each with the device that it came on; one, or a tuple."""

    tensors: tuple[tuple[Tensor, torch.device], ...]
    is_tuple: bool

    def given(self) -> Tensor | tuple[Tensor, ...]:
        found = tuple(tensor.to(device) for tensor, device in self.tensors)
        return found if self.is_tuple else found[0]


def decoder_layers(model: nn.Module, num_layers: int) -> Sequence[nn.Module] | None:
    """The model's decoder layers in order, or None where they do not lie in one list."""

    def is_layer(module: nn.Module, index: int) -> bool:
        return any(getattr(part, "layer_idx", None) == index for part in module.modules())

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    found = [m for m in lists if all(is_layer(layer, i) for i, layer in enumerate(m))]
    return list(found[0]) if len(found) == 1 else None


@contextmanager
def recorded(layers: Sequence[nn.Module] | None, keep: Callable[[Tensor], Tensor]) -> Iterator[dict[int, Output]]:
    """What each layer hands on while the block runs, by layer; nothing where it is more than tensors."""
    found: dict[int, Output] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            given = output if isinstance(output, tuple) else (output,)
            if all(isinstance(x, Tensor) for x in given):
                found[index] = Output(tuple((keep(x), x.device) for x in given), isinstance(output, tuple))

        return hook

    handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers or ())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def started_at(layers: Sequence[nn.Module], first: int, output: Output) -> Iterator[None]:
    """Layers before `first` do nothing while the block runs, and `first` gets the output given."""
    given = output.given()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return given

    # An instance may have a forward of its own already (accelerate's hooks).
    before = [layer.__dict__.get("forward") for layer in layers[:first]]
    try:
        for layer in layers[:first]:
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, own in zip(layers[:first], before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


@torch.no_grad()
def can_start_at(model: Any, layers: Sequence[nn.Module], first: int, ids: Tensor) -> bool:
    """Whether a forward of the bare model from layer `first` on gives what the whole one does.

    Args:
        ids: [1, T] int64, some tokens.
    """
    with recorded(layers, lambda x: x) as outputs:
        whole = model(input_ids=ids, use_cache=False).logits
    if first - 1 not in outputs:
        return False
    try:
        with started_at(layers, first, outputs[first - 1]):
            part = model(input_ids=ids, use_cache=False).logits
    except Exception:  # whatever a model does without what its earlier layers would have left it
        return False
    return bool(torch.allclose(part, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))
