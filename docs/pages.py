"""Fill the generated parts of the pages: methods, formats, options, commands, the Python reference, rooms, files, figures.

A generated part stands between `<!-- NAME -->` and `<!-- end -->`; a name may have arguments ("bench train"). The pages of
`PAGES` are kept filled in the repository, where people read them too: `python docs/pages.py` fills them, `--check` says which
are out of date and fails. Every other page is filled when the site is built: mkdocs.yml names this file as a hook.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lorakit"
PAGES = ("methods", "quality", "benchmarks", "composition", "interchange", "files", "internals/architecture")
"""The pages that are kept filled in the repository."""

ROOMS = {
    "errors": "the one error that users see",
    "reading": "files that others wrote, read whole or refused in words",
    "native": "compiles and calls loops in C++, shared by training and serving",
    "core": "what an adapted layer is: contract of a method, layer, routing, the model's adapter state",
    "core/storage": "how frozen weights are read and written, one file per library",
    "methods": "one file per weight delta",
    "init": "how a delta starts",
    "edits": "what cannot be merged: prompts, prefixes, bottlenecks; and the hooks they need",
    "models": "base models: loading, hub, GGUF, quantisation",
    "adapter": "an adapter on a model: targets, construction, attachment",
    "experts": "routers and mixtures",
    "insight": "what training takes, and what each method costs",
    "optim": "optimisers, by the role of each parameter",
    "files": "an adapter as a folder in PEFT's format",
    "algebra": "arithmetic on what adapters add, once over ΔW",
    "conversion": "other tools' formats, one file each",
    "train": "a run: trainer, evaluation, report",
    "train/config": "the YAML file of a run and its flags",
    "train/data": "rows, formats, templates, tokens and labels",
    "train/step": "one training step without padding",
    "train/schedules": "what training does besides optimiser steps",
    "peft": "PEFT's names over ours",
    "serve": "many adapters on one base: the contract of a request",
    "serve/engine": "continuous batching",
    "serve/model": "the base with paged attention and many adapters",
    "serve/http": "OpenAI's API, keys, quotas, metrics",
    "serve/remote": "vLLM and replicas behind the same API",
    "cli": "one file per verb",
}
OTHERS = {
    "benchmarks": "one command each, side by side with the peers",
    "docs": "the pages, and what fills them",
    "examples": "one YAML and one page per recipe",
}
BUDGETS = {
    "heart": (("core", "methods", "init", "adapter", "files"), 9_000),
    "algebra and conversion": (("algebra", "conversion"), 5_000),
    "experts and edits": (("experts", "edits"), 3_000),
    "models and train": (("models", "train"), 8_000),
    "serve": (("serve",), 5_500),
    "cli": (("cli",), 1_700),
    "the rest": ((), 1_500),
}
"""Lines of Python that a group of rooms may have, comments and blanks counted. What is in no other group is in "the rest"."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. What Markdown would read in a cell outside of code (bars, braces) is escaped."""
    lines = [[_escaped(" ".join(cell.split())) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    cell = re.sub(r"(`[^`]*`)|\{", lambda match: match[1] or "&#123;", cell)
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


# -- methods, edits, routers, starts -----------------------------------------------------------------------------------------


def _link(name: str) -> str:
    return f"[`{name}`](reference/methods.md#{name})"


def _use(entry: Any) -> str:
    return f"{entry.use} Limits: {entry.limits.rstrip('.')}." if entry.limits else str(entry.use)


def _peft_name(entry: Any) -> str:
    """What PEFT calls a method or edit."""
    from lorakit.files.formats import format_of

    name = format_of(entry.name).peft
    return f"`{name}`" if name else "-"


def _count(entry: Any) -> str:
    return f"{entry.parameters:,}" if entry.parameters is not None else "does not fit"


def methods() -> str:
    """The method table, from the method cards, for a 576 → 1536 layer at the methods' own defaults."""
    from lorakit.core.delta import Shape
    from lorakit.insight.catalogue import catalogue

    return table(
        ("name", "formula", "parameters", "batched in serving", "PEFT's name", "when"),
        (
            (
                _link(one.name),
                one.formula,
                _count(one),
                "yes" if one.form else "no",
                _peft_name(one),
                _use(one),
            )
            for one in catalogue([Shape(1536, 576)])
        ),
    )


def edits() -> str:
    """The table of edits, from their cards, for SmolLM2-135M at their own defaults."""
    from lorakit.insight.catalogue import edits_catalogue

    return table(
        ("name", "formula", "parameters", "starts as the base", "padding-free training", "PEFT's name", "when"),
        (
            (
                _link(one.name),
                one.formula,
                _count(one),
                "yes" if one.identity else "no",
                "yes" if one.flat else "no",
                _peft_name(one),
                _use(one),
            )
            for one in edits_catalogue()
        ),
    )


def unsupported() -> str:
    """PEFT's types that lorakit refuses, and why."""
    from lorakit.files.formats import UNSUPPORTED

    return table(("PEFT type", "not supported because"), ((f"`{name}`", why) for name, why in UNSUPPORTED.items()))


def _literal(value: Any) -> str:
    """A default as code; a spec by its name."""
    from lorakit.core.delta import Spec

    if value is dataclasses.MISSING:
        return "required"
    return f"`{value.name if isinstance(value, Spec) else value}`"


def options_table(spec: type) -> str:
    """Every option of a spec: type and range, default, PEFT's name, per-layer pattern, one line."""
    from lorakit.core.options import options_of

    rows = []
    for one in options_of(spec).values():
        names = [f"`{name}`" for name in (one.option.peft, one.option.pattern) if name]
        rows.append((f"`{one.name}`", one.words, _literal(one.default), ", ".join(names) or "-", one.option.doc))
    return table(("option", "type", "default", "PEFT's names", ""), rows) if rows else "It has no options."


def specs(kind: str) -> str:
    """A section per method, edit or router: its card and its options."""
    from lorakit.edits import EDITS
    from lorakit.experts import MIXTURES, ROUTERS
    from lorakit.init import INITIALISERS
    from lorakit.methods import METHODS, WHOLE

    tables: dict[str, dict[str, type]] = {
        "methods": {**METHODS, **WHOLE, **MIXTURES},
        "edits": dict(EDITS),
        "routers": dict(ROUTERS),
        "init": dict(INITIALISERS),
    }
    lines = []
    for name, spec in tables[kind].items():
        card = getattr(spec, "card", None)
        lines.append(f"### {name} {{ #{'init-' if kind == 'init' else ''}{name} }}\n")
        title = (
            f"**{card.title}**, `{card.formula}` ({card.paper}). {_use(card)}" if card else _first(spec.__doc__ or "")
        )
        lines += [
            f"`lk.{spec.__name__}`: {title}\n" if spec.__name__ in _public() else f"{title}\n",
            options_table(spec),
            "",
        ]
    return "\n".join(lines)


def formats() -> str:
    """The table of other tools' formats, from the table in `lorakit.conversion`."""
    from lorakit.conversion import FORMATS

    return table(
        ("`--to`", "read by", "on disk", "methods", "scale", "limits"),
        (
            (f"`{name}`", one.title, one.file, ", ".join(one.holds), one.scale, one.limits)
            for name, one in FORMATS.items()
        ),
    )


def recipes() -> str:
    """What `combine` can do."""
    from lorakit.algebra.combining import RECIPES

    return table(("`--how`", "gives"), ((f"`{name}`", recipe.text) for name, recipe in RECIPES.items()))


# -- options of a run, the command line --------------------------------------------------------------------------------------


def options() -> str:
    """The options of a run under the headings of `lorakit train --help`."""
    from lorakit.train.config.fields import run_fields

    groups: dict[str, list[tuple[str, ...]]] = {}
    for one in run_fields():
        default = "required" if one.is_required else f"`{one.default_text}`"
        groups.setdefault(one.heading, []).append((f"`{one.name}`", one.kind, default, one.doc))
    head = ("option", "type", "default", "")
    return "\n\n".join(f"## {heading}\n\n{table(head, rows)}" for heading, rows in groups.items())


def commands() -> str:
    """Every verb of the command line with its arguments and flags."""
    import typer

    from lorakit.cli import app

    group: Any = typer.main.get_command(app)
    lines = []
    for name, verb in group.commands.items():
        lines += [
            f"## lorakit {name} {{ #{name} }}\n",
            (verb.help or "").strip().replace("[", "\\[") + "\n",
        ]
        if name == "train":
            lines.append("The flags are the [options of a run](options.md): `--train.max-steps 20`, `--rank=8`.\n")
            continue
        rows = []
        for one in verb.params:
            if one.param_type_name == "argument":
                rows.append(
                    (f"`{one.name.upper()}`", "required" if one.required else "", getattr(one, "help", "") or "")
                )
            elif one.name != "help":
                default = "required" if one.required else _shown(one)
                rows.append(
                    (", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts)), default, one.help or "")
                )
        lines += [table(("", "default", ""), rows), ""]
    return "\n".join(lines)


def _shown(parameter: Any) -> str:
    """The default of a flag; empty where there is none."""
    default = parameter.default
    if default is None or default is False or default in ("", [], ()) or callable(default):
        return ""
    return parameter.opts[0].join("``") if default is True else f"`{default}`"


# -- the Python reference ----------------------------------------------------------------------------------------------------


def _public() -> dict[str, str]:
    """Public name -> its full path, from lorakit/__init__.pyi."""
    text = (PACKAGE / "__init__.pyi").read_text()
    return {name: f"{home}.{name}" for home, name in re.findall(r"^from (\S+) import (\w+) as", text, re.MULTILINE)}


def api(*rooms: str) -> str:
    """The public names that are written in these rooms, in the order of the list of them."""
    found = [
        path for path in _public().values() if path.split(".")[1] in rooms and not path.rpartition(".")[2].isupper()
    ]
    return "\n\n".join(f"::: {path}" for path in found)


# -- rooms and files ---------------------------------------------------------------------------------------------------------


def _tracked() -> list[Path]:
    """Every file of the project that git would keep."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(ROOT / name for name in listed.split("\n") if name and (ROOT / name).is_file())


def _first(text: str) -> str:
    """The first sentence of a docstring."""
    return re.split(r"\.\s", text.strip().split("\n\n")[0].replace("\n", " ") + " ")[0].rstrip(".: ")


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring, or of the comment that a C++ file begins with."""
    text = path.read_text()
    if path.suffix == ".py":
        return _first(ast.get_docstring(ast.parse(text)) or "")
    lines = itertools.takewhile(lambda line: line.startswith("//"), text.splitlines())
    return _first("\n".join(line.removeprefix("//").strip() for line in lines))


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _room(path: Path) -> str:
    """The room of a file of the library: its folder, or its own name at the top of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms() -> str:
    """The rooms floor by floor, from the ground up, as the test of import direction has them."""
    test = ast.parse((ROOT / "tests" / "architecture" / "test_imports.py").read_text())
    floors: Sequence[str] = next(
        ast.literal_eval(node.value)
        for node in test.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FLOORS" and node.value
    )
    rows = ((str(floor), f"`{room}`", ROOMS.get(room, "")) for floor, own in enumerate(floors) for room in own.split())
    return table(("floor", "room", "what is in it"), rows)


def budgets() -> str:
    """Lines of Python per group of rooms, beside what they may have."""
    files = [path for path in _tracked() if path.suffix == ".py" and PACKAGE in path.parents]
    named = {room for group, _ in BUDGETS.values() for room in group}
    rows = []
    for name, (group, allowed) in BUDGETS.items():
        own = [path for path in files if (_room(path) in group if group else _room(path) not in named)]
        lines = sum(map(_lines, own))
        over = f"{lines - allowed:,} over" if lines > allowed else "within"
        rows.append((name, ", ".join(f"`{room}`" for room in group), f"{lines:,}", f"{allowed:,}", over))
    total = sum(map(_lines, files))
    rows.append(("all", "", f"{total:,}", f"{sum(allowed for _, allowed in BUDGETS.values()):,}", ""))
    return table(("group", "rooms", "lines of Python", "budget", ""), rows)


def files() -> str:
    """Every file, a line each, from its own docstring; a table for each folder."""
    found = [path for path in _tracked() if path.suffix in (".py", ".cpp", ".h") and path.name != "__init__.py"]
    parts = []
    folders = {str(path.parent.relative_to(PACKAGE)) for path in found if PACKAGE in path.parents} - {"."}
    order = list(dict.fromkeys(room.partition("/")[0] for room in [*ROOMS, *sorted(folders)]))
    for room in sorted({*ROOMS, *folders}, key=lambda room: (order.index(room.partition("/")[0]), room)):
        home = PACKAGE / room
        own = {path.name: path for path in found if path.parent == home or path == home.with_suffix(".py")}
        what = ROOMS.get(room) or _summary(home / "__init__.py")
        parts.append(f"## {room}\n\n{_listed(what, own)}")
    for folder, what in OTHERS.items():
        home = ROOT / folder
        parts.append(
            f"## {folder}\n\n{_listed(what, {str(path.relative_to(home)): path for path in found if home in path.parents})}"
        )
    return "\n\n".join(parts)


def _listed(what: str, own: dict[str, Path]) -> str:
    """What a folder is for, and a line for each of its files."""
    rows = ((f"`{name}`", _summary(path)) for name, path in own.items())
    lines = sum(_lines(path) for path in own.values() if path.suffix == ".py")
    return f"{what[0].upper()}{what[1:]}. {lines:,} lines of Python.\n\n{table(('file', ''), rows)}"


# -- figures -----------------------------------------------------------------------------------------------------------------


def bench(name: str) -> str:
    """The table that a benchmark wrote into benchmarks/results/NAME.json, under "markdown"."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `make bench-{name}`."
    record: dict[str, Any] = json.loads(path.read_text())
    return str(record["markdown"]).strip()


def include(path: str) -> str:
    """A page that stands outside of docs/, on a page one folder below docs/: its links lead to the same places from there."""
    text = (ROOT / path).read_text()
    return re.sub(r"\]\((?:\.\./)?docs/", "](../", text).replace("](CHANGELOG.md)", "](changelog.md)")


# -- filling -----------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part
    for part in (
        methods,
        edits,
        unsupported,
        specs,
        formats,
        recipes,
        options,
        commands,
        api,
        rooms,
        budgets,
        files,
        bench,
        include,
    )
}
_PART = re.compile(r"(<!-- (\w+)([\w ./-]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """A page with its generated parts made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}{PARTS[match[2]](*match[3].split())}\n{match[5]}"

    return _PART.sub(made, text)


def same(fresh: str, kept: str) -> bool:
    """Whether a page is up to date. Counts of lines and files change with every commit: a tenth more or less is let pass."""
    number = re.compile(r"\d[\d,]*")
    if number.sub("0", fresh) != number.sub("0", kept):
        return False
    pairs = zip(number.findall(fresh), number.findall(kept), strict=True)
    return all(
        abs(int(a.replace(",", "")) - int(b.replace(",", ""))) <= 0.1 * int(b.replace(",", "")) for a, b in pairs
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page before it becomes HTML."""
    return render(markdown)


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check only say which would change."""
    stale = []
    for page in PAGES:
        path = ROOT / "docs" / f"{page}.md"
        kept = path.read_text()
        fresh = render(kept)
        if not (same(fresh, kept) if page == "files" else fresh == kept):
            stale.append(f"docs/{page}.md")
        if "--check" not in arguments:
            path.write_text(fresh)
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
