"""A trial forward over two tokens: does a model use its cache and its attention the way kvplan counts on?

Config fields tell the shape of a model, not what it does. Each decoder layer in turn must give the cache one key and
one value per token and KV head, of the shape that the config tells, and attend over just those, once, through
transformers' attention and mask interfaces. A model that does otherwise would run under a policy and give wrong text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kvplan.errors import ModelError
from kvplan.model_spec import ADVICE, ModelSpec
from kvplan.placement import input_device

if TYPE_CHECKING:
    from torch import Tensor

IMPLEMENTATION = "kvplan_probe"
TOKENS = 2
_PASSED = "_kvplan_probed"


class _Trial:
    """What the forward should do next: `layer` caches its keys, then attends over them."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.layer, self.masked = spec, 0, False
        self.cached: tuple[Tensor, Tensor] | None = None

    def refuse(self, found: str) -> ModelError:
        return ModelError(f"{self.spec.model_type}: {found}; {ADVICE}")

    def cache(self, keys: Tensor, values: Tensor, layer: int) -> None:
        if self.cached is not None or layer != self.layer or layer >= self.spec.num_layers:
            raise self.refuse(f"layer {layer} caches its keys out of turn (layer {self.layer} is next)")
        shape = self.spec.layers[layer]
        want = ((shape.kv_heads, TOKENS, shape.key_dim), (shape.kv_heads, TOKENS, shape.value_dim))
        found = (tuple(keys.shape[1:]), tuple(values.shape[1:]))
        if found != want:
            raise self.refuse(
                f"layer {layer} caches keys and values of shape {found[0]} and {found[1]} (heads, tokens, size), "
                f"the config tells {want[0]} and {want[1]}"
            )
        self.cached = keys, values

    def attend(self, module: Any, keys: Tensor, values: Tensor, asked: dict[str, Any]) -> None:
        cached, self.cached, layer = self.cached, None, self.layer
        if getattr(module, "is_causal", True) is False:
            raise self.refuse(f"layer {layer} also attends to later tokens, as an encoder does")
        if cached is None:
            raise self.refuse(f"after {layer} layers, attention over keys that no layer has cached for it")
        if keys is not cached[0] or values is not cached[1]:
            name = "keys" if keys is not cached[0] else "values"
            raise self.refuse(f"layer {layer} attends over other {name} than it caches (latent or split heads)")
        if not self.masked:
            raise self.refuse(f"layer {layer} brings an attention mask of its own")
        if asked.get("position_bias") is not None:
            raise self.refuse(f"layer {layer} adds a position bias to its attention")
        window = asked.get("sliding_window", self.spec.layers[layer].window)
        if window != self.spec.layers[layer].window:
            raise self.refuse(
                f"layer {layer} attends over a window of {window}, the config tells {self.spec.layers[layer].window}"
            )
        self.layer += 1

    def finish(self) -> None:
        if self.layer < self.spec.num_layers:
            raise self.refuse(f"layer {self.layer} does not attend through transformers' attention interface")


_TRIAL: ContextVar[_Trial] = ContextVar("kvplan_probe")


def refuse_without_interface(model_class: Any, model_type: str) -> None:
    """A class that looks its attention function up by name passes; others (bloom, gptj, falcon) hard-code it.

    Raises:
        ModelError: the class does not use transformers' attention interface.
    """
    # transformers' own test of the class's code; the flag in its place forgets some that do use the interface.
    if not getattr(model_class, "_can_set_attn_implementation", model_class.is_backend_compatible)():
        raise _no_interface(model_type)


def _no_interface(model_type: str) -> ModelError:
    return ModelError(f"{model_type} does not use transformers' attention interface; {ADVICE}")


@contextmanager
def switched(model: Any, implementation: str) -> Iterator[None]:
    """A model under another attention implementation; afterwards each of its parts has its own again.

    Raises:
        ModelError: the model does not use transformers' attention interface.
    """
    refuse_without_interface(type(model), model.config.model_type)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):
        subs = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        configs |= {id(sub): sub for sub in subs if sub is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    model.set_attn_implementation(implementation)
    try:
        if model.config.get_text_config(decoder=True)._attn_implementation != implementation:
            raise _no_interface(model.config.model_type)
        yield
    finally:
        # The outer configs come first: setting one also sets those inside it.
        for config, name in before:
            config._attn_implementation = name


def check_runs(model: Any, spec: ModelSpec) -> None:
    """Run two tokens through the model and refuse it where it does not do what a policy needs.

    A model that has passed with this spec is not run again.

    Raises:
        ModelError: what was found, and in which layer.
    """
    if getattr(model, _PASSED, None) == spec.layers:
        return
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    trial = _Trial(spec)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=input_device(model))
    token = _TRIAL.set(trial)
    try:
        with switched(model, IMPLEMENTATION), torch.no_grad():
            model(input_ids=ids, past_key_values=_trial_cache(trial), use_cache=True)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code
        raise trial.refuse(f"fails on its first tokens ({_first_line(error)})") from error
    finally:
        _TRIAL.reset(token)
    trial.finish()
    setattr(model, _PASSED, spec.layers)


def _trial_cache(trial: _Trial) -> Any:
    from transformers import DynamicCache

    class TrialCache(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            trial.cache(keys, values, layer_idx)
            return keys, values

    return TrialCache()


def _mask(*args: Any, **kwargs: Any) -> None:
    """Padding and windows do not matter for two tokens; that the model asks for its mask here does."""
    _TRIAL.get().masked = True


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """No attention at all: only who attends over what is asked."""
    _TRIAL.get().attend(module, key, value, kwargs)
    B, heads, T, _ = query.shape
    return query.new_zeros(B, T, heads, value.shape[-1]), None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
