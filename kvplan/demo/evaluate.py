"""What the bundled model can do, and what it loses with evicted tokens: `python -m kvplan.demo.evaluate`.

Documents are made fresh, in the held-out words, from other seeds than calib_data's. Answers are scored by exact
match: every token must be the model's first choice, given the answers before it, which is what greedy decoding gives.
Eviction here is a mask, not a cache: the context is read whole, then each KV head shows the questions a random subset.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvplan.calibrate.examples import Example, to_example
from kvplan.calibrate.records import parse_record
from kvplan.demo.prompts import TASKS, make_record
from kvplan.demo.world import Words

LENGTHS = (1024, 2048)
BATCH_TOKENS = 8192
SINK_TOKENS, RECENT_TOKENS = 4, 16
KEEP_FRACTION, LAYER_KEEP_FRACTION = 0.25, 0.10
ATTENTION = "kvplan_demo_evict"


@dataclass
class Eviction:
    """Which context tokens the questions may see.

    Args:
        keep_fraction: Share of the context kept in each KV head.
        layers: The layers that evict; None is all of them.
        seed: Draws the random subsets.
        context_tokens: [B] int64, each row's context; set before every forward.
    """

    keep_fraction: float
    layers: frozenset[int] | None = None
    seed: int = 0
    context_tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def kept(self, layer: int, num_heads: int, num_tokens: int) -> Tensor:
        """[B, Hkv, T] bool: the sinks, the recent window and random others, `keep_fraction` of the context in all."""
        B, context = len(self.context_tokens), self.context_tokens[:, None, None]
        if self.layers is not None and layer not in self.layers:
            return torch.ones(B, num_heads, num_tokens, dtype=torch.bool)
        rng = torch.Generator().manual_seed(self.seed * 1009 + layer)
        draw = torch.rand(B, num_heads, num_tokens, generator=rng)
        positions = torch.arange(num_tokens)
        draw = draw + ((positions < SINK_TOKENS) | (positions >= context - RECENT_TOKENS))
        draw = draw.masked_fill(positions >= context, -1.0)
        rank = draw.argsort(-1, descending=True).argsort(-1)
        num_kept = (context * self.keep_fraction).round().clamp(min=SINK_TOKENS + RECENT_TOKENS)
        return (rank < num_kept) | (positions >= context)


@dataclass(frozen=True)
class TaskScore:
    """Exact match of one task (0 to 1), or the perplexity of plain text, over `count` answers or documents."""

    task: str
    num_tokens: int
    count: int
    value: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that the model card states."""

    full: list[TaskScore]
    random_keep: list[TaskScore]
    one_layer: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Outcome:
    """One document: which answers were exact, the continuation's mean nll in nats, its log-probabilities [N, vocab]."""

    exact: list[bool]
    nll: float
    log_probs: Tensor


