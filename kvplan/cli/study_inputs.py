"""Model and prompts of a study, as the search that created it was told, for those who come later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplan.calibrate.examples import Example
    from kvplan.model_spec import ModelSpec
    from kvplan.search.shared import SharedStudy


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

    from kvplan.calibrate.prompts import data_fingerprint, load_examples
    from kvplan.demo.data import calib_data_path
    from kvplan.loading import load_model

    inputs = shared.definition.inputs
    network, tokenizer, spec = load_model(
        model or inputs["model"], dtype=shared.identity["dtype"], device=device, trust_remote_code=trust_remote_code
    )
    known = {"kvplan": __version__, "dtype": spec.dtype, "model": spec.fingerprint}
    shared.refuse_other(known, HINTS)
    examples = load_examples(
        data or inputs["data"] or [calib_data_path("search")],
        tokenizer,
        max_prompts=inputs["max_prompts"],
        max_tokens=inputs["max_tokens"],
        context_limit=spec.max_context_tokens,
        column=inputs["column"],
        split=inputs["split"],
        seed=shared.definition.seed,
    )
    examples = [example for example in examples if example.continuation_ids]
    known["data"] = data_fingerprint(examples)
    shared.refuse_other(known, HINTS)
    return Inputs(network, spec, examples, known)
