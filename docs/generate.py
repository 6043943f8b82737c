"""Write docs/policy.md and docs/cli.md from the code: `python docs/generate.py`, or `--check` to see if they are stale.

Field meanings come from the JSON schema's descriptions, else from the `Args` of the dataclasses that the file becomes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed will do

from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import Codec, codecs
from kvplan.methods.evictors import Evictor, Signal, evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.methods.params import Choice, search_ranges
from kvplan.model_spec import ModelSpec
from kvplan.policy import memory
from kvplan.policy.compositions import CHUNK_RULES, RULES, Rule
from kvplan.policy.json_schema import json_schema
from kvplan.policy.schema import LayerPolicy, Policy, Slots, Target
from kvplan.policy.serialize import SCHEMA_FILE
from kvplan.registry import Registry

DOCS = Path(__file__).resolve().parent
HELP_WIDTH = 100
NOTE = "<!-- Made by `python docs/generate.py`; do not edit. -->"

EXAMPLE = """\
kvplan: 1
model: {type: llama, layers: 8, kv_heads: 2, head_dim: 32, dtype: bfloat16}
target: {share: 40%}
layers:
  0-1: {slots: full}
  2-5: {slots: 35%, sink_tokens: 4, recent_tokens: 16, min_slots: 64, evictor: {snapkv: {window_tokens: 16}}}
  "6": {slots: 512, sink_tokens: 4, recent_tokens: 16, evictor: tova, codec: {keys: int8, values: fp8}}
  "7": {shares: 5}
"""


EXAMPLE_OF_ALL = """\
kvplan: 1
model: {type: llama, layers: 8, kv_heads: 2, head_dim: 32, dtype: bfloat16}
layers:
  0-1: {slots: 50%, min_slots: 192, evictor: snapkv, codec: {kivi: {bits: 4}}}
  "2": {slots: [60%, 20%], evictor: h2o}
  "3": {slots: full, codec: {keys: {turboquant: {bits: 3}}, values: int8}}
  "4": {slots: 40%, evictor: h2o, channels: {think: {drop: 0.5}}}
  "5": {slots: 60%, evictor: snapkv, head_split: adakv, codec: fp8}
  "6": {slots: 40%, evictor: h2o, merger: kvmerger}
  "7": {slots: 60%, evictor: {corm: {window_tokens: 64}}}
"""


def docstring_args(cls: type) -> dict[str, str]:
    """The `Args:` and `Attributes:` sections of a class docstring: name -> text."""
    found: dict[str, str] = {}
    doc = inspect.getdoc(cls) or ""
    for section in re.finditer(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE):
        name = None
        for line in section[1].splitlines():
            if match := re.match(r" {4}(\w+): (.*)", line):
                name = match[1]
                found[name] = match[2]
            elif name is not None and line.startswith(" " * 8):
                found[name] += " " + line.strip()
    return found


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(*rows: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(cell(c) for c in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def kind(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A schema node's type and range, for people."""
    if "$ref" in node:
        return "mapping"
    if "anyOf" in node:
        return ", or ".join(dict.fromkeys(kind(option, definitions) for option in node["anyOf"]))
    if "allOf" in node:
        return ", ".join(kind(option, definitions) for option in node["allOf"])
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "%" in node.get("pattern", ""):
        return "percentage, `0.01%` to `100%`"
    names = node.get("type", "any")
    if isinstance(names, list):
        return " or ".join("text" if name == "string" else name for name in names)
    if names == "array":
        return f"list of {kind(node['items'], definitions)}"
    told = {"string": "text", "object": "mapping"}.get(names, names)
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None:
        return f"{told}, {low} to {high}"
    if low is not None:
        return f"{told}, at least {low}"
    return told


