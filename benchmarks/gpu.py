"""What kvplan costs and saves on a GPU: one command, under 8 minutes on one H100 or H200.

    python benchmarks/gpu.py --out gpu.json      the report on the terminal, JSON beside it (and the report as gpu.md)
    python benchmarks/gpu.py --smoke             everything at tiny sizes, on a CPU too; its numbers mean nothing

A random model of Llama-3-8B's shape. Correctness first, then the kernels against a device copy of as many bytes, then
decode steps of transformers' own `generate` (never compiled) with full and cut caches. Decode caches are filled with
random keys and values instead of a real prompt: a step costs the same, a prompt of 128k tokens would not. Evictors
that rank a prompt by its attention get random ranks there; what ranking costs is measured on a real prompt.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import kvplan
from kvplan.errors import KVPlanError
from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.codecs.turboquant import TurboQuant
from kvplan.methods.evictors import evictors
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.kernels import choose, portable
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.kernels.encoded import Encoded
from kvplan.runtime.kernels.varlen import DecodeArgs, Probs, Sequences

GIB = 2**30
KEEP = Slots(share=2500)
KEEP_FRACTION = 0.25
SLOTS_ALONE = ("streaming", "snapkv", "h2o")  # 25 % of the slots and nothing else: what the throughput target is about
BUSY_BYTES = 64 * 2**20  # a kernel that reads less does not fill the device
FULL_DECODE, OWN_FULL, SHORT_DECODE = "DynamicCache, full", "kvplan, full", "DynamicCache, 25 % of the tokens"
CUT = "kvplan 25 %, "


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    model: dict[str, int]
    dtype: torch.dtype
    cases: tuple[tuple[int, int | None], ...]  # context tokens and batch, most telling first; None: all that fits
    prefill_tokens: int
    kernel_slots: tuple[tuple[int, int], ...]  # sequences and slots of each
    steps: int
    repeats: int
    kv_bytes: int


FULL_SIZE = Sizes(
    model={
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    dtype=torch.bfloat16,
    cases=((8192, 1), (32768, None), (32768, 8), (131072, 1), (8192, 8), (8192, None), (32768, 1), (131072, None)),
    prefill_tokens=8192,
    kernel_slots=((8, 2048), (8, 8192), (8, 32768), (8, 131072), (64, 8192), (256, 8192)),
    steps=16,
    repeats=30,
    kv_bytes=40 * GIB,
)
SMOKE_SIZE = Sizes(
    model={
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "vocab_size": 128,
    },
    dtype=torch.float32,
    cases=((1024, 1), (512, None)),
    prefill_tokens=256,
    kernel_slots=((4, 256),),
    steps=3,
    repeats=3,
    kv_bytes=2**21,
)


@dataclass
class Report:
    """What was seen, section by section; `over` once too little time is left for another case."""

    minutes: float
    started: float = field(default_factory=time.monotonic)
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def over(self, what: str, reserve_s: float = 20.0) -> bool:
        late = self.elapsed_s + reserve_s > self.minutes * 60
        if late:
            self.note(f"{what}: skipped, {self.elapsed_s:.0f} s are gone of {self.minutes * 60:.0f}")
        return late

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"# {text}", file=sys.stderr, flush=True)

    def add(self, section: str, **row: Any) -> None:
        self.sections.setdefault(section, []).append(row)
        print(f"[{self.elapsed_s:4.0f} s] {section}: {row}", file=sys.stderr, flush=True)

    def find(self, section: str, **wanted: Any) -> list[dict[str, Any]]:
        return [r for r in self.sections.get(section, []) if all(r.get(k) == v for k, v in wanted.items())]

    def markdown(self) -> str:
        lines = []
        for name, rows in self.sections.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"\n## {name}\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_shown(row.get(c)) for c in columns)} |" for row in rows]
        if self.notes:
            lines += ["\n## Notes\n", *(f"- {note}" for note in self.notes)]
        return "\n".join([*lines, f"\nElapsed: {self.elapsed_s:.0f} s"])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# -- time ---------------------------------------------------------------------------------------------------------


class Marks:
    """Moments on the device's own clock (on a CPU: the wall's)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def gaps_ms(self) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in pairwise(self.marks)]
        return [(b - a) * 1e3 for a, b in pairwise(self.marks)]


