"""Plan, search and run a KV-cache policy under a memory target.

    policy = kvplan.load_policy("policy.yaml")
    with kvplan.attach(model, policy) as runtime:
        model.generate(**inputs, past_key_values=runtime.new_cache())

The names below are imported on first use: `import kvplan` loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplan.policy.schema import Policy
    from kvplan.policy.serialize import load_policy
    from kvplan.runtime.attach import attach, full_policy

__version__ = "0.1.0"
__all__ = ["Policy", "__version__", "attach", "full_policy", "load_policy"]

_HOMES = {
    "Policy": "kvplan.policy.schema",
    "attach": "kvplan.runtime.attach",
    "full_policy": "kvplan.runtime.attach",
    "load_policy": "kvplan.policy.serialize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvplan' has no attribute '{name}'")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
