"""Training from a GGUF file: read once into plain floats, kept as safetensors, no longer "quantised".

transformers reads GGUF into ordinary float weights, yet three things stand between that and training:
- the model is flagged as quantised, so that `save_pretrained` and the Trainer refuse it (`clear_quantised_flags`);
- the tokenizer is built for the architecture, without regard to the pre-tokenizer that the file names, so that some texts
  come out in other tokens than the model was trained on (`read_tokenizer`);
- it is slow, most of it in Python over the token list: 14 s for a 135M model, of which under 1 s from safetensors. The
  result is therefore kept in a cache folder named by the file's content (`load`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakit.errors import LorakitError, first_line, plural
from lorakit.models.floats import forget_quantised

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of the name of a cached model: raise it when what is written changes."""

CACHE_LIMIT = 8 * 2**30
"""Bytes of floats above which a model is not kept: disk space is the user's."""

SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""GGUF pre-tokenizers that split digits off before GPT-2's rule; transformers applies the rule alone."""


def cache_root() -> Path:
    """Where remakeable files go: $LORAKIT_CACHE, else $XDG_CACHE_HOME/lorakit, else ~/.cache/lorakit."""
    if named := os.environ.get("LORAKIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit"


def only_file_of(folder: Path) -> Path | None:
    """The one GGUF file of a folder without config.json; None for a folder that is a plain model.

    Raises:
        LorakitError: there are several.
    """
    if (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise LorakitError(
            f'load model: the folder "{folder}" holds {len(files)} GGUF files ({listed}); name one with '
            "gguf_file= or give its path."
        )
    return files[0] if files else None


def load(
    path: Path, class_name: str, dtype: torch.dtype, options: dict[str, Any], with_tokenizer: bool = True
) -> tuple[Any, Any]:
    """The model and tokenizer of a GGUF file, through the cache.

    The cache holds the causal model as the file has it; a model with another head is built from that.

    Args:
        path: the file.
        class_name: the transformers class, e.g. "AutoModelForCausalLM".
        dtype: of the weights. The cache is by dtype, so that float32 is never widened bfloat16.
        options: passed on to transformers' `from_pretrained`.
        with_tokenizer: whether the file's tokenizer is wanted; if not, the second value is None.
    """
    folder = cache_root() / "gguf" / f"{path.stem}-{fingerprint(path)[:16]}-{str(dtype).removeprefix('torch.')}"
    if not (folder / "config.json").exists():
        started = time.perf_counter()
        model = read_model(path, dtype)
        words = read_tokenizer(path)
        seconds = time.perf_counter() - started
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        kept = size <= CACHE_LIMIT and keep(model, words, folder)
        where = f"cached as {folder}" if kept else "not cached"
        logger.info("converted %s in %.0f s; %s", path.name, seconds, where)
        if not kept:
            if class_name != "AutoModelForCausalLM" or options:
                raise LorakitError(
                    f'load model: "{path}" as {class_name} with {options or "no options"} is built from a cached copy, and its '
                    f"{size / 2**30:.1f} GiB could not be kept in {folder.parent}. What works: set LORAKIT_CACHE to a folder "
                    "with room, or save the causal model with save_pretrained and load that."
                )
            return model, words
    else:
        logger.info("using the cached %s copy of the GGUF: %s", str(dtype).removeprefix("torch."), folder)
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=dtype, **options)
    return model, transformers.AutoTokenizer.from_pretrained(folder) if with_tokenizer else None


def fingerprint(path: Path) -> str:
    """SHA-256 of the file's content, with the versions of what turns it into floats."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {transformers.__version__}".encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def keep(model: Any, tokenizer: Any, folder: Path) -> bool:
    """Write model and tokenizer as a folder that appears whole or not at all; False where it cannot be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder.parent, ignore_cleanup_errors=True) as made:
            draft = Path(made) / folder.name
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            draft.chmod(0o755)
            os.replace(draft, folder)
    except OSError as error:
        if (folder / "config.json").exists():
            return True  # another process was first; its content is the same
        logger.warning("the converted model could not be cached, so the next start is slow again: %s", error)
        return False
    return True


@contextmanager
def refusing_what_transformers_cannot_read(path: Path) -> Iterator[None]:
    """One error for the many that a parser raises on a broken file or an architecture that it does not know."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError, EOFError, NotImplementedError, struct.error) as error:
        raise LorakitError(
            f'load model: transformers {transformers.__version__} cannot read it: "{path}": {first_line(error)}. '
            "What works: a whole GGUF file (version 2 or 3) of an architecture that transformers knows, or the model's "
            "safetensors folder."
        ) from error


def read_model(path: Path, dtype: torch.dtype) -> Any:
    """The causal model of a GGUF file as plain floats that can be trained and saved."""
    options: dict[str, Any] = {}
    # Without this, newer versions keep the blocks packed where a kernel for them is installed; older ones lack it.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with refusing_what_transformers_cannot_read(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, **options
        )
    clear_quantised_flags(model)
    return model


def clear_quantised_flags(model: Any) -> None:
    """Tell transformers that the weights are plain floats.

    Raises:
        LorakitError: the weights are not plain floats, so the flags are right.
    """
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise LorakitError(
            f"load model: {plural(len(packed), 'weight')} still packed ({packed[0]}, ...): not a float model. What works: "
            "transformers.GgufConfig(dequantize=True)."
        )
    forget_quantised(model)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, with the file's own special tokens, digits and longest text."""
    from gguf import GGUFReader  # the package, not this module
    from tokenizers import pre_tokenizers

    with refusing_what_transformers_cannot_read(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        fields = GGUFReader(path).fields

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = field(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token)))
    if field("tokenizer.ggml.pre") in SPLITS_DIGITS:
        rules = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        rules.pre_tokenizer = pre_tokenizers.Sequence([digits, rules.pre_tokenizer])
    if template := field("tokenizer.chat_template"):
        tokenizer.chat_template = template
    if longest := field(f"{field('general.architecture')}.context_length"):
        tokenizer.model_max_length = int(longest)
    return tokenizer
