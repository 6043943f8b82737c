"""Placement: a model that is larger than one device, split over all of them by accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvplan.errors import ModelError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
OFFLOADED = ("cpu", "disk")


def spread(model: Any) -> Any:
    """Split a model over the GPUs of this machine, what does not fit staying in memory; on one device it stays whole.

    The model is in memory as a whole at first, so that it can be checked before.

    Raises:
        ModelError: accelerate is not installed, or GPUs and memory together are too small.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise ModelError("device 'auto' needs accelerate: pip install 'kvplan[split]'") from error
    whole = list(getattr(model, "_no_split_modules", None) or ())
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    placed = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    if "disk" in placed.values():
        raise ModelError("device 'auto': the model does not fit the GPUs and the memory of this machine")
    return dispatch_model(model, placed, skip_keys=getattr(model, "_skip_keys_device_placement", None))


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device of the embeddings, also while their weights are elsewhere."""
    import torch

    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        return next(embeddings.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def layer_devices(model: Any) -> dict[int, str]:
    """Layer -> the device that it runs on; {} when the model was never spread."""
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    main = next((device for device in placed.values() if device not in OFFLOADED), "cpu")
    found: dict[int, str] = {}
    for name, module in model.named_modules() if placed else ():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer not in found:
            device = placed[max((p for p in placed if p == "" or f"{name}.".startswith(f"{p}.")), key=len)]
            found[layer] = str(main if device in OFFLOADED else device)
    return found
