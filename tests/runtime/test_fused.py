"""The fused kernels, put behind every kind of storage, give what the plain path gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import model, prompts

import kvplan
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.kernels import choose

KIVI = codecs["kivi"](bits=4, group=8, residual_tokens=16)
CHANGES = {
    "ring": {},
    "scored": {"evictor": evictors["h2o"]()},
    "one set": {"evictor": evictors["tova"]()},
    "int8": {"key_codec": codecs["int8"](), "value_codec": codecs["fp8"]()},
    "turboquant": {"key_codec": codecs["turboquant"](), "value_codec": codecs["dense"]()},
    "kivi": {"key_codec": KIVI, "value_codec": KIVI},
    "channels": {"channels": channel_selectors["think"](recent=8), "evictor": evictors["h2o"]()},
    "per head": {"slots": Slots(heads=(Slots(tokens=34), Slots(tokens=40)))},
    "head split": {"head_split": head_splits["adakv"](), "evictor": evictors["snapkv"](window_tokens=8)},
    "elastic": {"evictor": evictors["corm"](window_tokens=8)},
    "merged": {"merger": mergers["kvmerger"](), "evictor": evictors["h2o"]()},
    "merging": {"merger": mergers["cam"](span=4)},
}


def policy(kind: str) -> Policy:
    fields = {"slots": Slots(tokens=36), "sink_tokens": 2, "recent_tokens": 4, **CHANGES[kind]}
    return Policy(layers=(LayerPolicy(**fields),) * 4)


def logits(made, kind: str, new: int = 20) -> torch.Tensor:
    inputs = prompts((60, 43))
    following = torch.randint(3, 96, (2, new), generator=torch.Generator().manual_seed(0))
    with kvplan.attach(made, policy(kind)) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        made(**inputs, position_ids=positions, past_key_values=cache)
        steps = [
            made(following[:, t, None], position_ids=positions[:, -1:] + 1 + t, past_key_values=cache).logits
            for t in range(new)
        ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", CHANGES)
def test_the_fused_path_equals_the_plain_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("llama", torch.float64)
    plain = logits(made, kind)
    calls = []

    def available(tensor: torch.Tensor) -> bool:
        # The kernels below them run in torch.
        return sys._getframe(1).f_code.co_name in ("attend_fused", "attend_runs")

    def counted(kernel):
        return lambda *args, **kwargs: calls.append(kind) or kernel(*args, **kwargs)

    monkeypatch.setattr(choose, "available", available)
    for name in ("decode", "quantized_decode"):
        monkeypatch.setattr(choose, name, counted(getattr(choose, name)))
    torch.testing.assert_close(logits(made, kind), plain, rtol=1e-7, atol=1e-9)
    assert len(calls) >= 20 * 4  # every step of every layer


@pytest.mark.skipif(not choose._triton_imports(), reason="triton is not installed")
def test_triton_under_its_interpreter_equals_torch() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    code = (
        "import sys, os, torch\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import test_fused as t\n"
        "made = t.model('llama')\n"
        "for kind in ('ring', 'scored', 'kivi', 'head split'):\n"
        "    os.environ['KVPLAN_KERNELS'] = 'torch'; plain = t.logits(made, kind, 2)\n"
        "    os.environ['KVPLAN_KERNELS'] = 'triton'; fused = t.logits(made, kind, 2)\n"
        "    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
