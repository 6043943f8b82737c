"""Policy files: YAML <-> Policy. The only door by which a policy file enters: everything is checked here, at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvplan.errors import PolicyError
from kvplan.files import read_text, write_text
from kvplan.methods.params import settings
from kvplan.model_spec import layer_ranges
from kvplan.policy.compositions import chunk_problems
from kvplan.policy.file_format import MAX_LAYERS, LayerBlock, PolicyFile, known_keys
from kvplan.policy.memory import stated_spec
from kvplan.policy.problems import explain
from kvplan.policy.rules import check_model, check_policy, fit_problems, layer_problems
from kvplan.policy.schema import FORMAT_VERSION, LayerPolicy, Policy, Target, stated_windows
from kvplan.policy.values import LAYER_RANGES
from kvplan.policy.yaml_text import Document, Dumper, read
from kvplan.units import format_share

__all__ = [
    "check_model",
    "check_policy",
    "dump_policy",
    "load_policy",
    "parse_policy",
    "policy_fingerprint",
    "save_policy",
]

# What a `model:` block must state, of all layers alike, so that layers can be checked against it.
_DESCRIBED = {"layers": int, "kv_heads": int, "head_dim": int, "dtype": str}
SCHEMA_FILE = "kvplan-policy-v1.schema.json"
MODELINE = f"# yaml-language-server: $schema=./{SCHEMA_FILE}\n"


def load_policy(path: str | Path) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: everything that is wrong with its content, as `file:line:column: layers.4-15.evictor: ...`.
        KVPlanError: the file cannot be read.
    """
    return parse_policy(read_text(Path(path), "policy file"), str(path))


def parse_policy(text: str, name: str = "policy") -> Policy:
    """Read a policy from YAML text; `name` stands for the file in messages.

    Raises:
        PolicyError: everything that is wrong with it.
    """
    document = read(text, name)
    _check_version(document)
    parsed = _check_shape(document)
    blocks = _layer_blocks(document)
    layers, owners = _expand(document, blocks)
    if parsed is not None and parsed.prefill is not None:
        chunked = Policy(layers=tuple(layers.values()), prefill_chunk_tokens=parsed.prefill.chunk_tokens)
        for name, told in dict.fromkeys((name, told) for _, name, told in chunk_problems(chunked)):
            document.report(("prefill",), f"{name}: {told}")
    document.raise_problems()
    assert parsed is not None
    policy = Policy(
        layers=tuple(layers[index] for index in range(len(layers))),
        model={} if parsed.model is None else parsed.model.model_dump(exclude_unset=True),
        target=None if parsed.target is None else parsed.target.build(),
        prefill_chunk_tokens=None if parsed.prefill is None else parsed.prefill.chunk_tokens,
        provenance=parsed.provenance,
    )
    if all(isinstance(policy.model.get(name), kind) for name, kind in _DESCRIBED.items()):
        windows = stated_windows(policy.model)
        for index, name, told in fit_problems(policy, stated_spec(policy)):
            # What the model's own windows allow is told when the policy meets the model.
            if name != "shares" and index not in windows:
                document.report(("layers", owners[index], name), told)
        document.raise_problems()
    return policy


def _check_version(document: Document) -> None:
    """Another version's keys mean nothing here, so this problem is reported alone."""
    if not isinstance(document.data, dict):
        document.report((), "a policy file is a mapping with the keys kvplan and layers")
    elif "kvplan" not in document.data:
        document.report((), f"no format version; a policy file starts with kvplan: {FORMAT_VERSION}")
    else:
        version = document.data["kvplan"]
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            document.report(("kvplan",), f"must be the format version, a number like {FORMAT_VERSION}, not {version!r}")
        elif version > FORMAT_VERSION:
            told = f"format {version} needs a newer kvplan; this one reads format {FORMAT_VERSION}"
            document.report(("kvplan",), told)
        else:
            return
    document.raise_problems()


def _check_shape(document: Document) -> PolicyFile | None:
    try:
        return PolicyFile.model_validate(document.data)
    except ValidationError as error:
        for path, told, at_key in explain(error, known_keys):
            document.report(path, told, at_key=at_key)
        return None


def _layer_blocks(document: Document) -> dict[Any, LayerPolicy | None]:
    """The layer policy under each key of `layers:`, or None where it is broken (already reported)."""
    blocks: dict[Any, LayerPolicy | None] = {}
    raw = document.data.get("layers")
    for key, value in raw.items() if isinstance(raw, dict) else ():
        try:
            blocks[key] = LayerBlock.model_validate(value).build()
        except ValidationError:
            blocks[key] = None
    return blocks


def _expand(
    document: Document, blocks: Mapping[Any, LayerPolicy | None]
) -> tuple[dict[int, LayerPolicy], dict[int, Any]]:
    """Layer index -> its policy, and -> the key that gives it.

    Reports overlaps, gaps, layers out of range, and rules between layers.
    """
    model = document.data.get("model")
    stated = model.get("layers") if isinstance(model, dict) else None
    known = isinstance(stated, int) and not isinstance(stated, bool) and 0 < stated <= MAX_LAYERS
    count = stated if known else None
    owners: dict[int, Any] = {}
    for key in blocks:
        _claim(document, key, count, owners)
    _report_gaps(document, owners, count)
    layers = {i: block for i, key in sorted(owners.items()) if (block := blocks[key]) is not None}
    for index, name, told in layer_problems(layers):
        document.report(("layers", owners[index], name), told)
    return layers, owners


