"""What a report is made of: any of the files that kvplan writes, told apart by their content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvplan.calibrate.profile import KIND as PROFILE_KIND
from kvplan.calibrate.profile import Profile
from kvplan.check.results import RESULTS_KEY, Results, load_results
from kvplan.errors import KVPlanError
from kvplan.files import read_text
from kvplan.policy.schema import Policy
from kvplan.policy.serialize import load_policy

if TYPE_CHECKING:
    from kvplan.report.sample import Sample
    from kvplan.search.trials import StudyRecord

CONTEXT_TOKENS = 1024  # of the prompt that budgets and bytes are drawn for, unless something tells


@dataclass(frozen=True)
class NamedPolicy:
    """A policy and the file that it came from."""

    path: Path
    policy: Policy

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Inputs:
    """Everything that pictures are drawn from; what is missing leaves its pictures out.

    Attributes:
        policies: The first is the one whose layers are drawn.
        sample: Which tokens of a prompt the first policy keeps.
        context: Prompt tokens that budgets and bytes are drawn for, where they were asked for.
    """

    profile: Profile | None = None
    study: StudyRecord | None = None
    policies: tuple[NamedPolicy, ...] = ()
    results: Results | None = None
    sample: Sample | None = None
    context: int | None = None

    @property
    def policy(self) -> Policy | None:
        return self.policies[0].policy if self.policies else None

    @property
    def context_tokens(self) -> int:
        """What was asked for, else the sample's prompt, else what the policy was planned for."""
        if self.context is not None:
            return self.context
        if self.sample is not None:
            return len(self.sample.pieces)
        target = None if self.policy is None else self.policy.target
        planned = {} if self.policy is None else self.policy.provenance.get("planned")
        tokens = planned.get("prompt_tokens") if isinstance(planned, Mapping) else None
        if type(tokens) is int and tokens > 0:
            return tokens
        return (target and target.context_tokens) or CONTEXT_TOKENS


def read_inputs(paths: Sequence[Path], storage: str | None = None, study: str | None = None) -> Inputs:
    """Read every file, and the study of that name in that storage, where one is given.

    Raises:
        KVPlanError: a file is none of kvplan's, is damaged, or there are two where one is drawn.
    """
    profiles: list[Profile] = []
    studies: list[StudyRecord] = []
    policies: list[NamedPolicy] = []
    results: list[Results] = []
    for path in paths:
        kind = kind_of(path)
        if kind == "profile":
            profiles.append(Profile.load(path))
        elif kind == "study":
            from kvplan.search.trials import read_study

            studies.append(read_study(path))
        elif kind == "results":
            results.append(load_results(path))
        else:
            policies.append(NamedPolicy(path, load_policy(path)))
    if storage is not None:
        from kvplan.search.trials import read_stored_study

        studies.append(read_stored_study(storage, study))
    for what, found, remedy in (
        ("profiles", profiles, "merge them first: kvplan profile merge"),
        ("studies", studies, "make a report of each"),
        ("results files", results, "measure all policies in one kvplan eval, so that they saw the same prompts"),
    ):
        if len(found) > 1:
            raise KVPlanError(f"{len(found)} {what} were given, and a report draws one; {remedy}")
    _same_model(profiles, policies)
    return Inputs(
        profile=profiles[0] if profiles else None,
        study=studies[0] if studies else None,
        policies=tuple(policies),
        results=results[0] if results else None,
    )


def kind_of(path: Path) -> str:
    """`profile`, `study`, `policy` or `results`.

    Raises:
        KVPlanError: the file is missing, or is none of these.
    """
    if path.is_dir():
        raise KVPlanError(f"{path}: a folder; name the files in it")
    text = read_text(path, "file")
    if not text.lstrip().startswith("{"):
        if "kvplan:" in text:
            return "policy"
    else:
        from kvplan.search.trials import is_study

        if is_study(path):
            return "study"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and data.get("kind") == PROFILE_KIND:
            return "profile"
        if isinstance(data, dict) and RESULTS_KEY in data:
            return "results"
    raise KVPlanError(f"{path}: not a profile, a search's journal, a policy or a results file")


def _same_model(profiles: Sequence[Profile], policies: Sequence[NamedPolicy]) -> None:
    """Layers are drawn side by side, so they must be of one model."""
    counts = {p.name: len(p.policy.layers) for p in policies}
    if profiles:
        counts["the profile"] = profiles[0].spec.num_layers
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise KVPlanError(f"the files are of models with different numbers of layers ({told}); make a report of each")
