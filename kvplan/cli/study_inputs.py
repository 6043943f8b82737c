"""Model and prompts of a study: for the search that creates it, and for those who come later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplan.calibrate.examples import Example
    from kvplan.model_spec import ModelSpec
    from kvplan.search.shared import SharedStudy

MIN_PROMPTS = 3


@dataclass(frozen=True)
class Inputs:
    """What a study was created with.

    Attributes:
        known: The parts of the study's identity that they decide.
    """

    network: Any
    spec: ModelSpec
    examples: list[Example]
    known: dict[str, Any]


def load_inputs(
    shared: SharedStudy,
    model: str | None = None,
    data: list[str] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Inputs:
    """Load them, from the given places or those of the search.

    Raises:
        StudyError: kvplan, model, dtype or prompts are not the study's.
    """
    from kvplan import __version__
    from kvplan.search.worker import HINTS

    # Says at once what cannot be, before the model is loaded.
    shared.refuse_other({"kvplan": __version__}, HINTS)

    from kvplan.calibrate.prompts import data_fingerprint
    from kvplan.loading import load_model

    inputs = shared.definition.inputs
    network, tokenizer, spec = load_model(
        model or inputs["model"], dtype=shared.identity["dtype"], device=device, trust_remote_code=trust_remote_code
    )
    known = {"kvplan": __version__, "dtype": spec.dtype, "model": spec.fingerprint}
    shared.refuse_other(known, HINTS)
    examples = _examples({**inputs, "data": data or inputs["data"]}, tokenizer, spec, shared.definition.seed)
    known["data"] = data_fingerprint(examples)
    shared.refuse_other(known, HINTS)
    return Inputs(network, spec, examples, known)


def new_inputs(
    told: Mapping[str, Any],
    seed: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    *,
    made_for: tuple[Path, ModelSpec],
) -> Inputs:
    """Load what a new study is about.

    Args:
        told: `model`, `data`, `max_prompts`, `max_tokens`, `column`, `split`; the study keeps them for workers.
        made_for: The profile's file, and its model.

    Raises:
        ProfileError: the profile is of another model.
        DataError: there are too few prompts.
    """
    from kvplan import __version__
    from kvplan.calibrate.prompts import data_fingerprint
    from kvplan.cli.console import warn
    from kvplan.errors import DataError, ProfileError
    from kvplan.loading import load_model

    network, tokenizer, spec = load_model(
        told["model"], dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    profile, measured = made_for
    if spec.fingerprint != measured.fingerprint:
        raise ProfileError(
            f"{profile}: made for another model ({measured.fingerprint}; this one is {spec.fingerprint}); "
            "give its --model, or calibrate this one"
        )
    if told["model"] is not None and not told["data"]:
        warn("no --data: using the prompts of the bundled model, whose world this model may not know")
    examples = _examples(told, tokenizer, spec, seed)
    if len(examples) < MIN_PROMPTS:
        raise DataError(f"{len(examples)} prompts have a continuation; a search needs at least {MIN_PROMPTS}")
    known = {"data": data_fingerprint(examples), "dtype": spec.dtype, "kvplan": __version__}
    return Inputs(network, spec, examples, known)


def found_on(
    inputs: Inputs, profile: str, calibrated: Iterable[str], model: str | None, search: Mapping[str, Any]
) -> dict[str, Any]:
    """What a policy's provenance says of how it was found.

    Args:
        profile: Its `data_fingerprint`.
        calibrated: The hashes of its prompts.
        search: What else tells one search from another.
    """
    from kvplan import __version__
    from kvplan.calibrate.collect import prompt_hash
    from kvplan.search.seen import KEY, packed

    return {
        "kvplan": __version__,
        "profile": profile,
        "data": inputs.known["data"],
        **search,
        "model": model or "bundled",
        KEY: packed([*calibrated, *map(prompt_hash, inputs.examples)]),
    }


def _examples(told: Mapping[str, Any], tokenizer: Any, spec: ModelSpec, seed: int) -> list[Example]:
    """Those that can be searched on: something follows the prompt."""
    from kvplan.calibrate.prompts import load_examples
    from kvplan.demo.data import calib_data_path

    examples = load_examples(
        told["data"] or [calib_data_path("search")],
        tokenizer,
        max_prompts=told["max_prompts"],
        max_tokens=told["max_tokens"],
        context_limit=spec.max_context_tokens,
        column=told["column"],
        split=told["split"],
        seed=seed,
    )
    return [example for example in examples if example.continuation_ids]