def _claim(document: Document, key: Any, count: int | None, owners: dict[int, Any]) -> None:
    """Give the layers that `key` names to it."""
    path = ("layers", key)
    text = str(key)
    if isinstance(key, bool) or not isinstance(key, (int, str)) or not re.fullmatch(LAYER_RANGES, text, re.ASCII):
        document.report(path, f"'{key}' names no layers; write for example 5, 0-3 or '4,6-7'", at_key=True)
        return
    last = (count if count is not None else MAX_LAYERS) - 1
    taken: dict[Any, list[int]] = {}
    for part in text.split(","):
        low, high = ([int(n) for n in part.split("-")] * 2)[:2]
        if low > high:
            document.report(path, f"'{part.strip()}' runs backwards", at_key=True)
        if max(low, high) > last:
            document.report(path, f"layer {max(low, high)} is out of range; the last layer is {last}", at_key=True)
        for index in range(low, min(high, last) + 1):
            if index in owners:
                taken.setdefault(owners[index], []).append(index)
            owners.setdefault(index, key)
    for other, indices in taken.items():
        whose = "more than once by this key" if other == key else f"by {other} too"
        document.report(path, f"{_named(indices)} given {whose}; give each layer once", at_key=True)


def _report_gaps(document: Document, owners: Mapping[int, Any], count: int | None) -> None:
    if not isinstance(document.data.get("layers"), dict):
        return
    expected = count if count is not None else max(owners, default=0) + 1
    missing = [index for index in range(expected) if index not in owners]
    if missing:
        document.report(("layers",), f"nothing is said about {_named(missing)}", at_key=True)


def _named(indices: list[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {layer_ranges(indices)}"


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy file, whole or not at all; for editors it names the schema, where that lies beside it.

    Raises:
        PolicyError: the policy could not be read back.
        KVPlanError: the file cannot be written.
    """
    path = Path(path)
    text = dump_policy(policy)
    parse_policy(text, str(path))
    # An editor complains of a schema that is not there.
    write_text(path, MODELINE + text if (path.parent / SCHEMA_FILE).is_file() else text)


def dump_policy(policy: Policy) -> str:
    """The policy as YAML text. Equal layers become one entry; a sharing layer's unused fields are not written.

    Raises:
        PolicyError: `model` or `provenance` holds something that is not plain data.
    """
    lines = [f"kvplan: {FORMAT_VERSION}"]
    if policy.model:
        lines.append(f"model: {_flow(_plain(policy.model, 'model'))}")
    if policy.target is not None:
        lines.append(f"target: {_flow(_target(policy.target))}")
    if policy.prefill_chunk_tokens is not None:
        lines.append(f"prefill: {_flow({'chunk_tokens': policy.prefill_chunk_tokens})}")
    lines.append("layers:")
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(policy.layers):
        groups.setdefault(_flow(layer_block(layer)), []).append(index)
    for text, indices in groups.items():
        key = layer_ranges(indices)
        lines.append(f'  "{key}": {text}' if "," in key else f"  {key}: {text}")
    if policy.provenance:
        block = {"provenance": _plain(policy.provenance, "provenance")}
        lines.append(yaml.dump(block, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120).rstrip("\n"))
    return "\n".join(lines) + "\n"


def policy_fingerprint(policy: Policy) -> str:
    """sha256 over what the policy does, whatever it is called, made for or made by."""
    does = dump_policy(Policy(layers=policy.layers, prefill_chunk_tokens=policy.prefill_chunk_tokens))
    # The line that files once began with stays part of it, so that fingerprints in old results hold.
    return "sha256:" + hashlib.sha256((MODELINE + does).encode()).hexdigest()[:32]


def layer_block(layer: LayerPolicy) -> dict[str, Any]:
    """One layer as the file writes it: what takes effect is spelled out, what does not is written only if set."""
    if layer.shares is not None:
        return {"shares": layer.shares}
    slots, default = layer.slots, LayerPolicy()
    each = [one.tokens if one.tokens is not None else str(one) for one in slots.heads or (slots,)]
    written: dict[str, Any] = {"slots": each if slots.heads else each[0]}
    for name in ("sink_tokens", "recent_tokens", "min_slots"):
        shares = any(one.share is not None for one in slots.heads or (slots,))
        counts = shares or (not slots.is_full and name != "min_slots")
        if counts or getattr(layer, name) != getattr(default, name):
            written[name] = getattr(layer, name)
    if not slots.is_full or layer.evictor != default.evictor:
        written["evictor"] = _named_method(layer.evictor)
    for name in ("head_split", "merger", "channels"):
        if getattr(layer, name) is not None:
            written[name] = _named_method(getattr(layer, name))
    keys, values = layer.key_codec, layer.value_codec
    if keys == values and keys != default.key_codec:
        written["codec"] = _named_method(keys)
    elif keys != values:
        written["codec"] = {"keys": _named_method(keys), "values": _named_method(values)}
    return written


def _named_method(method: Any) -> Any:
    """`tova`, or `{snapkv: {window_tokens: 16}}`."""
    params = settings(method)
    return {method.name: params} if params else method.name


def _target(target: Target) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if target.share is not None:
        written["share"] = format_share(target.share)
    if target.bytes is not None:
        written["bytes"] = _size(target.bytes)
    if target.context_tokens is not None:
        written["context_tokens"] = target.context_tokens
    if target.bytes is not None or target.batch != 1:
        written["batch"] = target.batch
    return written


def _size(count: int) -> str:
    """The largest unit that states the bytes exactly: 536870912 -> '512MiB'."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count and count % 2**power == 0:
            return f"{count >> power}{unit}"
    return f"{count}B"


def _plain(value: Any, where: str) -> Any:
    """Mappings as dicts and sequences as lists, down to scalars.

    Raises:
        PolicyError: something else is in there.
    """
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise PolicyError(f"{where}: a policy file cannot hold a {type(value).__name__}; make it a number or text")


def _flow(data: dict[str, Any]) -> str:
    text = yaml.dump(data, Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return str(text).rstrip("\n")