def spread(times: list[float]) -> dict[str, float]:
    """Median and the middle 80 %."""
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return {"ms": statistics.median(ordered), "ms_p10": low, "ms_p90": high}


def timed(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of one run. Several runs do the same on other buffers, so that no cache serves them twice.

    On a GPU all runs are captured in one graph: what is timed is the device, not the launches.
    """
    outputs: list[Any] = []  # must outlive the graph

    def run_all() -> None:
        outputs[:] = [run() for run in runs]

    run_all()
    go: Callable[[], Any] = run_all
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            go()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            go()
        go = graph.replay
    go()
    marks = Marks(device)
    for _ in range(repeats + 1):
        marks.mark()
        go()
    marks.mark()
    return {name: ms / len(runs) for name, ms in spread(marks.gaps_ms()[1:]).items()}


# -- correctness --------------------------------------------------------------------------------------------------


def check_kernels(report: Report, device: torch.device) -> None:
    """The test suite's kernel cases on this device, bfloat16 included, against the float64 reference on the CPU."""
    script = Path(__file__).parents[1] / "tests" / "runtime" / "kernel_cases.py"
    if device.type != "cuda" or not choose.available(torch.zeros(1, device=device, dtype=torch.float16)):
        report.note("no Triton kernels on this device: plain torch runs everywhere below")
        return
    environment = {**os.environ, choose.SETTING: "triton", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(script), "cuda"], capture_output=True, text=True, env=environment)
    if done.returncode:
        report.add("Correctness", what="kernels", passed=False, detail=done.stderr[-300:].replace("\n", " "))
        return
    errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: e for name, e in errors.items() if not e < (0.03 if "float16" in name else 1e-4)}
    worst = max(errors, key=lambda name: errors[name])
    detail = f"{len(errors)} cases, largest error {errors[worst]:.2g} ({worst})" if not wrong else str(wrong)
    report.add("Correctness", what="kernels = reference", passed=not wrong, detail=detail)


def check_policies(report: Report, device: torch.device) -> None:
    """A tiny float32 model generates the same tokens here and on the CPU, under every policy."""
    config = LlamaConfig(**{**SMOKE_SIZE.model, "num_hidden_layers": 4, "max_position_embeddings": 4096})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 128, (3, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :170] = 0
    for name, policy in policies(model, report):
        tokens = []
        for where in (torch.device("cpu"), device):
            model.to(where)
            with kvplan.attach(model, policy) as runtime:
                tokens.append(
                    model.generate(
                        input_ids=ids.to(where),
                        attention_mask=mask.to(where),
                        past_key_values=runtime.new_cache(),
                        max_new_tokens=32,
                        do_sample=False,
                        pad_token_id=0,
                    ).cpu()
                )
        report.add("Correctness", what=f"tokens as on the CPU: {name}", passed=bool(torch.equal(*tokens)), detail="")


def policies(model: Any, report: Report) -> Iterator[tuple[str, Policy]]:
    """25 % of the slots, by several methods; what the policy schema does not know or allow is noted."""
    full = kvplan.full_policy(model)
    wanted: dict[str, dict[str, Any]] = {
        **{name: {"evictor": evictors[name]()} for name in SLOTS_ALONE},
        "streaming, int8": {"evictor": evictors["streaming"](), "codecs": Int8()},
        "streaming, kivi": {"evictor": evictors["streaming"](), "codecs": KIVI(bits=2), "min_slots": 256},
    }
    yield OWN_FULL, full
    for name, settings in wanted.items():
        try:
            codec = settings.pop("codecs", None)
            if codec is not None:
                settings |= {"key_codec": codec, "value_codec": codec}
            policy = replace(full, layers=(LayerPolicy(slots=KEEP, **settings),) * len(full.layers))
            with kvplan.attach(model, policy):
                pass
        except (TypeError, KVPlanError) as error:
            report.note(f"{name}: not possible here ({error})")
            continue
        yield f"{CUT}{name}", policy