def default_of(cls: type, name: str, required: bool) -> str:
    """The default of the dataclass field that the file's field becomes."""
    if required:
        return "required"
    match = next((f for f in dataclasses.fields(cls) if f.name == name), None)
    if match is None:
        return ""
    value = match.default
    if match.default_factory is not dataclasses.MISSING:
        value = match.default_factory()
    if isinstance(value, (Evictor, Codec)):
        return f"`{value.name}`"
    if isinstance(value, Slots):
        return ""  # a layer has `slots` or `shares`
    return "" if value is None or value is dataclasses.MISSING or value == {} else f"`{value}`"


def fields(block: Mapping[str, Any], where: str, sources: tuple[type, ...], schema: Mapping[str, Any]) -> str:
    """A table of one block's fields."""
    meanings: dict[str, str] = {}
    for source in reversed(sources):
        meanings |= docstring_args(source)
    rows = [("field", "value", "default", "meaning")]
    for name, node in block["properties"].items():
        told = node.get("description") or meanings.get(name)
        # A sharper text than the one-line description stands in the docstring of a layer's fields.
        if where == "layers":
            told = meanings.get(name, told)
        if told is None:
            raise SystemExit(f"docs/generate.py: {where}.{name} is described nowhere; give it a description")
        value = kind(node, schema["$defs"])
        if name in ("evictor", "head_split", "merger", "channels"):
            value = "a name, or one name with its parameters"
        elif name == "codec":
            value = "the same for both, or `{keys: ..., values: ...}`"
        if name == "bytes":
            value = "size like `512MiB` or `1.5GiB`"
        if value.endswith("list of integer, at least 1"):
            value = "integer above 0, or a list of them"
        rows.append((f"`{name}`", value, default_of(sources[0], name, name in block.get("required", [])), told))
    return table(*rows)


def paper(cls: type) -> str:
    doc = " ".join((inspect.getdoc(cls) or "").split())
    found = re.search(r"(\w+ et al\. \d{4}(?: \([^)]*\))?), (arXiv:\d{4}\.\d{4,5})", doc)
    if not found:
        return ""
    return f"{found[1]}, [{found[2]}](https://arxiv.org/abs/{found[2].removeprefix('arXiv:')})"


def notes(cls: type) -> str:
    """The docstring's second paragraph without the paper: where we differ."""
    doc = inspect.getdoc(cls) or ""
    paragraphs = [" ".join(p.split()) for p in doc.split("\n\n")]
    second = paragraphs[1] if len(paragraphs) > 1 and not paragraphs[1].startswith(("Args:", "Raises:")) else ""
    rest = re.sub(r"^.*?arXiv:\d{4}\.\d{4,5}[.,;]?\s*", "", second, count=1)
    return rest[:1].upper() + rest[1:]


def needs(cls: type[Evictor]) -> str:
    told = {
        Signal.QUERIES: "the prompt's last queries",
        Signal.COLUMN_SUMS: "attention of all the prompt's queries",
        Signal.ALL_QUERIES: "all the prompt's queries",
        Signal.ROTATION: "how the model rotates them",
    }
    return ", ".join(text for signal, text in told.items() if signal in cls.needs) or "no queries"


def storage(cls: type[Evictor]) -> str:
    if not cls.keeps_scores:
        return "nothing beside keys and values"
    per = cls().side_bytes_per_slot(1)
    heads = "of all KV heads together" if cls.one_set_for_all_heads else "and KV head"
    return f"position and score, {per} bytes per slot {heads}"


def type_of(cls: type, name: str) -> str:
    """A parameter's type, for people; the values of a `Literal`."""
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    options = [option for option in typing.get_args(hint) if option is not type(None)] or [hint]
    return " or ".join(
        ", ".join(f"`{value}`" for value in typing.get_args(option)) or option.__name__ for option in options
    )


