"""The shape of a policy file, format 1, as pydantic models: what may stand where. Rules that span layers come later."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from kvplan.methods.channels import channel_selectors
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.model_spec import layers_in
from kvplan.policy import values
from kvplan.policy.problems import Problems
from kvplan.policy.schema import FORMAT_VERSION, LayerPolicy, Target
from kvplan.policy.values import LAYER_RANGES, PERCENT, STRICT
from kvplan.registry import Registry

MAX_LAYERS = 10_000  # Far above any model; keeps a mistyped range from filling the memory.

# Absent fields are told by `model_fields_set`; this default is never read as a value.
_ABSENT: Any = None
_FromZero = Annotated[int, Field(ge=0)]
_FromOne = Annotated[int, Field(ge=1)]
_FromTwo = Annotated[int, Field(ge=2)]  # a forward of one token is a decode step
_LayerCount = Annotated[int, Field(ge=1, le=MAX_LAYERS)]


def _one_or_each_schema() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 1}
    return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1}]}


_Each = Annotated[Any, PlainValidator(values.one_or_each), WithJsonSchema(_one_or_each_schema())]
_LAYERS_SCHEMA = {"type": ["string", "integer"], "pattern": f"^{LAYER_RANGES}$", "minimum": 0}
_Percent = {"type": "string", "pattern": f"^{PERCENT}$"}


_SOME_SLOTS: list[dict[str, Any]] = [{"type": "integer", "minimum": 1}, _Percent]
_SLOTS_PER_HEAD = {"type": "array", "items": {"anyOf": _SOME_SLOTS}, "minItems": 2}


def _names(registry: Registry[Any]) -> PlainValidator:
    """Builds the method of one kind that a field names."""
    return PlainValidator(functools.partial(values.method, registry))


_Evictor = Annotated[Any, _names(evictors), WithJsonSchema({})]
_HeadSplit = Annotated[Any, _names(head_splits), WithJsonSchema({})]
_Merger = Annotated[Any, _names(mergers), WithJsonSchema({})]
_Channels = Annotated[Any, _names(channel_selectors), WithJsonSchema({})]


class ModelBlock(BaseModel):
    """The model that the policy is for; checked before anything runs."""

    model_config = STRICT
    type: str = Field(default="", description="The config's model_type.")
    name: str = Field(
        default="", description="The model's folder or hub id: what `kvplan run` loads when it is given no `--model`."
    )
    layers: _LayerCount = Field(description="Decoder layers.")
    kv_heads: _Each = Field(description="KV heads per layer; a list of those that occur where layers differ.")
    head_dim: _Each = Field(description="Channels of a key; a list of those that occur where layers differ.")
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = Field(description="What keys and values are held in.")
    window: _Each = Field(
        default=_ABSENT,
        description="The model's own sliding window in tokens; a list of those that occur where layers differ.",
    )
    window_layers: Annotated[Any, PlainValidator(values.layers), WithJsonSchema(_LAYERS_SCHEMA)] = Field(
        default=_ABSENT, description="The layers with that window, as in '0,2-3'; all others attend to everything."
    )
    fingerprint: str = Field(default="", description="Hash of config and weights.")

    @model_validator(mode="after")
    def _window_and_its_layers(self) -> ModelBlock:
        if len(self.model_fields_set & {"window", "window_layers"}) == 1:
            raise ValueError("window and window_layers go together; give both or neither")
        if self.window_layers is None:
            return self
        parts = list(layers_in(str(self.window_layers)))
        told = None
        if (last := max(part.stop for part in parts) - 1) >= self.layers:
            told = f"layer {last} is out of range; the last layer is {self.layers - 1}"
        elif not all(parts):
            told = f"'{self.window_layers}' runs backwards"
        elif sum(map(len, parts)) > len(set().union(*parts)):
            told = f"'{self.window_layers}' names a layer twice"
        if told:
            raise Problems([(("window_layers",), told, False)])
        return self


class TargetBlock(BaseModel):
    """What the plan was made for: a share of the full cache, or bytes at a context and batch."""

    model_config = STRICT
    share: Annotated[Any, PlainValidator(values.share), WithJsonSchema(_Percent)] = Field(
        default=_ABSENT, description="Share of the full cache, like 40%."
    )
    bytes: Annotated[Any, PlainValidator(values.size), WithJsonSchema({"type": ["string", "integer"]})] = Field(
        default=_ABSENT, description="Bytes at `context_tokens` and `batch`, like 512MiB or 1.5GiB."
    )
    context_tokens: _FromOne = Field(default=_ABSENT, description="Prompt tokens of a row that the bytes hold for.")
    batch: _FromOne = Field(default=1, description="Rows that the bytes hold for.")

    @model_validator(mode="after")
    def _one_of_two(self) -> TargetBlock:
        if len(self.model_fields_set & {"share", "bytes"}) != 1:
            raise ValueError("needs either share or bytes")
        return self

    def build(self) -> Target:
        return Target(**{name: getattr(self, name) for name in self.model_fields_set})


class LayerBlock(BaseModel):
    """What one layer, or each of a range of layers, keeps."""

    model_config = STRICT
    slots: Annotated[
        Any,
        PlainValidator(values.head_slots),
        WithJsonSchema(
            {"anyOf": [{"const": "full"}, *_SOME_SLOTS, {"type": "array", "items": {"anyOf": _SOME_SLOTS}}]}
        ),
    ] = Field(
        default=_ABSENT,
        description="full, tokens per KV head, or a percentage of the prompt; or a list of these, one per KV head.",
    )
    sink_tokens: _FromZero = Field(default=_ABSENT, description="First tokens that are never evicted.")
    recent_tokens: _FromOne = Field(
        default=_ABSENT, description="Last tokens that are never evicted, the current one included."
    )
    min_slots: _FromOne = Field(default=_ABSENT, description="Floor of a percentage, in tokens.")
    evictor: _Evictor = Field(default=_ABSENT, description="Which tokens stay: a name, or a name with parameters.")
    head_split: _HeadSplit = Field(
        default=_ABSENT, description="How slots are divided among the KV heads at the end of the prompt."
    )
    merger: _Merger = Field(default=_ABSENT, description="What evicted tokens leave behind.")
    channels: _Channels = Field(default=_ABSENT, description="Which key channels are stored; all by default.")
    codec: Annotated[Any, PlainValidator(values.codec_pair), WithJsonSchema({})] = Field(
        default=_ABSENT, description="How slots are stored: a codec for both, or {keys: ..., values: ...}."
    )
    shares: _FromZero = Field(default=_ABSENT, description="Earlier layer whose cache this one reads.")

    @model_validator(mode="after")
    def _own_or_shared(self) -> LayerBlock:
        others = sorted(self.model_fields_set - {"shares"})
        if "shares" in self.model_fields_set and others:
            raise ValueError(f"shares stands alone, a sharing layer stores nothing; remove {', '.join(others)}")
        if not self.model_fields_set & {"shares", "slots"}:
            raise ValueError("needs slots or shares")
        return self

    def build(self) -> LayerPolicy:
        fields = {name: getattr(self, name) for name in self.model_fields_set - {"codec"}}
        if self.codec is not None:
            fields["key_codec"], fields["value_codec"] = self.codec
        return LayerPolicy(**fields)


class PrefillBlock(BaseModel):
    """How prompts are read."""

    model_config = STRICT
    chunk_tokens: _FromTwo = Field(
        description="Prompt tokens per forward; each chunk competes for the slots before the next one comes."
    )


class PolicyFile(BaseModel):
    """A kvplan policy: what each layer of a model's KV cache keeps."""

    model_config = STRICT
    kvplan: Literal[1] = Field(description="Format version.")
    model: ModelBlock = Field(default=_ABSENT, description="The model that the policy is for.")
    target: TargetBlock = Field(
        default=_ABSENT, description="What the plan was made for; absent in a policy written by hand."
    )
    prefill: PrefillBlock = Field(default=_ABSENT, description="How prompts are read; absent: at once.")
    layers: dict[Any, LayerBlock] = Field(
        description="Keys are layers: 5, 0-3 or '4,6-7'.",
        json_schema_extra={"propertyNames": {"pattern": f"^{LAYER_RANGES}$"}, "minProperties": 1},
    )
    provenance: dict[str, Any] = Field(default_factory=dict, description="Where it came from.")


BLOCKS: dict[str, type[BaseModel]] = {
    "model": ModelBlock,
    "target": TargetBlock,
    "prefill": PrefillBlock,
    "layers": LayerBlock,
}
assert FORMAT_VERSION == 1


def known_keys(path: tuple[Any, ...]) -> tuple[str, list[str]]:
    """What a key at `path` is called, and which ones exist there."""
    block = PolicyFile if len(path) == 1 else BLOCKS[path[0]]
    return "key", list(block.model_fields)
