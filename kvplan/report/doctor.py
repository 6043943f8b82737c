"""What `kvplan doctor` says."""

from __future__ import annotations

import textwrap

from rich.text import Text

from kvplan.check.doctor import Finding

WIDTH = 80


def picture(finding: Finding) -> Text:
    """Versions, devices and kernels, then what is slow or wrong."""
    text = Text()
    width = max(map(len, finding.versions))
    for name, version in finding.versions.items():
        text.append(f"{name:{width}}  ")
        text.append(f"{version or 'not installed'}\n", "" if version else "dim")
    text.append("\n")
    for device in finding.devices:
        text.append(f"{device}, kernels: {finding.kernels[device.split()[0]]}\n")
    for title, lines, style in (("slow here", finding.slow, "yellow"), ("wrong", finding.problems, "red")):
        for line in lines:
            told = textwrap.fill(f"{title}: {line}", WIDTH, subsequent_indent="  ")
            text.append(f"{told}\n", style)
    if not finding.problems:
        text.append("nothing is wrong", "green")
    return text
