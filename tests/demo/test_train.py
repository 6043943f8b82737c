"""The recipe resumes: a run cut in two ends where an unbroken one does."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kvplan.demo.train import Trainer, blocked_attention


def trainer() -> Trainer:
    settings = {"seed": 0, "tokens": 1e5, "batch_tokens": 256, "decay": 0.3, "muon_lr": 0.02, "adam_lr": 0.01}
    return Trainer(argparse.Namespace(device="cpu", **settings))


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken, first = trainer(), trainer()
    for _ in range(4):
        unbroken.train_step()
    for _ in range(2):
        first.train_step()
    first.save(tmp_path)
    resumed = trainer()
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.train_step()
    assert (resumed.step, resumed.tokens) == (unbroken.step, unbroken.tokens)
    for (name, mine), theirs in zip(resumed.master.named_parameters(), unbroken.master.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_blocked_attention_is_causal_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 8, generator=generator) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found, _ = blocked_attention(torch.nn.Identity(), q, k, v, None)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
