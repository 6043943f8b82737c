"""Values that stand in a policy file, read one by one: sizes, slots, ranges of layers, methods with parameters."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from kvplan.errors import MethodError, TargetError
from kvplan.methods.codecs import Codec, codecs
from kvplan.methods.evictors import evictors
from kvplan.policy.problems import Problems, explain
from kvplan.policy.schema import FULL, Slots
from kvplan.registry import Registry, unknown
from kvplan.units import BASIS_POINTS, parse_bytes

PERCENT = r"(\d{1,9})(?:\.(\d{1,2}))?%"
LAYER_RANGES = r"\d{1,9}(?:-\d{1,9})?(?:\s*,\s*\d{1,9}(?:-\d{1,9})?)*"
STRICT = ConfigDict(extra="forbid", strict=True)


def percent(text: str) -> int:
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


def slots(value: Any) -> Slots:
    if value == "full":
        return FULL
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"must be at least 1 token, not {value}")
        return Slots(tokens=value)
    if isinstance(value, str) and value.endswith("%"):
        return Slots(share=percent(value))
    raise ValueError(f"must be full, a number of tokens, or a percentage like 35%, not {value!r}")


def share(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f"must be a percentage like 40%, not {value!r}")
    return percent(value)


def size(value: Any) -> int:
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


def one_or_each(value: Any) -> Any:
    """A positive integer, or the list of those that occur in a model whose layers differ."""
    items = value if isinstance(value, list) else [value]
    if not items or any(not isinstance(item, int) or isinstance(item, bool) or item < 1 for item in items):
        raise ValueError(f"must be an integer above 0, or a list of them, not {value!r}")
    return value


def layers(value: Any) -> Any:
    named = isinstance(value, (int, str)) and not isinstance(value, bool)
    if not named or not re.fullmatch(LAYER_RANGES, str(value), re.ASCII):
        raise ValueError(f"must name layers, like 5, 0-3 or '4,6-7', not {value!r}")
    return value


def head_slots(value: Any) -> Slots:
    """`slots`, or a list with a number or a percentage for each KV head."""
    if not isinstance(value, list):
        return slots(value)
    heads, problems = [], []
    for index, item in enumerate(value):
        try:
            heads.append(slots(item))
        except ValueError as error:
            problems.append(((index,), str(error), False))
    if problems:
        raise Problems(problems)
    if len(heads) < 2 or any(head.is_full for head in heads):
        raise ValueError(f"a list gives a number or a percentage for each of several KV heads, not {value!r}")
    return Slots(heads=tuple(heads))


def parameters(method: Any) -> type[BaseModel]:
    """A strict model of a method's parameters, from its dataclass fields."""
    return _parameters(method)


@functools.cache
def _parameters(method: Any) -> type[BaseModel]:
    hints = typing.get_type_hints(method)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(method):
        fields[f.name] = (hints[f.name], ... if f.default is dataclasses.MISSING else f.default)
    return create_model(method.__name__, __config__=STRICT, **fields)


def method(registry: Registry[Any], value: Any) -> Any:
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


def codec_pair(value: Any) -> tuple[Codec, Codec]:
    """`int8`, `{kivi: {bits: 2}}`, or `{keys: ..., values: ...}` with one of these each (dense where one is absent)."""
    if not isinstance(value, dict) or not set(value) & {"keys", "values"}:
        one = method(codecs, value)
        return one, one
    wrong = [key for key in value if key not in ("keys", "values")]
    if wrong:
        raise Problems([((wrong[0],), unknown("key", str(wrong[0]), ["keys", "values"]), True)])
    built, problems = {}, []
    for role in ("keys", "values"):
        try:
            built[role] = method(codecs, value.get(role, "dense"))
        except Problems as error:
            problems += [((role, *path), told, at_key) for path, told, at_key in error.problems]
        except ValueError as error:
            problems.append(((role,), str(error), False))
    if problems:
        raise Problems(problems)
    return built["keys"], built["values"]
