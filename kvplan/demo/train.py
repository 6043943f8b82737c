"""Train the bundled model from a seed: `python -m kvplan.demo.train OUT`.

Resumable: every `--save-seconds` the weights and both optimizers' states are written to OUT/checkpoint (safetensors
and JSON), and the same command goes on from there. Batches depend on the seed and the step only, so a resumed
run sees the data that an unbroken one would have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from kvplan.demo.stream import TASKS, document
from kvplan.demo.world import vocabulary

LENGTHS = (64, 128, 256, 512, 1024, 2048)
ADVANCE_ACCURACY = 0.85
CHAIN_SHARE_AT_LAST = 0.4
MIX_AT_LAST = (0.2, 0.3, 0.2, 0.1, 0.1, 0.1)
MIX_WHILE_DECAYING = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
ADVANCE_TASKS = ("fact", "hidden", "hops0", "song")
QUERY_BLOCK = 128


def config() -> Qwen3Config:
    """Eight layers, normalised queries and keys: without the norm, recall by key was learned far more slowly."""
    return Qwen3Config(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=[3, vocabulary().index(";")],
        dtype="bfloat16",
    )


def blocked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention over blocks of queries. On a CPU its backward pass is twice as fast as the fused one's."""
    B, Hq, T, D = query.shape
    Hkv = key.shape[1]
    block = min(QUERY_BLOCK, T)
    q = (query * D**-0.5).reshape(B * Hkv, Hq // Hkv, T, D)
    k, v = key.reshape(B * Hkv, T, D), value.reshape(B * Hkv, T, D)
    above_diagonal = torch.full((block, block), -1e4, dtype=q.dtype, device=q.device).triu(1)
    outs = []
    for start in range(0, T, block):
        end = start + block
        scores = torch.bmm(q[:, :, start:end].reshape(B * Hkv, -1, D), k[:, :end].transpose(1, 2))
        scores = scores.view(B * Hkv, Hq // Hkv, block, end) + F.pad(above_diagonal, (start, 0))
        probs = scores.softmax(-1).view(B * Hkv, -1, end)
        outs.append(torch.bmm(probs, v[:, :end]).view(B * Hkv, Hq // Hkv, block, D))
    return torch.cat(outs, 2).view(B, Hq, T, D).transpose(1, 2), None


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start from a stream that carries the tokens themselves: large embeddings, blocks that add nothing yet.

    With the library's small embeddings the first steps of every block drown the token's identity, and copying
    words from the context was not learned in several million tokens; with these it takes half a million.
    """
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.normal_(0, 0.5)
        elif name == "model.norm.weight":
            parameter.fill_(0.2)
        elif "o_proj" in name or "down_proj" in name:
            parameter.zero_()


def batch(seed: int, step: int, length: int, tokens: int, chain_share: float = 0.0) -> list[Tensor]:
    """ids, weights, tasks, each [B, length + 1]."""
    rng = Random(f"{seed}/{step}")
    # Short sequences take more, smaller steps: circuits form by steps, not by tokens.
    tokens = tokens // 2 if length <= 128 else tokens
    rows = [document(rng, length, chain_share) for _ in range(max(1, tokens // length))]
    return [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]


class Trainer:
    """float32 master weights, a bfloat16 copy that computes, Muon on matrices and AdamW on the rest."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.master = Qwen3ForCausalLM(config()).to(args.device, torch.float32)
        self.model = Qwen3ForCausalLM(config()).to(args.device, torch.bfloat16)
        if args.device == "cpu":
            AttentionInterface.register("kvplan_train", blocked_attention)
            self.model.set_attn_implementation("kvplan_train")
        initialise(self.master)
        named = dict(self.master.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(rest, lr=args.adam_lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]
        self.base_lrs = [args.muon_lr, args.adam_lr]
        self.step, self.tokens, self.stage, self.stage_tokens = 0, 0, 0, 0
        self.accuracy: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def rate(self) -> float:
        """Warm up over 100 steps, hold, then fall linearly to zero over the last `decay` share of the tokens."""
        left = 1 - self.tokens / self.args.tokens
        return min(1.0, (self.step + 1) / 100, max(left / self.args.decay, 0.0) + 1e-3)

    def pick_length(self) -> int:
        rng = Random(f"{self.args.seed}/length/{self.step}")
        if self.stage == len(LENGTHS) - 1:
            # Recall works: short documents teach chains at less cost; the end of training is for the long ones.
            return rng.choices(LENGTHS, MIX_AT_LAST if self.rate() == 1.0 else MIX_WHILE_DECAYING)[0]
        shorter = self.stage > 0 and rng.random() < 0.25
        return LENGTHS[rng.randrange(max(self.stage - 3, 0), self.stage) if shorter else self.stage]

    def train_step(self) -> None:
        args, length = self.args, self.pick_length()
        chains = CHAIN_SHARE_AT_LAST if self.stage == len(LENGTHS) - 1 else 0.0
        rows = batch(args.seed, self.step, length, args.batch_tokens, chains)
        ids, weights, tasks = (t.to(args.device) for t in rows)
        with torch.no_grad():
            for ours, theirs in zip(self.model.parameters(), self.master.parameters(), strict=True):
                ours.copy_(theirs)
        logits = self.model(ids[:, :-1], use_cache=False).logits.float()
        targets, weights, tasks = ids[:, 1:], weights[:, 1:], tasks[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        for ours, theirs in zip(self.model.parameters(), self.master.parameters(), strict=True):
            theirs.grad, ours.grad = ours.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * self.rate()
            optimizer.step()
        self.step += 1
        self.tokens += targets.numel()
        self.stage_tokens += targets.numel()
        self.note(logits.detach().argmax(-1) == targets, losses.detach(), weights, tasks, length)

    def note(self, right: Tensor, losses: Tensor, weights: Tensor, tasks: Tensor, length: int) -> None:
        """Running means (per answer token) of the current length; move on to the next length when they are good."""
        story = (tasks < 0) & (weights > 0.1)
        if story.any():
            self.losses["story"] = 0.95 * self.losses.get("story", 3.0) + 0.05 * losses[story].mean().item()
        if length != LENGTHS[self.stage]:
            return
        for index, task in enumerate(TASKS):
            mine = tasks == index
            if mine.any():
                value = right[mine].float().mean().item()
                self.accuracy[task] = 0.95 * self.accuracy.get(task, 0.0) + 0.05 * value
        good = min(self.accuracy.get(t, 0.0) for t in ADVANCE_TASKS) >= ADVANCE_ACCURACY
        # What is left of the token budget must also reach the longest length, learned or not.
        share_spent = self.tokens / self.args.tokens
        late = share_spent > (0.08, 0.2, 0.35, 0.5, 0.7)[self.stage] if self.stage < len(LENGTHS) - 1 else False
        if self.stage < len(LENGTHS) - 1 and ((good and self.stage_tokens > self.args.tokens * 0.01) or late):
            self.stage += 1
            self.stage_tokens = 0
            self.accuracy = {task: value * 0.9 for task, value in self.accuracy.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{n}": p.detach() for n, p in self.master.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"optimizer.{i}.{j}.{key}"] = torch.as_tensor(value)
        scalars = {k: getattr(self, k) for k in ("step", "tokens", "stage", "stage_tokens", "accuracy", "losses")}
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / "state.tmp", {"scalars": json.dumps(scalars)}
        )
        os.replace(folder / "state.tmp", folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        from safetensors import safe_open

        path = folder / "state.safetensors"
        tensors = load_file(path, device=self.args.device)
        with safe_open(path, "pt") as file:
            scalars = json.loads(file.metadata()["scalars"])
        for name, value in scalars.items():
            setattr(self, name, value)
        with torch.no_grad():
            for n, p in self.master.named_parameters():
                p.copy_(tensors[f"model.{n}"])
        for i, optimizer in enumerate(self.optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                prefix = f"optimizer.{i}.{j}."
                optimizer.state[p] = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def export(trainer: Trainer, out: Path) -> None:
    """Write the bfloat16 model and its tokenizer as a plain Hugging Face folder."""
    from kvplan.demo.tokenizer import build_tokenizer

    with torch.no_grad():
        for ours, theirs in zip(trainer.model.parameters(), trainer.master.parameters(), strict=True):
            ours.copy_(theirs)
    trainer.model.set_attn_implementation("sdpa")
    trainer.model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvplan.demo.train", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=float, default=15e6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--decay", type=float, default=0.27)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer, checkpoint = Trainer(args), args.out / "checkpoint"
    if (checkpoint / "state.safetensors").exists():
        trainer.load(checkpoint)
    started = saved = time.monotonic()
    first = trainer.tokens
    while trainer.tokens < args.tokens:
        trainer.train_step()
        now = time.monotonic()
        if trainer.step % 25 == 0:
            scores = " ".join(f"{t} {a:.2f}" for t, a in sorted(trainer.accuracy.items()))
            speed = (trainer.tokens - first) / (now - started)
            print(
                f"{trainer.tokens / args.tokens:5.1%} step {trainer.step} length {LENGTHS[trainer.stage]} "
                f"{speed:.0f} tokens/s story {trainer.losses.get('story', 0):.3f} | {scores}",
                flush=True,
            )
        if now - saved > args.save_seconds:
            trainer.save(checkpoint)
            saved = now
    trainer.save(checkpoint)
    export(trainer, args.out)


if __name__ == "__main__":
    main()
