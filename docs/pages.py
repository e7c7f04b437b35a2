"""Fill the generated parts of the pages: the trees, the method table, benchmark figures. Run by `make docs`.

A generated part stands between `<!-- NAME -->` and `<!-- end -->`. `python docs/pages.py --check` says which pages are out
of date and fails; a test calls the same, so that a page cannot drift from what it describes.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/files.md",
    "docs/methods.md",
    "docs/benchmarks.md",
    "docs/composition.md",
    "docs/interchange.md",
)
FOLDERS = {
    "benchmarks": "one command each: measured side by side with the peers",
    "docs": "how it is built, every method, what was measured",
    "examples": "one YAML and one page per recipe",
    "src/lorakit": "the library",
    "src/lorakit/core": "what an adapted layer is",
    "src/lorakit/core/storage": "how frozen numbers are held, one file per library",
    "src/lorakit/methods": "one file per weight delta",
    "src/lorakit/init": "how a delta starts",
    "src/lorakit/edits": "what cannot be merged, and where it meets a model",
    "src/lorakit/models": "base models: loading, hub, GGUF, quantisation",
    "src/lorakit/adapter": "an adapter on a model: targets, construction, attachment",
    "src/lorakit/experts": "mixtures and routers",
    "src/lorakit/optim": "optimisers, by role",
    "src/lorakit/insight": "what training takes, and what each method costs",
    "src/lorakit/files": "an adapter as a folder in PEFT's format",
    "src/lorakit/algebra": "arithmetic on what adapters add, once over ΔW",
    "src/lorakit/conversion": "from and to other tools' formats, one file each",
    "src/lorakit/train": "a run: trainer, evaluation, report",
    "src/lorakit/train/config": "the YAML file of a run and its flags",
    "src/lorakit/train/data": "rows, formats, templates, tokens and labels",
    "src/lorakit/train/step": "the training step without padding",
    "src/lorakit/train/schedules": "what training does besides optimiser steps",
    "src/lorakit/serve": "many adapters on one base",
    "src/lorakit/serve/engine": "continuous batching",
    "src/lorakit/serve/model": "the base with paged attention and many adapters",
    "src/lorakit/serve/http": "OpenAI's API, keys, quotas, metrics",
    "src/lorakit/serve/remote": "vLLM and replicas behind the same API",
    "src/lorakit/native": "what compiles, keeps and calls inner loops in C++",
    "src/lorakit/peft": "PEFT's names over ours",
    "src/lorakit/cli": "one file per verb",
    "tests": "laws, formulas, PEFT as oracle, format, faults, training",
}


def _files() -> list[str]:
    """Every file of the project that git would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file())


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring, of a package's, or of what a C++ file begins with."""
    text = path.read_text()
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = itertools.takewhile(lambda line: line.startswith("//"), text.splitlines())
        docstring = "\n".join(line.removeprefix("//").strip() for line in lines)
    return re.split(r"\.\s", docstring.strip().split("\n\n")[0].replace("\n", " ") + " ")[0].rstrip(".: ")