def method_section(registry: Registry[Any], name: str) -> Iterator[str]:
    cls = registry[name]
    yield f"### `{name}`\n"
    yield (inspect.getdoc(cls) or "").split("\n")[0] + "\n"
    source, differs = paper(cls), notes(cls)
    if source:
        yield f"- Paper: {source}."
    if differs:
        yield f"- {differs}"
    if registry is evictors:
        yield f"- Reads: {needs(cls)}. Stores: {storage(cls)}."
    parameters = dataclasses.fields(cls)
    if not parameters:
        yield "- No parameters.\n"
        return
    meanings, ranges = docstring_args(cls), search_ranges(cls)
    rows = [("parameter", "type", "default", "usual range", "meaning")]
    for f in parameters:
        span = ranges.get(f.name)
        if isinstance(span, Choice):
            told = ", ".join(f"`{value}`" for value in span.values)
        else:
            told = "" if span is None else f"{span.low} to {span.high}"
        rows.append((f"`{f.name}`", type_of(cls, f.name), f"`{f.default}`", told, meanings.get(f.name, "")))
    yield "\n" + table(*rows) + "\n"


def method_sections(registry: Registry[Any]) -> str:
    return "\n".join(line for name in registry for line in method_section(registry, name)).rstrip()


def rules_table(rules: tuple[Rule, ...]) -> str:
    rows = [(f"`{rule.field}`", rule.found, rule.reason) for rule in rules]
    return table(("to change", "what cannot run", "why, and what can"), *rows)


def policy_page() -> str:
    schema = json_schema()
    definitions = schema["$defs"]
    parts = [
        "# Policy files",
        NOTE,
        "A policy file is YAML: for each layer of a model, what its KV cache keeps. `kvplan search` writes one; one "
        "written by hand is as good. Reading a file checks all of it and reports every problem with line and column: "
        "`kvplan policy validate FILE`. What the decisions mean is in [concepts.md](concepts.md).",
        f"```yaml\n{EXAMPLE}```",
        "One of each of the other decisions:",
        f"```yaml\n{EXAMPLE_OF_ALL}```",
        "Editors that speak YAML's language server complete and check a policy with its JSON Schema. Write that where "
        "you keep policies:",
        f"```sh\nkvplan policy schema > {SCHEMA_FILE}\n```",
        "From then on the first line of every policy that kvplan writes there points to it (`# yaml-language-server: "
        f"$schema=./{SCHEMA_FILE}`); put it first in files that are older, or written by hand.",
        "YAML 1.2 scalars. Duplicate keys, tags, anchors and aliases are refused, and so is every unknown key.",
        "## Top level",
        fields(schema, "top", (Policy,), schema),
        "## `model`",
        definitions["ModelBlock"]["description"]
        + " Bytes can be planned from the file alone when `layers`, `kv_heads`, `head_dim` and `dtype` are numbers, "
        "not lists. `window` and `window_layers` stand together, in models with sliding windows of their own; without "
        "them every layer counts as full attention.",
        fields(definitions["ModelBlock"], "model", (ModelSpec,), schema),
        "## `target`",
        definitions["TargetBlock"]["description"]
        + " It has either `share` or `bytes`. It records what was asked for; only `layers` decides what is held.",
        fields(definitions["TargetBlock"], "target", (Target,), schema),
        "## `prefill`",
        definitions["PrefillBlock"]["description"]
        + " In chunks the peak is the slots plus one chunk, not one layer's whole prompt, and later chunks see what "
        "earlier ones left: another policy than the same one at once, to be searched and checked as such. A percentage "
        "is of the tokens so far; the prompt ends with the first forward that is not a whole chunk.",
        fields(definitions["PrefillBlock"], "prefill", (Policy,), schema),
        "## `layers`",
        "Keys name layers, counted from 0: `5`, `0-3` or `'4,6-7'`. Each layer is named exactly once; the reader "
        "refuses gaps and overlaps. A layer has either `slots` or `shares`, and `shares` stands alone.",
        fields(definitions["LayerBlock"], "layers", (LayerPolicy, Slots), schema),
        "Rules between fields and layers:",
        "- `slots` in tokens is at least `sink_tokens + recent_tokens`; of a percentage, `min_slots` is. An evictor "
        "without sinks (`sliding`) counts `recent_tokens` alone.\n"
        "- With `kivi` or pruned channels the least is more: sinks and one more unit of `group` tokens (one slot where "
        "slots stand alone), and the recent part (`residual_tokens`, `recent`). The message names the number: "
        "`codec: kivi` with its defaults needs `min_slots: 192`.\n"
        "- Codecs have widths that they can store: after pruning, `turboquant` at 3 bits needs a multiple of 8 "
        "channels, at 2 bits of 4; `group_channels` must divide the channels. Choose another `drop`, or other bits.\n"
        "- A percentage is of each row's own prompt tokens, rounded down, and fixed when the prompt has been read.\n"
        "- `shares` names an earlier layer that stores a cache of its own, with the same KV heads, channels and "
        "attention window.\n"
        "- A layer with the model's own sliding window must be `full`: the window limits it already.\n"
        "- A layer below its capacity doubles its room for new tokens up to a sixteenth of the row's prompt (at least "
        f"{memory.MIN_GROWTH_TOKENS} tokens), then grows block by block.",
        "## Evictors",
        "`evictor: NAME`, or `evictor: {NAME: {PARAMETER: VALUE}}`. Usual ranges are advice, not limits. "
        "How they compare, and how they were checked, is in [methods.md](methods.md).",
        method_sections(evictors),
        "## Head splits",
        "`head_split: NAME`, written like an evictor. Without one the heads get what `slots` says, evenly or per head.",
        method_sections(head_splits),
        "## Mergers",
        "`merger: NAME`.",
        method_sections(mergers),
        "## Channel selectors",
        "`channels: NAME`.",
        method_sections(channel_selectors),
        "## Codecs",
        "`codec: NAME` for keys and values, or `codec: {keys: NAME, values: NAME}`, each with parameters like an "
        "evictor; what is left out is `dense`.",
        method_sections(codecs),
        "## What cannot run together",
        "Everything else can, as long as numbers fit (see the rules above). The order inside a layer is: share, evict "
        "and merge, prune channels, encode.",
        rules_table(RULES),
        "With `prefill: {chunk_tokens: N}` also not:",
        rules_table(CHUNK_RULES),
    ]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------ commands


