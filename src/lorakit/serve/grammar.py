"""Answers that keep to a grammar: JSON of a schema, a regular expression, one of several texts, or rules.

The library llguidance says after every token which tokens may follow. It names what it cannot enforce, so that no schema is
followed in part. Rows without a grammar are not touched.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lorakit.errors import first_line
from lorakit.serve.request import Refused

LONGEST = 1 << 16
"""Characters of a schema or grammar at most."""

KEPT = 64
"""Grammars that are kept compiled."""

SPACES = r"[ \n]{0,16}"
"""Between the parts of JSON: without a bound, a model could go on with spaces for ever."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must keep to.

    Attributes:
        kind: "json" for a JSON schema, "regex", "choice" for a JSON list of texts, "rules" for llama.cpp's GBNF or Lark.
        text: the schema and so on.
        param: what named it in the request, for messages.
    """

    kind: Literal["json", "regex", "choice", "rules"]
    text: str
    param: str


class Constraint:
    """The state of one answer; `copy` begins another of the same grammar."""

    def __init__(self, matcher: Any, width: int) -> None:
        self.matcher, self.width = matcher, width

    def copy(self) -> Constraint:
        """The same at its present state, to go on by itself."""
        return Constraint(self.matcher.deep_copy(), self.width)

    def allowed(self, width: int, ends: frozenset[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may follow, (width,): none outside of the vocabulary, and those that end an answer where it may end."""
        bits = np.zeros(-(-self.width // 32), dtype=np.int32)
        self.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        found = np.zeros(width, dtype=np.bool_)
        known = min(self.width, width)
        found[:known] = np.unpackbits(bits.view(np.uint8), bitorder="little", count=known)
        found[[end for end in ends if end < width]] = bool(self.matcher.is_accepting())
        return found

    def accept(self, token: int) -> None:
        """A token that was chosen."""
        self.matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self.matcher.is_stopped())

    @property
    def problem(self) -> str:
        """What went wrong with it, or ""."""
        return str(self.matcher.get_error()) if self.matcher.is_error() else ""


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last of them. Calls from several threads wait for each other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._kept: OrderedDict[Grammar, Constraint] = OrderedDict()
        self._lock = threading.Lock()
        self._words: Any = None

    def find(self, grammar: Grammar) -> Constraint:
        """A grammar at its beginning.

        Raises:
            Refused: it is too long, or llguidance cannot enforce it; or the library, or a fast tokenizer, is not there.
        """
        if len(grammar.text) > LONGEST:
            raise Refused(
                f"{grammar.param} has {len(grammar.text):,} characters; {LONGEST:,} are the most.", grammar.param
            )
        with self._lock:
            found = self._kept.get(grammar)
            if found is None:
                found = self._kept[grammar] = self._compiled(grammar)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return found.copy()

    def _compiled(self, grammar: Grammar) -> Constraint:
        try:
            library: Any = importlib.import_module("llguidance")
        except ImportError:
            raise Refused(
                f"{grammar.param} needs the package llguidance on the server: pip install llguidance.", grammar.param
            ) from None
        if self._words is None:
            try:
                self._words = importlib.import_module("llguidance.hf").from_tokenizer(self.tokenizer)
            except Exception as problem:  # of a tokenizer that is not fast, or that the library does not read
                raise Refused(
                    f"{grammar.param} is not supported with this model's tokenizer ({type(self.tokenizer).__name__}).",
                    grammar.param,
                ) from problem
        try:
            made = library.LLMatcher(self._words, self._source(library.LLMatcher, grammar))
        except Exception as problem:  # what the library raises on texts that it cannot parse has no common class
            raise Refused(f"{grammar.param} cannot be enforced: {first_line(problem)}", grammar.param) from None
        if made.is_error():
            raise Refused(f"{grammar.param} cannot be enforced: {made.get_error().splitlines()[0]}", grammar.param)
        return Constraint(made, self._words.vocab_size)

    def _source(self, matcher: Any, grammar: Grammar) -> str:
        match grammar.kind:
            case "json":
                strict = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": SPACES}
                return str(matcher.grammar_from_json_schema(grammar.text, overrides=strict))
            case "regex":
                return str(matcher.grammar_from_regex(grammar.text))
            case "choice":
                texts: Sequence[str] = json.loads(grammar.text)
                return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts)))
        rules = grammar.text
        if "::=" in rules:
            rules = importlib.import_module("llguidance.gbnf_to_lark").gbnf_to_lark(rules)
        return str(matcher.grammar_from_lark(rules))
