"""generate(): text from a batch of prompts under the attached policy, with the bytes and times it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvplan.errors import MemoryPlanExceeded, RuntimeLimitError
from kvplan.placement import input_device
from kvplan.policy.memory import plan
from kvplan.runtime.attach import Runtime


@dataclass(frozen=True)
class Generated:
    """One row of a batch, right after its last forward.

    A row that stops early stays in its batch until the longest row ends: bytes are those of the cache as it is held
    then, for the prompt and every token appended, and so is the full cache that they are compared with.

    Attributes:
        text: Without special tokens.
        tokens: The new tokens, up to and including the end token.
        kv_bytes: Storage bytes of this row, counted in the pools.
        kv_bytes_planned: What the policy promises for this row.
        kv_bytes_full: What a cache that evicts nothing would hold for this row.
        peak_kv_bytes: The most that the whole batch held at once, prompts that are not yet compressed included.
        batch_rows: Rows that ran together.
        prefill_seconds: From the start to the batch's first tokens.
        decode_tokens_per_second: This row's tokens after the first, or None when there was only one.
        min_slots_binds: Layers in which `min_slots` lifts this row above its percentage.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    kv_bytes: int
    kv_bytes_planned: int
    kv_bytes_full: int
    peak_kv_bytes: int
    batch_rows: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    min_slots_binds: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def kv_ratio(self) -> float:
        return self.kv_bytes / self.kv_bytes_full

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["tokens"]
        return {**data, "new_tokens": self.new_tokens, "kv_ratio": self.kv_ratio}


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    runtime: Runtime,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    streamer: Any = None,
) -> list[Generated]:
    """Run the prompts as one batch.

    Args:
        runtime: What `attach` yields.
        tokenizer: Decodes the new tokens.
        prompts: Token ids, at least one each.
        max_new_tokens: Most new tokens of a row; the model's own end tokens stop it before.
        temperature: 0 takes the likeliest token.
        seed: Seeds torch before sampling.
        streamer: A transformers streamer, for one prompt.

    Raises:
        MemoryPlanExceeded: the cache holds more than the policy plans.
        RuntimeLimitError: the batch does not fit on the device, or the scores to sample from are not numbers.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids, mask = _pad_left(prompts, pad, input_device(runtime.model))
    cache, clock = runtime.new_cache(), _Clock()
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    try:
        with torch.no_grad():
            output = runtime.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([clock]),
                streamer=streamer,
                **sampling,
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeLimitError(
            f"{len(prompts)} prompts of up to {ids.shape[1]} tokens do not fit in the memory of {ids.device}; "
            "run fewer together, or shorter ones"
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise RuntimeLimitError(
            f"the model's scores are nan or infinite in {runtime.spec.dtype}; try another --dtype or --temperature"
        ) from error
    ends = end_tokens(runtime.model)
    report, held = cache.report(), [cache.row_bytes(row) for row in range(len(prompts))]
    if sum(held) != report["kv_bytes"]:
        raise MemoryPlanExceeded(f"the rows hold {sum(held)} bytes, their buffers {report['kv_bytes']}")
    rows = []
    for row, prompt in enumerate(prompts):
        tokens = _until_end(output[row, ids.shape[1] :].tolist(), ends)
        # Of a prompt in chunks, a last piece of one token counts as appended: the cache knows.
        planned = plan(runtime.policy, runtime.spec, [cache.prompt_lengths[row]], cache.appended)
        rows.append(
            Generated(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=tuple(tokens),
                prompt_tokens=len(prompt),
                kv_bytes=held[row],
                kv_bytes_planned=planned.total,
                kv_bytes_full=planned.full,
                peak_kv_bytes=report["peak_kv_bytes"],
                batch_rows=len(prompts),
                prefill_seconds=clock.times[0] - start,
                decode_tokens_per_second=_rate(clock.times[: len(tokens)]),
                min_slots_binds=planned.min_slots_binds,
            )
        )
    return rows


def first_difference(a: Generated, b: Generated) -> int | None:
    """Index of the first new token in which two runs differ (a run that ended differs there), or None."""
    if a.tokens == b.tokens:
        return None
    pairs = zip(a.tokens, b.tokens, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T] int64."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def end_tokens(model: Any) -> set[int]:
    """The tokens with which the model ends a text."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def _rate(times: list[float]) -> float | None:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
