"""ModelSpec: the shape of a model's KV cache. The only reader of Hugging Face config fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvplan.errors import ModelError

# What a refusal ends with: what is allowed, and what to do.
ADVICE = (
    "kvplan plans decoders that attend through transformers' attention interface, in full or in a sliding window, over "
    "keys and values of each layer's own; run this model without kvplan, or plan another one"
)
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer's cache: `window` is the model's own sliding window in tokens, or None for full attention."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What a plan must know of a model.

    Args:
        layers: A `LayerSpec` per decoder layer.
        query_heads: Query heads per layer.
        dtype: Name of the dtype that keys and values are held in, e.g. "bfloat16".
        max_context_tokens: The longest sequence that the model was made for, or None when the config does not say.
        model_type: `config.model_type`.
        fingerprint: Hash of config and weights, or None when not computed.
    """

    layers: tuple[LayerSpec, ...]
    query_heads: int
    dtype: str
    max_context_tokens: int | None = None
    model_type: str = ""
    fingerprint: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def token_bytes(self, layer: int) -> int:
        """Bytes of one token's keys and values in one layer, all KV heads."""
        spec = self.layers[layer]
        return spec.kv_heads * (spec.key_dim + spec.value_dim) * DTYPE_BYTES[self.dtype]

    def full_kv_bytes(self, row_tokens: list[int]) -> int:
        """What a cache that evicts nothing holds for rows of these lengths (prompt and generated), without padding."""
        return sum(
            self.token_bytes(i) * sum(min(n, layer.window or n) for n in row_tokens)
            for i, layer in enumerate(self.layers)
        )

    def policy_block(self) -> dict[str, Any]:
        """The `model:` block of a policy file."""
        heads = sorted({layer.kv_heads for layer in self.layers})
        dims = sorted({layer.key_dim for layer in self.layers})
        block: dict[str, Any] = {
            "type": self.model_type,
            "layers": self.num_layers,
            "kv_heads": heads[0] if len(heads) == 1 else heads,
            "head_dim": dims[0] if len(dims) == 1 else dims,
            "dtype": self.dtype,
        }
        windows = {i: layer.window for i, layer in enumerate(self.layers) if layer.window is not None}
        if windows:
            lengths = sorted(set(windows.values()))
            block["window"] = lengths[0] if len(lengths) == 1 else lengths
            block["window_layers"] = layer_ranges(list(windows))
        return block if self.fingerprint is None else {**block, "fingerprint": self.fingerprint}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        return cls(**{**data, "layers": tuple(LayerSpec(**layer) for layer in data["layers"])})

    @classmethod
    def from_config(cls, config: Any, dtype: str, fingerprint: str | None = None) -> ModelSpec:
        """Read a transformers config.

        Raises:
            ModelError: a model of a kind that cannot be planned, or a config without the fields of a decoder.
        """
        text = config.get_text_config(decoder=True)
        # Where layers differ, transformers has a config for each of them.
        differing = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else []
        if reason := _unplannable(config, text, differing or [text]):
            raise ModelError(f"{config.model_type}{reason}; {ADVICE}")
        try:
            per_layer = differing or [text] * int(text.num_hidden_layers)
            types = getattr(text, "layer_types", None) or [_layer_type(one) for one in per_layer]
            heads = {int(one.num_attention_heads) for one in per_layer}
            layers = tuple(_layer_spec(one, kind) for one, kind in zip(per_layer, types, strict=True))
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"{config.model_type}: the config does not describe a decoder with attention ({error}); {ADVICE}"
            ) from error
        if len(heads) > 1:
            raise ModelError(f"{config.model_type}: layers of {sorted(heads)} query heads are not supported; {ADVICE}")
        return cls(
            layers=layers,
            query_heads=heads.pop(),
            dtype=dtype,
            max_context_tokens=getattr(text, "max_position_embeddings", None),
            model_type=config.model_type,
            fingerprint=fingerprint,
        )


def _unplannable(config: Any, text: Any, per_layer: Sequence[Any]) -> str:
    """What in a config rules a plan out, or an empty string."""
    if getattr(config, "is_encoder_decoder", False):
        return " is an encoder-decoder"
    if rank := next((r for one in per_layer if (r := getattr(one, "kv_lora_rank", None))), None):
        return f" caches a compressed latent (MLA), not keys and values per head (kv_lora_rank is {rank})"
    if shared := getattr(text, "num_kv_shared_layers", None):
        return f" shares keys and values by itself: its last {shared} layers store none (num_kv_shared_layers)"
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return " adds position biases to its attention (ALiBi)"
    # Before transformers 5.23 some hybrids (recurrent_gemma) have the other name.
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention", "attention"}):
        where = layer_ranges([i for i, kind in enumerate(types) if kind in unknown])
        return f": layers of type {', '.join(unknown)} are not supported (layers {where})"
    return ""


def _layer_type(config: Any) -> str:
    """Of a layer whose config states no type: a window (Mistral) applies to every layer."""
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _layer_spec(config: Any, kind: str) -> LayerSpec:
    heads = int(config.num_attention_heads)
    key_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return LayerSpec(
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        key_dim=key_dim,
        value_dim=int(getattr(config, "v_head_dim", None) or key_dim),
        window=config.sliding_window if kind == "sliding_attention" else None,
    )


def layer_ranges(indices: Sequence[int]) -> str:
    """[4, 6, 7] -> '4,6-7'."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def layers_in(ranges: str) -> Iterator[range]:
    """'4,6-7' -> range(4, 5), range(6, 8); a part that runs backwards is empty."""
    for part in ranges.split(","):
        low, high = ([int(n) for n in part.split("-")] * 2)[:2]
        yield range(low, high + 1)


def model_fingerprint(model: Any) -> str:
    """sha256 over the config's shape-deciding fields and every weight: the model's identity, whatever its path."""
    import torch

    digest = hashlib.sha256()
    skipped = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
    config = {k: v for k, v in model.config.to_dict().items() if k not in skipped and not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # Most models are shipped in bfloat16; one dtype keeps the hash independent of --dtype.
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()[:32]
