"""The report as one HTML file that fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvplan import __version__
from kvplan.check.summary import by_question, select, summarise
from kvplan.errors import KVPlanError
from kvplan.policy.memory import plan, stated_spec
from kvplan.policy.schema import Policy
from kvplan.policy.serialize import policy_fingerprint
from kvplan.report.inputs import Inputs
from kvplan.report.plots import NARROW, Page, Plot, Table, in_order
from kvplan.report.plots.colours import DARK, LIGHT, css
from kvplan.report.plots.svg import inline_svg
from kvplan.report.policy import layer_text
from kvplan.report.sample import Sample
from kvplan.units import format_bytes

if TYPE_CHECKING:
    from jinja2 import Template

MAX_ROWS = 60  # of numbers in the page; all of them with `kvplan report --plot NAME --data`
LEVELS = 8  # of shade of a token


@dataclass(frozen=True)
class Section:
    """One picture in the page: drawn for a wide and for a narrow one."""

    plot: Plot[Any]
    told: str
    wide: str
    narrow: str
    table: Table

    @property
    def rows(self) -> list[list[str]]:
        return [[_cell(value) for value in row] for row in self.table.rows[:MAX_ROWS]]


@dataclass(frozen=True)
class Text:
    """The sample's tokens as (text, level): how many layers hold it; and per layer a digit a token."""

    tokens: list[tuple[str, int]]
    layers: list[dict[str, str]]
    least: str
    most: str
    summary: str


def render(inputs: Inputs) -> str:
    """The whole page.

    Raises:
        KVPlanError: matplotlib or Jinja2 is missing, or nothing can be drawn from these inputs.
    """
    sections, missing = [], []
    for plot in in_order():
        data = plot.data(inputs)
        if data is None:
            missing.append(plot)
            continue
        wide, narrow = (inline_svg(plot, data, page) for page in (Page(), Page(NARROW)))
        sections.append(Section(plot, plot.told(data), wide, narrow, plot.table(data)))
    if not sections:
        raise KVPlanError("nothing can be drawn from these files")
    return _template().render(
        sections=sections,
        missing=missing,
        facts=_facts(inputs),
        model=_model(inputs),
        text=None if inputs.sample is None else sample_text(inputs),
        levels=LEVELS,
        light=css(LIGHT),
        dark=css(DARK),
        version=__version__,
        max_rows=MAX_ROWS,
    )


def _template() -> Template:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise KVPlanError("reports need Jinja2, which is not installed: pip install jinja2") from error
    source = (files("kvplan.report.html") / "report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )


def _model(inputs: Inputs) -> str:
    """'qwen3, 8 layers, bfloat16'."""
    if inputs.policy is not None:
        told = inputs.policy.model
        named = [told.get("name"), told.get("type"), f"{len(inputs.policy.layers)} layers", told.get("dtype")]
        return ", ".join(str(part) for part in named if part)
    if inputs.profile is not None:
        spec = inputs.profile.spec
        return ", ".join(part for part in (spec.model_type, f"{spec.num_layers} layers", spec.dtype) if part)
    return inputs.results.model.name if inputs.results is not None else ""


def _facts(inputs: Inputs) -> list[tuple[str, str]]:
    """The numbers on top: value, and what it is."""
    facts = []
    if inputs.policy is not None:
        held = plan(inputs.policy, stated_spec(inputs.policy), [inputs.context_tokens])
        facts.append((f"{held.ratio:.1%}", "of the full cache's bytes"))
        facts.append(
            (format_bytes(held.total), f"instead of {format_bytes(held.full)}, for {inputs.context_tokens} tokens")
        )
        facts += _evaluated(inputs) or _confirmed(inputs.policy)
    if inputs.study is not None:
        facts.append((str(len(inputs.study.trials)), "trials searched"))
    if inputs.profile is not None:
        facts.append((str(inputs.profile.statistics.num_prompts), "prompts in the profile"))
    return facts


def _evaluated(inputs: Inputs) -> list[tuple[str, str]]:
    """What the results file says of the first policy, each way of asking apart; empty if it does not hold this plan."""
    if inputs.results is None or inputs.policy is None:
        return []
    fingerprint, results = policy_fingerprint(inputs.policy), inputs.results
    measured = next((p for p in results.policies if p.fingerprint == fingerprint), None)
    if measured is None:
        return []
    facts = []
    for group in by_question(results):
        found = summarise(measured.name, select(measured.rows, group), seed=results.seed)
        where = f"on {found.prompts} prompts of kvplan eval, {group.name}"
        facts.append((f"{found.kl.mean:.2g}", f"nats of KL from the full cache {where}"))
    return facts


def _confirmed(policy: Policy) -> list[tuple[str, str]]:
    """What the search stated in the policy, and on which prompts."""
    search = policy.provenance.get("search")
    if not isinstance(search, dict):
        return []
    count, stage = search.get("num_prompts"), search.get("prompts")
    where = " ".join(str(word) for word in ("on", count, stage, "prompts") if word)
    facts = []
    if isinstance(kl := search.get("kl"), float | int):
        facts.append((f"{kl:.2g}", f"nats of KL from the full cache {where}"))
    if isinstance(task := search.get("task"), float | int):
        facts.append((f"{task:.1%}", f"of the answers exact {where}"))
    return facts


def sample_text(inputs: Inputs) -> Text:
    """The sample's tokens, shaded."""
    sample, policy = inputs.sample, inputs.policy
    assert sample is not None and policy is not None
    layers = len(sample.held)
    least, most = sample.layers_holding.min(), sample.layers_holding.max()
    # Between the least and the most that any token has: where most layers keep all, the rest would not show.
    shade = level((sample.layers_holding - least) / (most - least) if most > least else np.ones(len(sample.pieces)))
    names = [
        f"reads layer {layer.shares}" if layer.shares is not None else layer_text(layer) or "everything, as it is"
        for layer in policy.layers
    ]
    return Text(
        tokens=list(zip(sample.pieces, shade.tolist(), strict=True)),
        layers=[
            {
                "told": f"layer {i} ({names[i]}) keeps {_count(sample, i)}",
                "held": "".join(map(str, level(sample.held[i]).tolist())),
            }
            for i in range(layers)
        ],
        least=f"{least:.3g} of {layers} layers",
        most=f"{most:.3g} of {layers}",
        summary=f"all {layers} layers: the stronger the shade of a token, the more layers keep it",
    )


def _count(sample: Sample, layer: int) -> str:
    held, tokens = sample.held[layer].sum(), sample.held.shape[1]
    return f"{held:.0f} of {tokens} tokens ({held / tokens:.0%})"


def level(share: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """[...] int64 shade of shares 0 to 1: 0 only for nothing, the last only for all."""
    inside = np.clip(np.ceil(share * (LEVELS - 1) - 1e-9), 1, LEVELS - 1)
    found = np.where(share <= 1e-9, 0, np.where(share >= 1 - 1e-9, LEVELS, inside))
    return found.astype(np.int64)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