def evicting_attention(eviction: Eviction, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in which positions behind the context see only what each KV head kept of it.

    Args:
        query: [B, Hq, T, D]; key and value: [B, Hkv, T, D].

    Returns:
        [B, T, Hq, D], the dtype of `query`.
    """
    Hq, Hkv, T = query.shape[1], key.shape[1], query.shape[2]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    in_context = torch.arange(T) < eviction.context_tokens[:, None]
    kept = eviction.kept(int(module.layer_idx), Hkv, T)  # type: ignore[arg-type]
    visible = causal & (in_context[:, None, :, None] | kept[:, :, None, :])  # [B, Hkv, T, T]
    mask = visible.repeat_interleave(Hq // Hkv, 1)  # [B, Hq, T, T]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@contextmanager
def evicting(model: PreTrainedModel, eviction: Eviction | None) -> Iterator[None]:
    """Let the model attend under `eviction` for a while; None leaves it alone."""
    if eviction is None:
        yield
        return

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return evicting_attention(eviction, module, query, key, value), None

    before = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def documents(tokenizer: Any, task: str, num_documents: int, num_tokens: int) -> list[Example]:
    """Fresh held-out documents of one task, question-agnostic."""
    words = Words("heldout")
    names = [f"evaluate-{num_tokens}-{task}-{i}" for i in range(num_documents)]
    records = [parse_record(make_record(name, words, task, num_tokens), name) for name in names]
    return [to_example(record, tokenizer) for record in records]


@torch.no_grad()
def outcomes(model: PreTrainedModel, examples: Sequence[Example], eviction: Eviction | None = None) -> list[Outcome]:
    """Teacher-force each example's continuation behind its context."""
    longest = max(len(e.prompt_ids) + len(e.continuation_ids) for e in examples)
    size = max(1, BATCH_TOKENS // longest)
    results: list[Outcome] = []
    with evicting(model, eviction):
        for start in range(0, len(examples), size):
            results += _batch_outcomes(model, examples[start : start + size], eviction)
    return results


def _batch_outcomes(model: PreTrainedModel, rows: Sequence[Example], eviction: Eviction | None) -> Iterable[Outcome]:
    # Padding lies on the right, where nothing that counts can see it.
    tokens = [torch.tensor(e.prompt_ids + e.continuation_ids) for e in rows]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # [B, T]
    if eviction is not None:
        eviction.context_tokens = torch.tensor([len(e.prompt_ids) for e in rows])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    for example, row, states in zip(rows, tokens, hidden, strict=True):
        first = len(example.prompt_ids)
        logits = model.lm_head(states[first - 1 : len(row) - 1])  # [N, vocab]
        log_probs, targets = logits.float().log_softmax(-1), row[first:]
        right = log_probs.argmax(-1) == targets
        exact = [bool(right[a:b].all()) for a, b in example.answers]
        yield Outcome(exact, F.nll_loss(log_probs, targets).item(), log_probs)


def score(task: str, num_tokens: int, results: Sequence[Outcome]) -> TaskScore:
    exact = [e for result in results for e in result.exact]
    if not exact:
        mean_nll = sum(result.nll for result in results) / len(results)
        return TaskScore(task, num_tokens, len(results), math.exp(mean_nll))
    return TaskScore(task, num_tokens, len(exact), sum(exact) / len(exact))


def layer_effects(model: PreTrainedModel, examples: Sequence[Example]) -> list[tuple[int, float, float]]:
    """What cutting one layer alone does: (layer, exact match, mean KL from the full cache in nats)."""
    full = outcomes(model, examples)
    rows = []
    for layer in range(model.config.num_hidden_layers):
        cut = outcomes(model, examples, Eviction(LAYER_KEEP_FRACTION, frozenset({layer})))
        pairs = zip(full, cut, strict=True)
        kls = [F.kl_div(c.log_probs, f.log_probs, log_target=True, reduction="batchmean").item() for f, c in pairs]
        rows.append((layer, score("mixed", 0, cut).value, sum(kls) / len(kls)))
    return rows


def evaluate(
    model: PreTrainedModel, tokenizer: Any, num_documents: int, lengths: Sequence[int] = LENGTHS
) -> Evaluation:
    """Score every task at each length, a random keep at the first of them, and each layer's part in that."""
    made = {(task, n): documents(tokenizer, task, num_documents, n) for n in lengths for task in TASKS}
    full = [score(task, n, outcomes(model, examples)) for (task, n), examples in made.items()]
    first = lengths[0]
    random_keep = [score(task, first, outcomes(model, made[task, first], Eviction(KEEP_FRACTION))) for task in TASKS]
    # Nine forwards a document: a quarter of them is enough to tell layers apart.
    some = made["mixed", first][: max(num_documents // 4, 1)]
    return Evaluation(full, random_keep, layer_effects(model, some))


def tables(result: Evaluation) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each table."""
    rows = {task: list(scores) for task, scores in groupby(sorted(result.full, key=_place), lambda s: s.task)}
    lengths = [s.num_tokens for s in next(iter(rows.values()))]
    header = ["task", *(f"{n} tokens" for n in lengths), "answers"]
    full = [[task, *(_cell(s) for s in scores), str(scores[0].count)] for task, scores in rows.items()]
    keep = [[s.task, _cell(rows[s.task][0]), _cell(s)] for s in result.random_keep]
    layers = [[str(layer), f"{exact:.1%}", f"{kl:.4f}"] for layer, exact, kl in result.one_layer]
    return [
        ("Exact match with the full cache (story: perplexity)", header, full),
        (f"Random keep at {lengths[0]} tokens", ["task", "full", f"random {KEEP_FRACTION:.0%}"], keep),
        (
            f"One layer cut to {LAYER_KEEP_FRACTION:.0%} at random, task mixed, {lengths[0]} tokens",
            ["layer", "exact match", "KL (nats)"],
            layers,
        ),
    ]


def _place(item: TaskScore) -> tuple[int, int]:
    return TASKS.index(item.task), item.num_tokens


def _cell(item: TaskScore) -> str:
    return f"{item.value:.2f}" if item.task == "story" else f"{item.value:.1%}"


def print_tables(result: Evaluation) -> None:
    console = Console()
    for title, columns, rows in tables(result):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(result: Evaluation) -> str:
    blocks = []
    for title, columns, rows in tables(result):
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        blocks.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvplan.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model"), help="the bundled one")
    parser.add_argument("--n", type=int, default=64, help="documents per task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a document")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true")
    output.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model}: no model there; `python -m kvplan.demo.train {args.model}` trains it")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    result = evaluate(model, AutoTokenizer.from_pretrained(args.model), args.n, args.lengths)
    if args.json:
        print(json.dumps(asdict(result), indent=1))
    elif args.markdown:
        print(markdown(result))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
