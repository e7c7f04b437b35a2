"""A merged model's folder as one GGUF file, and a Modelfile with which Ollama runs it.

The file is written by llama.cpp's own converter, `convert_hf_to_gguf.py`, and quantised by its `llama-quantize`; formats that
only round (q8_0, q5_0, q4_0, ...) are made by the package `gguf` where that program is not there. lorakit finds the tools,
calls them, and says what to install.

Ollama renders conversations by a Go template of its own, not by Jinja. `go_template` finds what the model's chat template
writes before and after each kind of message, and gives the Go template that writes the same, if one does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, unknown
from lorakit.files.prompt import Prompter, end_ids

FLOATS = ("f32", "f16", "bf16")
ROUNDED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
SEARCHED = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
KINDS = (*FLOATS, *ROUNDED, *SEARCHED)
"""The formats of weights: floats, plain rounding, and those that only llama-quantize makes."""

CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
_HOW = (
    "install llama.cpp (brew install llama.cpp, or git clone https://github.com/ggml-org/llama.cpp and build it) and put its "
    "programs on PATH, or its folder into the environment variable LLAMA_CPP"
)


def find_tools(kind: str) -> tuple[Path, Path | None]:
    """llama.cpp's converter, and its quantiser (None where it is not there and not needed).

    Raises:
        LorakitError: no such format, or a tool that it needs is not there.
    """
    if kind.lower() not in KINDS:
        raise unknown("GGUF format", kind, KINDS)
    converter = _find(CONVERTER, "convert-hf-to-gguf", "convert_hf_to_gguf")
    if converter is None:
        raise LorakitError(f"merge --gguf: {CONVERTER} of llama.cpp was not found; {_HOW}")
    quantiser = _find(QUANTISER)
    if quantiser is None and kind.lower() in SEARCHED:
        raise LorakitError(
            f"merge --gguf {kind}: {QUANTISER} of llama.cpp was not found; {_HOW}. Without it: {', '.join((*FLOATS, *ROUNDED))}"
        )
    return converter, quantiser


def _find(*names: str) -> Path | None:
    home = os.environ.get("LLAMA_CPP")
    folders = [Path(home).expanduser() / part for part in ("", "bin", "build/bin")] if home else []
    for name in names:
        beside = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if beside is not None:
            return beside
        if found := shutil.which(name):
            return Path(found)
    return None


def write_gguf(folder: Path, target: Path, kind: str, tools: tuple[Path, Path | None], floats: str = "f16") -> None:
    """Convert the model in a folder to one file.

    Args:
        folder: written by `save_pretrained`, with its tokenizer.
        target: the file; replaced.
        kind: one of `KINDS`.
        tools: what `find_tools` gave.
        floats: the format before it is quantised.

    Raises:
        LorakitError: a tool failed; its last lines are in the message.
    """
    kind = kind.lower()
    converter, quantiser = tools
    script = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    whole = target if kind in FLOATS else target.with_suffix(".floats.gguf")
    try:
        _call([*script, str(folder), "--outfile", str(whole), "--outtype", kind if kind in FLOATS else floats])
        if kind not in FLOATS and quantiser is not None:
            _call([str(quantiser), str(whole), str(target), kind.upper()])
        elif kind not in FLOATS:
            rounded(whole, target, kind)
    finally:
        if whole != target:
            whole.unlink(missing_ok=True)


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        tool = next(Path(word).name for word in command if word != sys.executable)
        raise LorakitError(f"merge --gguf: {tool} failed (exit status {done.returncode}): {last}")


def rounded(source: Path, target: Path, kind: str) -> None:
    """A GGUF file of floats with its matrices rounded to a plain format, as llama-quantize's --pure does: embeddings and the
    output head too, vectors not."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind.upper()]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        block = gguf.GGML_QUANT_SIZES[quant][0]
        if floats.ndim == 2 and floats.shape[1] % block == 0:
            writer.add_tensor(tensor.name, gguf.quants.quantize(floats, quant), raw_dtype=quant)
        else:
            writer.add_tensor(tensor.name, floats)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- Ollama ----------------------------------------------------------------------------------------------------------------