def commands(command: Any, path: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    """(command line, help text) of a command and all below it."""
    # Without rich's boxes help is the same text on every terminal.
    command.rich_markup_mode = None
    widths = {"terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    context = command.context_class(
        command, info_name=path.split()[-1], parent=parent, **command.context_settings, **widths
    )
    for param in command.params:
        # What completion options say depends on the shell.
        param.hidden = getattr(param, "hidden", False) or param.name in ("install_completion", "show_completion")
    with context:
        text = command.get_help(context)
    yield path, "\n".join(line.rstrip() for line in text.splitlines()).strip()
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        yield from commands(sub, f"{path} {name}", context)


def cli_page() -> str:
    import typer

    from kvplan.cli import exits
    from kvplan.cli.app import app

    codes = " ".join((exits.__doc__ or "").split("\n\n", 1)[1].split())
    parts = [
        "# Commands",
        NOTE,
        "Data goes to stdout, talk and progress to stderr. `--debug` and `--quiet` are accepted before the command and "
        f"after it. Exit codes: {codes}",
    ]
    for path, text in commands(typer.main.get_command(app), "kvplan"):
        parts += [f"{'#' * min(len(path.split()) + 1, 3)} {path}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


PAGES = {"policy.md": policy_page, "cli.md": cli_page}


def stale() -> list[str]:
    """Names of the generated files that are not what the code would write now."""
    found = []
    for name, page in PAGES.items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != page():
            found.append(name)
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        found = stale()
        for name in found:
            print(f"docs/{name} is stale; run: python docs/generate.py")
        return int(bool(found))
    if arguments:
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
