"""The YAML document of a run: read with the line of every key, written with the documentation as comments.

PyYAML reads YAML 1.1, in which `1e-4` is text, `off` is false, `010` is eight, and the second of two equal
keys wins in silence. `Loader` reads scalars as YAML 1.2's core schema does and refuses equal keys. `dump`
quotes whatever either version would read as something else than text, so that a stored file means the same to
every reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from lorakit.errors import LorakitError

_BLOCK = re.compile(r"\S[^\n]*\n(.*\S\n?)?", re.DOTALL)
"""Text that a YAML block holds without markers for leading space and trailing line breaks; other text is quoted."""

_BREAKS = re.compile("[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""Characters besides the line feed that YAML or Python may take for the end of a line."""

_SCALARS = [  # the order matters: an integer is also a float's spelling
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers and words."""


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; text that looks like a value in YAML 1.1 or 1.2 is quoted, long text is a block."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes equal objects out in full: anchors help no reader of a configuration."""
        return True


# Own tables, or what is added would change PyYAML for the whole process.
Loader.yaml_implicit_resolvers = {}
Dumper.yaml_implicit_resolvers = {key: [*rows] for key, rows in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern, _first in _SCALARS:
    _expression = re.compile(rf"^(?:{_pattern})$")
    Loader.add_implicit_resolver(_tag, _expression, _first)
    Dumper.add_implicit_resolver(_tag, _expression, _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if _BLOCK.fullmatch(text) else None
    if _BREAKS.search(text):
        style = '"'  # the only style that escapes them
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)


def parse_value(text: str) -> Any:
    """One value as YAML writes it (`[a, b]`, `{q_proj: 4}`, `1e-4`); text that is no YAML stays text."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return str(text)


def parse_document(text: str, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping of a YAML document and the place of every key in it.

    Args:
        text: the document.
        source: its name for messages.

    Returns:
        The mapping (empty for an empty document), and dotted name -> "source, line 3".

    Raises:
        LorakitError: the text is no YAML, not a mapping, or gives a key twice.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        places = {"": source}
        if node is not None:
            if not isinstance(node, yaml.MappingNode):
                line = node.start_mark.line + 1
                found = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
                raise LorakitError(f"{source}, line {line}: expected options such as `model: NAME`, found {found}")
            _collect(node, "", source, places, set())
        tree = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line_text = f", line {mark.line + 1}" if mark else ""
        raise LorakitError(f"{source}{line_text}: this is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise LorakitError(f"{source}: this is not YAML: {error}") from None
    finally:
        loader.dispose()
    return tree, places


def _collect(node: yaml.Node, prefix: str, source: str, places: dict[str, str], seen: set[int]) -> None:
    """Notes the line of every key below `node` and refuses keys given twice."""
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise LorakitError(f"{source}, line {line}: expected the name of an option, found a list or mapping")
        name = f"{prefix}.{key.value}" if prefix else key.value
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in lines:
            first = lines[key.value]
            raise LorakitError(f'{source}, line {line}: "{name}" is given twice (first in line {first}); keep one')
        if key.tag != "tag:yaml.org,2002:str":
            raise LorakitError(f'{source}, line {line}: the name "{name}" must be text; put it in quotes')
        lines[key.value] = line
        places[name] = f"{source}, line {line}"
        _collect(value, name, source, places, seen)


def dump(value: Mapping[str, Any]) -> str:
    """A mapping as YAML: text with line breaks as a block, everything else on the line of its name."""
    lines = []
    for key, item in value.items():
        if isinstance(item, str) and _BLOCK.fullmatch(item):
            lines.append(yaml.dump({key: item}, Dumper=Dumper, allow_unicode=True, width=2**30))
        else:
            lines.append(f"{_inline(key)}: {_inline(item)}\n")
    return "".join(lines)


def _inline(item: Any) -> str:
    text: str = yaml.dump(
        [item], Dumper=Dumper, allow_unicode=True, default_flow_style=True, width=2**30, sort_keys=False
    )
    return text.strip()[1:-1]
