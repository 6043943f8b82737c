"""load_model(): a model, its tokenizer and its ModelSpec, from the bundle, a folder or a hub id, or one clear error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.errors import ModelError
from kvplan.model_spec import ADVICE, DTYPE_BYTES, ModelSpec, model_fingerprint
from kvplan.placement import AUTO, spread
from kvplan.probe import check_runs, refuse_without_interface
from kvplan.registry import unknown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "demo" / "model"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelSpec]:
    """Load a decoder-only model in eval mode.

    Args:
        name_or_path: A folder, a Hugging Face hub id, or None (or "bundled") for the model that comes with kvplan.
        dtype: Name of a torch dtype, or "auto" for the checkpoint's own.
        device: A torch device, e.g. "cpu" or "cuda:1", or "auto": split over all GPUs, and the memory.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: the model is missing, incomplete, broken, or of a kind that kvplan cannot plan.
    """
    _check_dtype(dtype)
    target = None if device == AUTO else _device(device)
    source = _source(name_or_path)
    where = {"trust_remote_code": trust_remote_code, "local_files_only": Path(source).is_dir()}
    with _quiet_transformers(), _one_line_errors(source):
        config = _load_config(source, where)
        _refuse_unplannable(config)
        tokenizer = _load_tokenizer(source, where)
        fingerprint = _fingerprint_before_rounding(source, config, dtype, where)
        model = _load_weights(source, config, dtype, where)
    _refuse_encoder(model)
    _refuse_broken_weights(model, source)
    spec = ModelSpec.from_config(model.config, _dtype_name(model), fingerprint or model_fingerprint(model))
    check_runs(model, spec)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return (spread(model) if target is None else model.to(target)), tokenizer, spec


def check_tokens(model: Any, ids: Sequence[int], where: str) -> None:
    """Fail with a reason; on a GPU a token without embedding would break the process.

    Raises:
        ModelError: the tokenizer gave a token that the model has no embedding for.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = max(ids, default=0)
    if largest >= size:
        raise ModelError(
            f"{where}: holds token {largest}, but the model has {size} embeddings; the tokenizer is another model's"
        )


# ------------------------------------------------------------------ arguments


def _check_dtype(dtype: str) -> None:
    known = ["auto", *sorted(DTYPE_BYTES)]
    if dtype not in known:
        raise ModelError(unknown("dtype", dtype, known))


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"'{name}' is not a device; write for example cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ModelError(f"device '{name}': this machine has no CUDA device that torch can use; use cpu")
        if device.index is not None and device.index >= count:
            raise ModelError(f"device '{name}': the last CUDA device here is cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is not available on this machine; use cpu")
    elif device.type not in ("cpu", "mps"):
        raise ModelError(f"device '{name}' is not supported; use cpu, cuda or mps")
    return device


def _source(name_or_path: str | Path | None) -> str:
    """The folder or hub id to load; paths are checked here, so that a typing error never becomes a network request."""
    if name_or_path is None or str(name_or_path) == BUNDLED:
        if not (BUNDLED_FOLDER / "config.json").is_file():
            raise ModelError(f"the bundled model is missing from this installation ({BUNDLED_FOLDER}); name a model")
        return str(BUNDLED_FOLDER)
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: not a model folder (no config.json in it)")
        return str(path)
    if path.exists():
        raise ModelError(f"{name}: a file, not a model folder")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder")
    return name


# ------------------------------------------------------------------ reading


def _load_config(source: str, where: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, **where)


def _load_tokenizer(source: str, where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if _unreachable(error) or "trust_remote_code" in str(error):
            raise
        raise ModelError(f"{source}: no usable tokenizer in it ({_first_line(error)})") from error
    # Without tokenizer files some classes come back empty instead of failing.
    if len(tokenizer) == 0 or not tokenizer("a b c 1 2 3", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{source}: no usable tokenizer in it (its vocabulary is empty)")
    return tokenizer


def _load_weights(source: str, config: Any, dtype: str, where: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        **where,
    )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{source}: {len(mismatched)} weights have another shape than the config says, the first is {name}: "
            f"{list(stored)}, not {list(wanted)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{source}: {len(missing)} weights are not in the checkpoint, the first is {missing[0]}")
    return model.eval()


def _fingerprint_before_rounding(source: str, config: Any, dtype: str, where: dict[str, Any]) -> str | None:
    """The fingerprint of the stored weights where the loaded ones would give another, else None.

    float16 keeps fewer exponents than the fingerprint's bfloat16, so the weights are read twice.
    """
    if dtype != "float16" or str(config.dtype).removeprefix("torch.") == "float16":
        return None
    return model_fingerprint(_load_weights(source, config, "auto", where))


# ------------------------------------------------------------------ refusing


def _refuse_unplannable(config: Any) -> None:
    """What the config alone can tell, before gigabytes are read."""
    ModelSpec.from_config(config, "float32")
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        for cls in classes if isinstance(classes, (list, tuple)) else [classes]:
            refuse_without_interface(cls, config.model_type)


def _refuse_encoder(model: Any) -> None:
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise ModelError(f"{model.config.model_type} is an encoder (its attention is not causal); {ADVICE}")


def _refuse_broken_weights(model: Any, source: str) -> None:
    import torch

    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(f"{source}: {name} holds {bad} values that are nan or infinite; the checkpoint is broken")


def _dtype_name(model: Any) -> str:
    name = str(model.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ModelError(
            f"the checkpoint's dtype {name} is not supported; choose one of {', '.join(sorted(DTYPE_BYTES))}"
        )
    return name


# ------------------------------------------------------------------ talking


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars, no advice and no word of each retry of a download; the bars of a download stay."""
    import logging as standard

    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    if standard.getLogger("kvplan").isEnabledFor(standard.INFO):  # the user wants to hear it
        yield
        return
    verbosity, bars, hub_verbosity = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """Whatever transformers and safetensors raise for a bad checkpoint, as a ModelError."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source}: {_explain(error, Path(source).is_dir())}") from error


def _explain(error: Exception, is_folder: bool) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "brings its own code; read it, then pass --trust-remote-code"
    if not is_folder and _unreachable(error):
        return "no such folder here, not in the local cache, and the Hugging Face hub cannot be reached"
    if not is_folder and "is not a valid model identifier" in text:
        return "no such folder here, and no such model on the Hugging Face hub (or it needs a login)"
    if "safetensors" in text and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return "no safetensors weights in it; kvplan does not unpickle weights"
    return f"cannot be loaded ({_first_line(error)})"


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
