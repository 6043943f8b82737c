"""The JSON Schema of a policy file, for editors."""

from __future__ import annotations

from typing import Any

from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.policy.file_format import PolicyFile
from kvplan.policy.values import parameters
from kvplan.registry import Registry


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of a policy file; shipped beside this module."""
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