# -- kernels ------------------------------------------------------------------------------------------------------


def bench_kernels(report: Report, sizes: Sizes, device: torch.device) -> None:
    heads, dim = sizes.model["num_attention_heads"], sizes.model["head_dim"]
    group = heads // sizes.model["num_key_value_heads"]
    for count, slots in sizes.kernel_slots:
        if report.over(f"kernels at {count} x {slots}", 60):
            return
        seqs = Sequences.of([slots] * count, [slots] * count, device)
        copies = _copies(count * slots * dim * 2 * sizes.dtype.itemsize, device)
        pools = [_random_pool(count, group, slots, dim, sizes.dtype, device) for _ in range(copies)]
        moved = count * slots * dim * 2 * sizes.dtype.itemsize
        flat = [torch.cat([keys, values]).view(-1) for _, keys, values in pools]
        halves = [(torch.empty_like(f[: f.numel() // 2]), f[: f.numel() // 2]) for f in flat]
        copy = timed([partial(Tensor.copy_, *pair) for pair in halves], sizes.repeats, device)
        del flat, halves
        for name, path in _kernel_paths(seqs, DecodeArgs(dim**-0.5)).items():
            try:
                took = timed([partial(path, *pool) for pool in pools], sizes.repeats, device)
            except Exception as error:  # a path that fails is a finding, not the end
                report.note(f"kernel {name} at {count} x {slots}: {type(error).__name__}: {error}")
                continue
            report.add(
                "Decode kernels",
                sequences=count,
                slots=slots,
                kernel=name,
                MiB=moved / 2**20,
                **took,
                GB_per_s=moved / took["ms"] / 1e6,
                of_a_copy=copy["ms"] / took["ms"],
            )
        if slots == sizes.kernel_slots[0][1] or (count, slots) == (64, 8192):
            _bench_quantized(report, sizes, pools, seqs, DecodeArgs(dim**-0.5), device)
        del pools


def _kernel_paths(seqs: Sequences, args: DecodeArgs) -> dict[str, Callable[..., Any]]:
    """Ways to attend: (q, keys, values) of full, even sequences -> anything."""

    def sdpa(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (x.view(len(seqs), 1, -1, x.shape[-1]) for x in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(q[:, None], keys, values, scale=args.scaling)

    means = replace(args, probs=Probs.MEAN)
    return {
        "chosen": lambda q, keys, values: choose.decode(q, keys, values, seqs, args),
        "chosen, with mean probabilities": lambda q, keys, values: choose.decode(q, keys, values, seqs, means),
        "SDPA without a mask": sdpa,
        "plain torch": lambda q, keys, values: portable.decode(q, keys, values, seqs, args, need_lse=False),
    }


def _random_pool(
    count: int, group: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((count, group, dim), (count * slots, dim), (count * slots, dim))
    q, keys, values = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return q, keys, values


def _copies(moved_bytes: int, device: torch.device) -> int:
    """Buffers enough that together they are several times the size of a GPU's cache."""
    return max(1, min(16, 400 * 2**20 // moved_bytes)) if device.type == "cuda" else 1


def _bench_quantized(
    report: Report, sizes: Sizes, pools: list[Any], seqs: Sequences, args: DecodeArgs, device: torch.device
) -> None:
    kivi2, kivi4 = KIVI(bits=2), KIVI(bits=4)
    pairs: dict[str, tuple[Codec, Codec]] = {
        "int8": (Int8(), Int8()),
        "kivi 4 bits": (kivi4.for_keys(), kivi4.for_values()),
        "kivi 2 bits": (kivi2.for_keys(), kivi2.for_values()),
        "turboquant 4 bits": (TurboQuant(bits=4), TurboQuant(bits=4)),
    }
    dense_path = _kernel_paths(seqs, args)["chosen"]
    dense = timed([partial(dense_path, *pool) for pool in pools], sizes.repeats, device)
    for name, (key_codec, value_codec) in pairs.items():
        try:
            encoded = []
            for q, keys, values in pools:
                encoded.append((q, _encode(key_codec, keys), _encode(value_codec, values)))
            took = timed([partial(choose.quantized_decode, *e, seqs, args) for e in encoded], sizes.repeats, device)
        except Exception as error:
            report.note(f"quantized kernel {name}: {type(error).__name__}: {error}")
            continue
        moved = sum(t.numel() * t.element_size() for e in encoded[0][1:] for t in e.codes.values())
        report.add(
            "Quantized decode kernels",
            sequences=len(seqs),
            slots=seqs.longest,
            codec=name,
            **took,
            GB_per_s=moved / took["ms"] / 1e6,
            faster_than_dense=dense["ms"] / took["ms"],
        )


def _encode(codec: Codec, x: Tensor) -> Encoded:
    return Encoded(codec, {name: t.contiguous() for name, t in codec.encode(x).items()}, x.shape[-1])


def bench_tiles(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Other tiles of the dense kernel: whether the default is a good one."""
    if device.type != "cuda" or not choose.available(torch.zeros(1, device=device, dtype=sizes.dtype)):
        return
    from kvplan.runtime.kernels import triton_decode

    dim, count, slots = sizes.model["head_dim"], 8, 32768
    seqs, args = Sequences.of([slots] * count, [slots] * count, device), DecodeArgs(dim**-0.5)
    pools = [_random_pool(count, 4, slots, dim, sizes.dtype, device) for _ in range(4)]
    for tile_slots, warps, stages in ((64, 4, 3), (32, 4, 4), (64, 4, 2), (128, 4, 2), (128, 8, 3), (64, 8, 3)):
        if report.over("tiles", 90):
            return
        tile = triton_decode.Tile(tile_slots, warps, stages)
        try:
            runs = [partial(triton_decode.decode, *pool, seqs, args, tile) for pool in pools]
            took = timed(runs, sizes.repeats, device)
        except Exception as error:
            report.note(f"tile {tile}: {type(error).__name__}: {error}")
            continue
        moved = count * slots * dim * 2 * sizes.dtype.itemsize
        report.add("Tiles of the dense kernel, 8 x 32768", **asdict(tile), **took, GB_per_s=moved / took["ms"] / 1e6)


def bench_columns(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Column sums of one layer against the layer's attention."""
    heads, kv_heads, dim = (sizes.model[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    T = sizes.prefill_tokens
    q = torch.randn(1, heads, T, dim, device=device, dtype=sizes.dtype)
    keys, values = (torch.randn(1, kv_heads, T, dim, device=device, dtype=sizes.dtype) for _ in range(2))
    valid = torch.ones(1, T, dtype=torch.bool, device=device)
    args = AttentionArgs(dim**-0.5)
    attention = torch.nn.functional.scaled_dot_product_attention
    flash = timed([lambda: attention(q, keys, values, is_causal=True, enable_gqa=True)], sizes.repeats, device)
    lse = torch.zeros(1, heads, T, device=device)
    runs = {
        "with a given log-sum-exp": lambda: choose.column_sums(q, keys, valid, args, lse),
        "alone": lambda: choose.column_sums(q, keys, valid, args),
    }
    for name, run in runs.items():
        took = timed([run], sizes.repeats, device)
        report.add("Column sums of one layer", tokens=T, kernel=name, **took, of_attention=took["ms"] / flash["ms"])


# -- the model ----------------------------------------------------------------------------------------------------


def build_model(sizes: Sizes, device: torch.device) -> Any:
    """Random weights, made where they are used."""
    longest = max(tokens for tokens, _ in sizes.cases) + 1024
    config = LlamaConfig(**sizes.model, max_position_embeddings=longest, rms_norm_eps=1e-5, rope_theta=500000.0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(sizes.dtype)
    model.to_empty(device=device).eval()
    # Its buffers were not computed on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class StepClock(StoppingCriteria):
    """Stops nothing; marks the end of each step."""

    def __init__(self, device: torch.device) -> None:
        self.marks = Marks(device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.mark()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def decode_steps(model: Any, cache: Any, tokens: int, batch: int, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a decode step of `generate` on a cache that has seen `tokens` tokens; the first 3 warm up."""
    clock = StepClock(device)
    model.generate(
        input_ids=torch.randint(3, 100, (batch, tokens + 1), device=device),
        past_key_values=cache,
        max_new_tokens=steps + 4,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return spread(clock.marks.gaps_ms()[3:])


def _one_row(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (1, sizes.model["num_key_value_heads"], tokens, sizes.model["head_dim"])
    return (
        torch.randn(shape, device=device, dtype=sizes.dtype),
        torch.randn(shape, device=device, dtype=sizes.dtype),
    )


@torch.no_grad()
def filled_dynamic(sizes: Sizes, tokens: int, batch: int, device: torch.device) -> DynamicCache:
    cache, (keys, values) = DynamicCache(), _one_row(sizes, tokens, device)
    for layer in range(sizes.model["num_hidden_layers"]):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache


@torch.no_grad()
def filled_policy(runtime: Any, sizes: Sizes, tokens: int, batch: int, device: torch.device) -> Any:
    """A cache as after a prompt of random keys and values, by the layers' own `fill`, as `runtime.replay` does."""
    from kvplan.methods.evictors import Signal
    from kvplan.runtime.layers.base import PromptStats

    cache = runtime.new_cache()
    keys, values = (x.expand(batch, -1, -1, -1) for x in _one_row(sizes, tokens, device))
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    q = keys[:, :, -1:].repeat_interleave(sizes.model["num_attention_heads"] // keys.shape[1], 1)
    for layer in cache.layers:
        evictor = layer.policy.evictor
        if layer.policy.slots.is_full or evictor.needs is Signal.NONE:
            stats = layer.observe_prompt(q, keys, values, valid, AttentionArgs(1.0))
        else:
            heads = 1 if evictor.one_set_for_all_heads else keys.shape[1]
            stats = PromptStats(scores=torch.rand(batch, heads, tokens, device=device))
        layer.fill(keys, values, [tokens] * batch, stats)
        layer.columns = tokens
    return cache


def bench_decode(report: Report, sizes: Sizes, model: Any, device: torch.device) -> None:
    """Steps of transformers' `generate` under every configuration and case."""
    all_policies = list(policies(model, report))
    with kvplan.attach(model, all_policies[0][1]) as runtime:
        spec = runtime.spec

    def row_bytes(name: str, tokens: int) -> int:
        """KV bytes of one row; a DynamicCache also builds the next step's tensors beside one layer's."""
        held = tokens if name == FULL_DECODE else int(tokens * KEEP_FRACTION)
        if name in (FULL_DECODE, SHORT_DECODE):
            return spec.full_kv_bytes([held + sizes.steps + 4])
        return plan(dict(all_policies)[name], spec, [tokens], sizes.steps + 4).total

    for tokens, wanted in sizes.cases:
        for name in (FULL_DECODE, *(name for name, _ in all_policies), SHORT_DECODE):
            what = f"{name}, {tokens} tokens, batch {wanted or 'max'}"
            if report.over(what):
                continue
            most = sizes.kv_bytes // row_bytes(name, tokens)
            batch = most if wanted is None else wanted
            if not 0 < batch <= most:
                report.note(f"{what}: does not fit in {sizes.kv_bytes / GIB:.3g} GiB of KV")
                continue
            try:
                _bench_case(report, sizes, model, dict(all_policies).get(name), name, tokens, batch, wanted, device)
            except torch.OutOfMemoryError:
                report.note(f"{what}: out of memory at batch {batch}")
            except Exception as error:
                report.note(f"{what}: {type(error).__name__}: {error}")
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _bench_case(
    report: Report,
    sizes: Sizes,
    model: Any,
    policy: Policy | None,
    name: str,
    tokens: int,
    batch: int,
    wanted: int | None,
    device: torch.device,
) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {"context": tokens, "batch": "max" if wanted is None else batch, "rows": batch, "cache": name}
    if policy is None:
        held = tokens if name == FULL_DECODE else int(tokens * KEEP_FRACTION)
        cache = filled_dynamic(sizes, held, batch, device)
        row |= decode_steps(model, cache, held, batch, sizes.steps, device)
        row["kv_GiB"] = sum(x.numel() * x.element_size() for la in cache.layers for x in (la.keys, la.values)) / GIB
    else:
        with kvplan.attach(model, policy) as runtime:
            cache = filled_policy(runtime, sizes, tokens, batch, device)
            row |= decode_steps(model, cache, tokens, batch, sizes.steps, device)
            row["kv_GiB"] = cache.kv_bytes / GIB
    row["tokens_per_s"] = batch / row["ms"] * 1e3
    if device.type == "cuda":
        row["peak_GiB"] = torch.cuda.max_memory_allocated(device) / GIB
    report.add("Decode", **row)


@torch.no_grad()
def bench_prefill(report: Report, sizes: Sizes, model: Any, device: torch.device) -> None:
    """A real prompt: its first token, with ranking and eviction, and the most memory held on the way."""
    ids = torch.randint(3, 100, (1, sizes.prefill_tokens), device=device)

    def prompt(name: str, make_cache: Callable[[], Any]) -> None:
        for round_ in range(3):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            marks, cache = Marks(device), make_cache()
            marks.mark()
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
            marks.mark()
            (took,) = marks.gaps_ms()
            if round_ == 0:
                times = []  # the first round warms up
            else:
                times.append(took)
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
        report.add("Prompt to first token", tokens=ids.shape[1], cache=name, ms=min(times), peak_GiB=peak)

    prompt(FULL_DECODE, DynamicCache)
    for name, policy in policies(model, report):
        if report.over(f"prompt, {name}", 60):
            return
        try:
            with kvplan.attach(model, policy) as runtime:
                prompt(name, runtime.new_cache)
        except Exception as error:
            report.note(f"prompt, {name}: {type(error).__name__}: {error}")


@torch.no_grad()
def bench_captured(report: Report, sizes: Sizes, model: Any, device: torch.device) -> None:
    """`runtime.generate(..., compiled=True)`, where this version has it."""
    tokens = sizes.cases[0][0]
    name, policy = next((n, p) for n, p in policies(model, report) if n == f"{CUT}streaming")
    with kvplan.attach(model, policy) as runtime:
        run = getattr(runtime, "generate", None)
        if run is None or "compiled" not in inspect.signature(run).parameters:
            report.note("captured decode steps: this version has no runtime.generate(..., compiled=True)")
            return
        ids = torch.randint(3, 100, (1, tokens), device=device)
        times = []
        try:
            # Long minus short: what is left is decode steps alone, without prompt and capture.
            for new in (8, 8, 8 + sizes.steps, 8, 8 + sizes.steps, 8, 8 + sizes.steps):
                marks = Marks(device)
                marks.mark()
                run(ids, max_new_tokens=new, compiled=True)
                marks.mark()
                times.append(marks.gaps_ms()[0])
        except Exception as error:
            report.note(f"captured decode steps: {type(error).__name__}: {error}")
            return
    steps = [(long - short) / sizes.steps for short, long in zip(times[1::2], times[2::2], strict=True)]
    report.add("Captured decode step", context=tokens, batch=1, cache=name, **spread(steps))


# -- the verdict --------------------------------------------------------------------------------------------------


def judge(report: Report, sizes: Sizes) -> None:
    """The targets beside what was measured."""
    first = sizes.cases[0][0]
    full = report.find("Decode", context=first, batch=1, cache=FULL_DECODE)
    mine = [r for r in report.find("Decode", context=first, batch=1) if r["cache"].startswith(CUT)]
    mine += report.find("Captured decode step", context=first)
    if full and mine:
        best = min(mine, key=lambda r: r["ms"])
        what = f"batch-1 decode at {first} tokens against {FULL_DECODE}"
        _target(report, what, 2.0, full[0]["ms"] / best["ms"], best["cache"])
    for tokens in [tokens for tokens, wanted in sizes.cases if wanted is None]:
        rates = {r["cache"]: r["tokens_per_s"] for r in report.find("Decode", context=tokens, batch="max")}
        cut = {name: rates[CUT + name] for name in SLOTS_ALONE if CUT + name in rates}
        for base in (FULL_DECODE, OWN_FULL):
            if base in rates and cut:
                name = max(cut, key=lambda name: cut[name])
                what = f"tokens/s at {sizes.kv_bytes / GIB:.3g} GiB of KV, {tokens} tokens, against {base}"
                _target(report, what, 3.0, cut[name] / rates[base], CUT + name)
    kernels = [r for r in report.find("Decode kernels", kernel="chosen") if r["MiB"] * 2**20 >= BUSY_BYTES]
    if kernels:
        worst = min(kernels, key=lambda r: r["of_a_copy"])
        detail = (
            f"worst of {len(kernels)} that read {BUSY_BYTES >> 20} MiB or more: {worst['sequences']} x {worst['slots']}"
        )
        _target(report, "bandwidth of the decode kernel, of a device copy's", 0.7, worst["of_a_copy"], detail)


def _target(report: Report, what: str, target: float, measured: float, detail: str) -> None:
    report.add("Targets", what=what, target=f">= {target}", measured=measured, met=measured >= target, detail=detail)


def environment(device: torch.device) -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton_version,
        "kvplan": kvplan.__version__,
        "kernels": choose.setting(),
    }


def run(sizes: Sizes, device: torch.device, minutes: float) -> Report:
    """All sections, in order; what does not fit in the time is noted and skipped."""
    report = Report(minutes)
    report.add("Environment", **environment(device))
    check_kernels(report, device)
    check_policies(report, device)
    bench_kernels(report, sizes, device)
    bench_tiles(report, sizes, device)
    bench_columns(report, sizes, device)
    model = build_model(sizes, device)
    bench_prefill(report, sizes, model, device)
    bench_captured(report, sizes, model, device)
    bench_decode(report, sizes, model, device)
    judge(report, sizes)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; the report goes beside it, ending in .md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--minutes", type=float, default=7.5, help="cases that would start later are skipped")
    parser.add_argument("--kv-gib", type=float, help="KV bytes that the largest batches may hold")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs everything at tiny sizes without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMOKE_SIZE if args.smoke else FULL_SIZE
    if args.kv_gib is not None:
        sizes = replace(sizes, kv_bytes=int(args.kv_gib * GIB))
    transformers.logging.set_verbosity_error()
    report = run(sizes, device, args.minutes)
    text = ("SMOKE: these numbers mean nothing.\n" if args.smoke else "") + report.markdown()
    print(text)
    if args.out is not None:
        about = {"smoke": args.smoke, "elapsed_s": report.elapsed_s, "notes": report.notes}
        args.out.write_text(json.dumps(about | report.sections, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text + "\n")
    failed = report.find("Correctness", passed=False)
    if failed:
        sys.exit(f"{len(failed)} correctness checks failed")


if __name__ == "__main__":
    main()
