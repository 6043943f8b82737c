"""A profile for people: a line per layer, in 80 columns, readable without colour."""

from __future__ import annotations

import textwrap
from string import ascii_lowercase

from rich.text import Text

from kvplan.calibrate.groups import layer_groups
from kvplan.calibrate.profile import Profile, describe
from kvplan.calibrate.statistics import MASS_LEVELS

WIDTH = 80
SHOWN_LEVEL = 0.9
_BAR = 16
_COLOURS = ("magenta", "yellow", "green", "cyan")


def table(profile: Profile) -> Text:
    """A line per layer: importance as a bar, cosine, where attention goes, the worst replay. Groups are lettered."""
    importance, (mean, _, se) = profile.importance, profile.cosine
    letters: dict[int, int] = {}
    groups = layer_groups(importance, max_groups=len(_COLOURS))
    for place, members in enumerate(groups):  # a is the least important group
        letters.update(dict.fromkeys(members, place))
    worst = worst_sensitivity(profile)
    level = MASS_LEVELS.index(SHOWN_LEVEL)
    top = max(max(importance), 1e-12)
    text = Text(no_wrap=True)
    text.append(textwrap.fill(describe(profile), WIDTH, subsequent_indent="  ") + "\n\n")
    head = (
        f"{'layer':>5}   {'importance':<{_BAR + 7}} {'cosine':>14}  {'sinks':>5} {'recent':>6} {'tokens':>6} {'KL':>7}"
    )
    text.append(head + "\n", "bold")
    for i, layer in enumerate(profile.statistics.layers):
        bar = "█" * max(round(_BAR * importance[i] / top), 0)
        line = (
            f"{i:>5} {ascii_lowercase[letters[i]]} {bar:<{_BAR}} {importance[i]:>6.4f} {mean[i]:>7.4f} ±{se[i]:.4f} "
            f" {layer.sink_mass.mean.mean():>5.0%} {layer.recent_mass.mean.mean():>6.0%}"
            f" {layer.effective_tokens.mean[:, level].mean():>6.0f} {worst[i]:>7}"
        )
        text.append(line.rstrip() + "\n", _COLOURS[letters[i]])
    text.append("\n")
    notes = [
        f"importance: 1 - cosine of the residual stream before and after attention; {len(groups)} "
        + ("groups, a the least" if len(groups) > 1 else "group: the layers are alike"),
        f"sinks, recent: attention mass on the first {profile.statistics.settings.get('sinks', '?')} and last "
        f"{profile.statistics.settings.get('recent', '?')} tokens; tokens: how many hold {SHOWN_LEVEL:.0%} of it",
    ]
    if profile.sensitivity:
        notes.append("KL: nats, worst of the evictors at the smallest share, this layer alone cut")
    text.append("\n".join(textwrap.fill(n, WIDTH, subsequent_indent="  ") for n in notes) + "\n", "dim")
    text.append(textwrap.fill(time_line(profile), WIDTH, subsequent_indent="  "))
    return text


def worst_sensitivity(profile: Profile) -> list[str]:
    """Per layer, the largest KL of any evictor at the smallest share, or '-'."""
    grids = [by_share[min(by_share)] for by_share in profile.sensitivity.values() if by_share]
    if not grids:
        return ["-"] * profile.spec.num_layers
    cut = [layer.window is None for layer in profile.spec.layers]
    return [f"{max(kl[i] for kl in grids):.4f}" if cut[i] else "-" for i in range(len(cut))]


def time_line(profile: Profile) -> str:
    """'time 12.3 s: load 1.0 s (8%), forward ...'."""
    seconds = profile.seconds
    total = sum(seconds.values())
    parts = [f"{name} {s:.1f} s ({s / total if total else 0:.0%})" for name, s in seconds.items()]
    return f"time {total:.1f} s: {', '.join(parts)}"
