"""The shape of a policy file, format 1, as pydantic models: what may stand where. Rules that span layers come later."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)

from kvplan.errors import MethodError, TargetError
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import Codec, codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.model_spec import layers_in
from kvplan.policy.schema import FORMAT_VERSION, FULL, LayerPolicy, Slots, Target
from kvplan.registry import Registry, unknown
from kvplan.units import BASIS_POINTS, parse_bytes

MAX_LAYERS = 10_000  # Far above any model; keeps a mistyped range from filling the memory.
PERCENT = r"(\d{1,9})(?:\.(\d{1,2}))?%"
LAYER_RANGES = r"\d{1,9}(?:-\d{1,9})?(?:\s*,\s*\d{1,9}(?:-\d{1,9})?)*"
_STRICT = ConfigDict(extra="forbid", strict=True)


_WORDS = {
    "Input should be": "must be",
    "a valid integer": "an integer",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


class Problems(ValueError):
    """Problems below the value that is being validated, each with its path from there."""

    def __init__(self, problems: list[tuple[tuple[Any, ...], str, bool]]) -> None:
        self.problems = problems
        super().__init__(problems)


def _percent(text: str) -> int:
    """'37.5%' -> 3750 basis points, by integers only.

    Raises:
        ValueError: not a percentage above 0 and at most 100, with at most two decimals.
    """
    match = re.fullmatch(PERCENT, text, re.ASCII)
    if not match:
        raise ValueError(f"'{text}' is not a percentage with at most two decimals, like 35% or 37.25%")
    share = int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))
    if not 0 < share <= BASIS_POINTS:
        raise ValueError(f"{text} is not above 0% and at most 100%")
    return share


def _slots(value: Any) -> Slots:
    if value == "full":
        return FULL
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"must be at least 1 token, not {value}")
        return Slots(tokens=value)
    if isinstance(value, str) and value.endswith("%"):
        return Slots(share=_percent(value))
    raise ValueError(f"must be full, a number of tokens, or a percentage like 35%, not {value!r}")


def _share(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f"must be a percentage like 40%, not {value!r}")
    return _percent(value)


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        try:
            value = parse_bytes(value)
        except TargetError as error:
            raise ValueError(str(error)) from error
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be a size like 512MiB, not {value!r}")
    if value < 1:
        raise ValueError("must be above 0 bytes")
    return value


def _one_or_each(value: Any) -> Any:
    """A positive integer, or the list of those that occur in a model whose layers differ."""
    items = value if isinstance(value, list) else [value]
    if not items or any(not isinstance(item, int) or isinstance(item, bool) or item < 1 for item in items):
        raise ValueError(f"must be an integer above 0, or a list of them, not {value!r}")
    return value


def _layers(value: Any) -> Any:
    named = isinstance(value, (int, str)) and not isinstance(value, bool)
    if not named or not re.fullmatch(LAYER_RANGES, str(value), re.ASCII):
        raise ValueError(f"must name layers, like 5, 0-3 or '4,6-7', not {value!r}")
    return value


def parameters(method: Any) -> type[BaseModel]:
    """A strict model of a method's parameters, from its dataclass fields."""
    return _parameters(method)


@functools.cache
def _parameters(method: Any) -> type[BaseModel]:
    hints = typing.get_type_hints(method)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(method):
        fields[f.name] = (hints[f.name], ... if f.default is dataclasses.MISSING else f.default)
    return create_model(method.__name__, __config__=_STRICT, **fields)


