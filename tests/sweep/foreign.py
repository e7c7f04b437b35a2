"""Run files of Axolotl and LLaMA-Factory, as their repositories have them, through `lorakit init --from`: what converts whole,
what is refused, and which keys are left out. `make sweep-foreign FILES=FOLDER`, a checkout of their examples (never committed).

Ends with status 1 where a file raises anything but lorakit's own error.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.train.config.document import parse_document
from lorakit.train.config.foreign import converted, program_of
from lorakit.train.config.run import from_tree


def tried(path: Path, left: Counter[str]) -> str:
    """What becomes of one file, in words."""
    try:
        if program_of(parse_document(path.read_text(), str(path))[0]) is None:
            return "of no known program"
        program, tree, out = converted(path)
        left.update(line.partition(":")[0] for line in out)
        from_tree(tree, str(path))
    except LorakitError as refusal:
        return f"refused: {str(refusal).replace(str(path), 'FILE').partition(':')[0]}"
    except Exception as problem:
        return f"CRASH: {type(problem).__name__}: {problem} ({path})"
    return f"a run, from {program}"


def main(folder: str) -> int:
    """Try every YAML file below a folder, and print the counts."""
    left: Counter[str] = Counter()
    found = Counter(tried(path, left) for path in sorted(Path(folder).rglob("*.y*ml")))
    for words, count in found.most_common():
        print(f"{count:5}  {words}")
    print("left out:", ", ".join(f"{key} {count}" for key, count in left.most_common(40)))
    return int(any(words.startswith("CRASH") for words in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