def modelfile(name: str, prompter: Prompter, model: Any = None) -> str:
    """A Modelfile for a GGUF file beside it: the template, the system message, and what ends an answer."""
    lines = [f"FROM ./{name}"]
    found = go_template(prompter)
    if found is not None:
        lines.append(f'TEMPLATE """{found[0]}"""')
        lines += [f'SYSTEM """{found[1]}"""'] if found[1] else []
    elif prompter.prompt.template is not None:
        lines.append(
            "# The chat template writes more than a text before and after each message, which Ollama's templates"
        )
        lines.append("# cannot follow; the GGUF file holds it, and Ollama may know it by that.")
    ends = dict.fromkeys([*end_ids(prompter.tokenizer, model), *prompter.stop_ids])
    lines += [f'PARAMETER stop "{prompter.tokenizer.convert_ids_to_tokens(one)}"' for one in ends]
    return "\n".join(lines) + "\n"


_MARKS = {role: f"\u27e6{role}\u27e7" for role in ("system", "user", "assistant")}
_CONVERSATIONS = ("u", "uau", "uauau", "su", "suau")
"""What is compared, a letter for each message."""


def go_template(prompter: Prompter) -> tuple[str, str] | None:
    """Ollama's template for a model that is asked in this form, and the system message of a conversation that has none; None
    where no text before and after each message says it.

    BOS is left out where the tokenizer writes it, as Ollama writes it then too.
    """
    if prompter.prompt.template is None:
        return None
    bos = prompter.tokenizer.bos_token or ""

    def render(letters: str, opened: bool = False) -> str | None:
        roles = [next(role for role in _MARKS if role.startswith(letter)) for letter in letters]
        messages = [{"role": role, "content": _MARKS[role]} for role in roles]
        template, how = prompter.prompt.template, {"tokenize": False, "add_generation_prompt": opened}
        try:
            text: str = prompter.tokenizer.apply_chat_template(messages, chat_template=template, **how)
        except Exception:  # a template is a program: it may refuse this order of messages
            return None
        return text

    first, second, third, whole = (render(letters) for letters in ("u", "ua", "uau", "su"))
    asked = render("u", opened=True)
    if first is None or second is None or third is None or asked is None:
        return None
    lead = bos if bos and first.startswith(bos) else ""
    pieces = {"assistant": _around("assistant", second, first), "user": _around("user", third, second)}
    turn = third.removeprefix(second)
    pieces["system"] = ("", "") if whole is None else _around("system", whole.removesuffix(turn), lead)
    opening, told = asked.removeprefix(first), first.removeprefix(lead).removesuffix(turn)
    system = told.removeprefix(pieces["system"][0]).removesuffix(pieces["system"][1])

    def composed(letters: str) -> str:
        text = lead + (told if "s" not in letters else "")
        for letter in letters:
            role = next(role for role in _MARKS if role.startswith(letter))
            text += _MARKS[role].join(pieces[role])
        return text + opening

    for letters in _CONVERSATIONS:
        if (found := render(letters, opened=True)) is not None and found != composed(letters):
            return None
    texts = [lead, opening, system, *(text for pair in pieces.values() for text in pair)]
    if (told and told != system.join(pieces["system"])) or any("{{" in text or '"""' in text for text in texts):
        return None
    cases = [
        f'{{{{ {word} eq .Role "{role}" }}}}{pieces[role][0]}{{{{ .Content }}}}{pieces[role][1]}'
        for word, role in zip(("if", "else if", "else if"), _MARKS, strict=True)
    ]
    written = "" if prompter.opening else lead
    return f"{written}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{opening}", system


def _around(role: str, text: str, before: str) -> tuple[str, str]:
    """What stands before and after a message of this role, which `text` has more than `before`."""
    left, _, right = text.removeprefix(before).partition(_MARKS[role])
    return left, right