def _method(registry: Registry[Any], value: Any) -> Any:
    """Build `tova` or `{snapkv: {window_tokens: 16}}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(
            f"must be a name, or one name with its parameters like {{snapkv: {{window_tokens: 16}}}}, not {value!r}"
            if registry is evictors
            else f"must be the name of a {registry.kind}, or one name with its parameters, not {value!r}"
        )
    ((name, params),) = value.items()
    try:
        cls = registry[str(name)]
    except MethodError as error:
        raise ValueError(str(error)) from error
    try:
        checked = parameters(cls).model_validate({} if params is None else params)
        return cls(**{key: getattr(checked, key) for key in checked.model_fields_set})
    except ValidationError as error:
        known = [f.name for f in dataclasses.fields(cls)]
        found = explain(error, lambda _: (f"parameter of {name}", known))
        raise Problems([((name, *path), told, at_key) for path, told, at_key in found]) from error
    except MethodError as error:
        raise Problems([((name,), str(error), False)]) from error


def _codec(value: Any) -> tuple[Codec, Codec]:
    """`int8`, `{kivi: {bits: 2}}`, or `{keys: ..., values: ...}` with one of these each (dense where one is absent)."""
    if not isinstance(value, dict) or not set(value) & {"keys", "values"}:
        one = _method(codecs, value)
        return one, one
    wrong = [key for key in value if key not in ("keys", "values")]
    if wrong:
        raise Problems([((wrong[0],), unknown("key", str(wrong[0]), ["keys", "values"]), True)])
    built, problems = {}, []
    for role in ("keys", "values"):
        try:
            built[role] = _method(codecs, value.get(role, "dense"))
        except Problems as error:
            problems += [((role, *path), told, at_key) for path, told, at_key in error.problems]
        except ValueError as error:
            problems.append(((role,), str(error), False))
    if problems:
        raise Problems(problems)
    return built["keys"], built["values"]


def _head_slots(value: Any) -> Slots:
    """`slots`, or a list with a number or a percentage for each KV head."""
    if not isinstance(value, list):
        return _slots(value)
    heads, problems = [], []
    for index, item in enumerate(value):
        try:
            heads.append(_slots(item))
        except ValueError as error:
            problems.append(((index,), str(error), False))
    if problems:
        raise Problems(problems)
    if len(heads) < 2 or any(head.is_full for head in heads):
        raise ValueError(f"a list gives a number or a percentage for each of several KV heads, not {value!r}")
    return Slots(heads=tuple(heads))


# Absent fields are told by `model_fields_set`; this default is never read as a value.
_ABSENT: Any = None
_FromZero = Annotated[int, Field(ge=0)]
_FromOne = Annotated[int, Field(ge=1)]
_FromTwo = Annotated[int, Field(ge=2)]  # a forward of one token is a decode step
_LayerCount = Annotated[int, Field(ge=1, le=MAX_LAYERS)]


def _one_or_each_schema() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 1}
    return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1}]}


_Each = Annotated[Any, PlainValidator(_one_or_each), WithJsonSchema(_one_or_each_schema())]
_LAYERS_SCHEMA = {"type": ["string", "integer"], "pattern": f"^{LAYER_RANGES}$", "minimum": 0}
_Percent = {"type": "string", "pattern": f"^{PERCENT}$"}


_SOME_SLOTS: list[dict[str, Any]] = [{"type": "integer", "minimum": 1}, _Percent]
_SLOTS_PER_HEAD = {"type": "array", "items": {"anyOf": _SOME_SLOTS}, "minItems": 2}


def _names(registry: Registry[Any]) -> PlainValidator:
    """Builds the method of one kind that a field names."""
    return PlainValidator(functools.partial(_method, registry))


_Evictor = Annotated[Any, _names(evictors), WithJsonSchema({})]
_HeadSplit = Annotated[Any, _names(head_splits), WithJsonSchema({})]
_Merger = Annotated[Any, _names(mergers), WithJsonSchema({})]
_Channels = Annotated[Any, _names(channel_selectors), WithJsonSchema({})]


class ModelBlock(BaseModel):
    """The model that the policy is for; checked before anything runs."""

    model_config = _STRICT
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
    window_layers: Annotated[Any, PlainValidator(_layers), WithJsonSchema(_LAYERS_SCHEMA)] = Field(
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

    model_config = _STRICT
    share: Annotated[Any, PlainValidator(_share), WithJsonSchema(_Percent)] = Field(
        default=_ABSENT, description="Share of the full cache, like 40%."
    )
    bytes: Annotated[Any, PlainValidator(_bytes), WithJsonSchema({"type": ["string", "integer"]})] = Field(
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

    model_config = _STRICT
    slots: Annotated[
        Any,
        PlainValidator(_head_slots),
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
    codec: Annotated[Any, PlainValidator(_codec), WithJsonSchema({})] = Field(
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

    model_config = _STRICT
    chunk_tokens: _FromTwo = Field(
        description="Prompt tokens per forward; each chunk competes for the slots before the next one comes."
    )


class PolicyFile(BaseModel):
    """A kvplan policy: what each layer of a model's KV cache keeps."""

    model_config = _STRICT
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


def explain(error: ValidationError, known: Any) -> list[tuple[tuple[Any, ...], str, bool]]:
    """pydantic's errors as (path, message, is the key to blame). `known(path)` gives a key's kind and siblings."""
    found: list[tuple[tuple[Any, ...], str, bool]] = []
    for e in error.errors(include_url=False):
        path, cause = tuple(e["loc"]), e.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            found += [((*path, *below), told, at_key) for below, told, at_key in cause.problems]
        elif e["type"] == "extra_forbidden":
            kind, names = known(path)
            told = unknown(kind, str(path[-1]), names) if names else f"unknown {kind} '{path[-1]}' (it has none)"
            found.append((path, told, True))
        elif e["type"] == "missing":
            found.append((path, "is required", False))
        elif e["type"] in ("model_type", "dict_type", "model_attributes_type"):
            found.append((path, f"must be a mapping, not {e['input']!r}", False))
        elif isinstance(cause, ValueError):
            found.append((path, str(cause), False))
        else:
            told = e["msg"]
            for theirs, ours in _WORDS.items():
                told = told.replace(theirs, ours)
            found.append((path, f"{told}, not {e['input']!r}", False))
    return found


def schema() -> dict[str, Any]:
    """JSON Schema of a policy file (draft 7)."""
    data = _tidy(PolicyFile.model_json_schema())
    properties = data["$defs"]["LayerBlock"]["properties"]
    kinds: dict[str, Registry[Any]] = {
        "evictor": evictors,
        "head_split": head_splits,
        "merger": mergers,
        "channels": channel_selectors,
    }
    for field, registry in kinds.items():
        properties[field].update(_method_schema(registry))
    codec = _method_schema(codecs)
    both = {"type": "object", "additionalProperties": False, "minProperties": 1}
    properties["codec"]["anyOf"] = [*codec["anyOf"], {**both, "properties": {"keys": codec, "values": codec}}]
    for name, choices in (("LayerBlock", ("slots", "shares")), ("TargetBlock", ("share", "bytes"))):
        data["$defs"][name]["oneOf"] = [{"required": [choice]} for choice in choices]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "kvplan policy, format 1", **data}


def _method_schema(registry: Registry[Any]) -> dict[str, Any]:
    params = {}
    for name in registry:
        props = _tidy(parameters(registry[name]).model_json_schema())
        params[name] = {"type": ["object", "null"], "additionalProperties": False, "properties": props["properties"]}
    settings = {"type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"enum": registry.names()}, {**settings, "properties": params}]}


def _tidy(node: Any) -> Any:
    """Without pydantic's titles and its null defaults of keys that have none."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    drop = {k for k, v in node.items() if (k == "title" and isinstance(v, str)) or (k == "default" and v in (None, ""))}
    return {key: _tidy(value) for key, value in node.items() if key not in drop}