def tree(whole: bool = True) -> str:
    """The source tree, a line per module, each with its docstring's first sentence.

    Without `whole`, of packages and of all outside the library only the folder, with how many modules it has.
    """
    # packages of the library before its own modules
    files = sorted(map(Path, _files()), key=lambda path: (path.parts[0], path.parent == Path("src/lorakit"), path))
    modules = [path for path in files if path.suffix in (".py", ".cpp", ".h") and path.name != "__init__.py"]
    lines: list[str] = []
    shown: set[str] = set()

    def folder(name: str) -> bool:
        """The line of a folder, once; returns whether what is in it is listed."""
        listed = whole or name in ("src", "src/lorakit")
        if name not in shown and name != "src":
            shown.add(name)
            count = sum(name in map(str, path.parents) for path in modules)
            counted = "" if listed or count < 2 else f" ({count} files)"
            depth = name.removeprefix("src/").count("/")
            label = name.rpartition("/")[2] if depth else name
            lines.append(f"{'  ' * depth}{label}/".ljust(26) + FOLDERS.get(name, "") + counted)
        return listed

    for path in files:
        top = path.parts[0]
        if top == "tests" and len(path.parts) > 1:
            listed, kind = folder("tests"), "/".join(path.parts[:2])
            if listed and len(path.parts) > 2 and kind not in shown:
                shown.add(kind)
                lines.append(f"  {path.parts[1]}/")
        elif path in modules and top in ("src", "benchmarks", "docs", "examples"):
            parents = [str(parent) for parent in reversed(path.parents) if str(parent) != "."]
            if all(folder(parent) for parent in parents):
                depth = len([parent for parent in parents if parent != "src"])
                lines.append(f"{'  ' * depth}{path.name}".ljust(26) + _summary(ROOT / path))
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def methods() -> str:
    """The method table, from the method cards, for a 576 → 1536 layer at the methods' own defaults."""
    from lorakit.core.delta import Shape
    from lorakit.insight.catalogue import catalogue

    rows = [
        "| name | method | formula | numbers for 576 → 1536 | served together | PEFT | paper | when |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in catalogue([Shape(1536, 576)]):
        count = f"{entry.parameters:,}" if entry.parameters is not None else "does not fit"
        limits = f" {entry.limits}" if entry.limits else ""
        cells = (
            f"`{entry.name}`",
            entry.title,
            entry.formula.replace("|", "\\|"),
            count,
            "yes" if entry.form else "no",
            _peft_name(entry.name),
            entry.paper,
            entry.use + limits,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _peft_name(method: str) -> str:
    from lorakit.files.formats import format_of

    name = format_of(method).peft
    return f"`{name}`" if name else "-"


def formats() -> str:
    """The table of other tools' formats, from the table in `lorakit.conversion`."""
    from lorakit.conversion import FORMATS

    rows = ["| `--to` | read by | on disk | methods | scale | limits |", "|---|---|---|---|---|---|"]
    for name, entry in FORMATS.items():
        cells = (f"`{name}`", entry.title, entry.file, ", ".join(entry.holds), entry.scale, entry.limits)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def edits() -> str:
    """The table of edits, from their cards, for SmolLM2-135M at their own defaults."""
    from lorakit.insight.catalogue import edits_catalogue

    rows = [
        "| name | edit | formula | numbers for SmolLM2-135M | starts as the base | in flat rows | PEFT | paper | when |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in edits_catalogue():
        cells = (
            f"`{entry.name}`",
            entry.title,
            entry.formula.replace("|", "\\|"),
            f"{entry.parameters:,}" if entry.parameters is not None else "does not fit",
            "yes" if entry.identity else "no",
            "yes" if entry.flat else "no",
            _peft_name(entry.name),
            entry.paper,
            entry.use + (f" {entry.limits}" if entry.limits else ""),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def results(name: str) -> str:
    """The table that a benchmark wrote into benchmarks/results/NAME.json, under "markdown"."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `make bench-{name}`."
    record: dict[str, Any] = json.loads(path.read_text())
    return str(record["markdown"]).strip()


def parts() -> dict[str, Callable[[], str]]:
    """Marker -> what stands under it."""
    named: dict[str, Callable[[], str]] = {
        "tree": tree,
        "map": lambda: tree(whole=False),
        "methods": methods,
        "formats": formats,
        "edits": edits,
    }
    for page in PAGES:
        if (ROOT / page).is_file():
            for marker in re.findall(r"<!-- bench (\w[\w-]*) -->", (ROOT / page).read_text()):
                named[f"bench {marker}"] = lambda marker=marker: results(marker)  # type: ignore[misc]
    return named


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    for marker, make in parts().items():
        pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            content = make()
            text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check only say which would change."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.is_file():
            continue
        fresh = render(path.read_text())
        if fresh != path.read_text():
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(fresh)
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
