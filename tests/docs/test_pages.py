"""The pages say what is so: generated parts are current, links lead somewhere, files and options that they name are there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.conftest import ROOT, blocks, named, pages, sources

PAGES = pages()
SOURCES = [path for path in sources() if "<!-- include" not in path.read_text()]


def test_generated_parts_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/pages.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_counts_may_be_a_little_old() -> None:
    assert PAGES.same("| core | 18 | 4,000 |", "| core | 18 | 3,900 |")
    assert not PAGES.same("| core | 18 | 4,000 |", "| core | 18 | 3,000 |")
    assert not PAGES.same("| core | 18 |", "| cores | 18 |")


def anchors(path: Path) -> set[str]:
    """The ids of a page's headings, as the site gives them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", PAGES.render(path.read_text()), re.MULTILINE):
        own = re.search(r"\{ #(\S+) \}", heading)
        found.add(own[1] if own else re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES.render(path.read_text()), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = path.parent / target if target else path
        assert there.exists(), f"{named(path)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(there), f"{named(path)} links to {target}#{anchor}; the page has no such heading"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


INTERNALS = [
    path for path in SOURCES if path.parent.name == "internals" or path.name in ("CONTRIBUTING.md", "README.md")
]


@pytest.mark.parametrize("path", INTERNALS, ids=named)
def test_files_and_names_of_the_code_are_there(path: Path) -> None:
    """`core/state.py`, `use`: the file is in the package, and defines that name."""
    text = path.read_text()
    for file, name in re.findall(r"`([\w./]+\.(?:py|cpp|h|pyi)|[\w/]+/)`(?:, `([\w.]+)`)?", text):
        if "NAME" in file:
            file, name = str(Path(file).parent), ""
        found = [home / file for home in (ROOT, ROOT / "src" / "lorakit") if (home / file).exists()]
        assert found or file in ("site/", "checkpoints/"), f"{named(path)} names {file}, which is not there"
        if name and found[0].is_file():
            defined = re.findall(r"^ *(?:def|class) (\w+)", found[0].read_text(), re.MULTILINE)
            assert name.rpartition(".")[2] in defined, f"{named(path)}: {file} defines no {name}"


def test_every_row_format_is_shown_and_recognised() -> None:
    from lorakit.train.data.formats import as_known, detect_format

    text = (ROOT / "docs" / "data.md").read_text()
    shown = text[text.index("## Row formats") : text.index("## Templates")]
    found = {}
    for heading, row in re.findall(r"^### (.*?)\n.*?^```json\n(.*?)^```", shown, re.DOTALL | re.MULTILINE):
        columns = list(as_known(json.loads(row)))
        found[heading] = "classification" if columns == ["text", "label"] else detect_format(columns)
    assert found == {
        "Prompt and completion": "prompt-completion",
        "Messages": "messages",
        "ShareGPT": "messages",
        "Alpaca": "prompt-completion",
        "Text": "text",
        "Tokens": "tokens",
        "Text and label": "classification",
    }


def test_defaults_and_names_of_options_are_right() -> None:
    """Every `data.x`, `train.x`, `evaluate.x` that a page names is an option; a table with defaults has the right ones."""
    from lorakit.train.config.run import config_fields

    options = {option.name: option for option in config_fields()}
    for path in SOURCES:
        for name in re.findall(
            r"`((?:data|train|evaluate)\.(?!py\b|jsonl\b|yaml\b)[a-z_]+)(?:: [^`]*)?`", path.read_text()
        ):
            assert name in options, f"{named(path)} names the option {name}"
    rows = re.findall(r"^\| `(data\.\w+)` \| `?([\w.]+)`? \|", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for name, default in rows:
        assert default == (options[name].default_text if default != "all" else "all"), name


def test_yaml_of_the_pages_is_a_run(tmp_path: Path) -> None:
    """Each block is a run, or becomes one with a model and rows."""
    from lorakit.train.config.run import load_config

    for path in SOURCES:
        for block in blocks(path, "yaml"):
            run = yaml.safe_load(block.text)
            run = {"model": "m", **run, "data": {"train": "rows.jsonl", **run.get("data", {})}}
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
            load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("length", "passes"), [(72, True), (73, False)])
def test_the_hook_measures_a_commits_subject(tmp_path: Path, length: int, passes: bool) -> None:
    import shlex

    (hooks,) = [repo["hooks"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]]
    (entry,) = [hook["entry"] for hook in hooks if "commit-msg" in hook.get("stages", ())]
    message = tmp_path / "message"
    message.write_text("x" * length + "\n\n" + "y" * 200 + "\n")
    done = subprocess.run([*shlex.split(entry), str(message)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is passes
    assert passes or "73 characters, at most 72" in done.stdout


@pytest.mark.slow
def test_the_site_is_built_and_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    html = list(tmp_path.rglob("*.html"))
    assert len(html) > 25
    for page in html:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=\"?https?://", tag), f"{page}: {tag}"
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())
    text = " ".join(entry["text"] for entry in found["docs"])
    for word in ("gradient checkpointing", "packed", "quantised", "resume", "rank_pattern"):
        assert word in text, f"nobody who searches for {word} finds anything"
