"""The residual stream around each attention block, found by hooks that know no model family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from kvplan.errors import ModelError


def decoder_layers(base: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(layer, its attention block) in order, found without knowing the family.

    They are the `ModuleList` of `num_hidden_layers` layers, in each of which one child holds a module with its index
    as `layer_idx`.

    Raises:
        ModelError: there is no such list.
    """
    config = base.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    for container in base.modules():
        if isinstance(container, nn.ModuleList) and len(container) == config.num_hidden_layers:
            found = [
                [
                    child
                    for child in layer.children()
                    if any(getattr(m, "layer_idx", None) == i for m in child.modules())
                ]
                for i, layer in enumerate(container)
            ]
            if all(len(children) == 1 for children in found):
                return [(layer, children[0]) for layer, children in zip(container, found, strict=True)]
    raise ModelError(f"{config.model_type}: no list of decoder layers with one attention block each was found")


class ResidualProbe:
    """Finds the residual stream before and after one layer's attention block, whatever the family.

    Before: the layer's input. After: the input of the first child that runs after attention and reads the sum. So the
    input of a child falls in one of three cases:
    - attention's output, or made from it alone (Gemma's norm after attention, dropout): the branch, not yet added;
    - seen before attention (GPT-NeoX and Phi run the MLP in parallel): the sum exists only as input + branch;
    - anything else: the sum.

    Args:
        found: Called in each forward with the stream before and after, [B, T, hidden] each.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, found: Callable[[Tensor, Tensor], None]) -> None:
        self.attention, self.found = attention, found
        self.children = [child for child in layer.children() if not isinstance(child, nn.ModuleList)]
        self.layer = layer
        self._clear()

    def _clear(self) -> None:
        self.before: list[Tensor] = []
        self.branch: list[Tensor] = []
        self.done = False

    def hook(self, stack: ExitStack) -> None:
        stack.callback(self._clear)
        hooks = [
            self.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.layer.register_forward_hook(self._leave),
            *(child.register_forward_pre_hook(self._child_enter, with_kwargs=True) for child in self.children),
            *(child.register_forward_hook(self._child_leave, with_kwargs=True) for child in self.children),
        ]
        for handle in hooks:
            stack.callback(handle.remove)

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._clear()
        self.before = [_first_tensor(args, kwargs)]

    def _child_enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.done or not self.branch or module is self.attention:
            return
        tensor = _first_tensor(args, kwargs)
        if _is_in(tensor, self.branch):
            return
        self._measure(self._sum() if _is_in(tensor, self.before) else tensor)

    def _child_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.done:
            return
        tensor = output if isinstance(output, Tensor) else output[0]
        if module is self.attention or (self.branch and _is_in(_first_tensor(args, kwargs), self.branch)):
            self.branch.append(tensor)
        else:
            self.before.append(tensor)

    def _leave(self, *_: Any) -> None:
        if not self.done and self.branch:
            self._measure(self._sum())
        self._clear()

    def _sum(self) -> Tensor:
        return self.before[0] + self.branch[-1]

    def _measure(self, after: Tensor) -> None:
        before = self.before[0]
        self.found(before, after.reshape(before.shape))
        self.done, self.before, self.branch = True, [], []


def _first_tensor(args: Any, kwargs: Any) -> Tensor:
    tensor = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(tensor, Tensor):
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return tensor


def _is_in(tensor: Tensor, group: list[Tensor]) -> bool:
    """Same memory, so that a view counts; the group keeps its tensors alive, so no address is used twice."""
    return any(tensor.data_ptr() == other.data_ptr() for other in group)
