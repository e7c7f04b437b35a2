"""A base model and its tokenizer from whatever the user has: a hub name, a local folder, or a GGUF file.

Training wants plain floating-point weights in a number format that the machine multiplies fast, and a
tokenizer whose special tokens are known. `load_model` gives both, whichever of the three it starts from;
`choose_dtype` decides the number format and says why. What is particular to GGUF files is in `gguf.py`.
"""

from __future__ import annotations

import logging
import platform
import re
import subprocess
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lorakit.errors import LorakitError, advice, first_line, plural, unknown
from lorakit.models import gguf, hub
from lorakit.models.quantisation import Quantisation, existing, holding, quantisation
from lorakit.models.tasks import TASKS, check_task
from lorakit.reading import neighbours, read_json

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, f"{kind}{bits}")
    for kind, short, bits in (("bfloat", "bf", 16), ("float", "fp", 16), ("float", "fp", 32), ("float", "fp", 64))
    for name in (f"{kind}{bits}", f"{short}{bits}")
}
"""Number formats by name, long ("bfloat16") and short ("bf16")."""

# The names by which Linux lists a processor's bf16 multiply: two of x86, one of Arm.
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets that the operating system reports; empty where it reports none."""
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        return frozenset(["bf16"] if answer.stdout.strip() == "1" else [])
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return frozenset()
    found = re.findall(r"^(?:flags|Features)\s*:(.*)$", listing.read_text(errors="replace"), re.MULTILINE)
    return frozenset(flag for line in found for flag in line.split())


def choose_dtype(device: str | torch.device | None = None) -> tuple[torch.dtype, str]:
    """The number format to hold and multiply the base weights in, and the reason in words.

    bfloat16 where the hardware multiplies it, since it halves memory and is several times faster there; float32 elsewhere,
    where bfloat16 would be emulated and slower. float16 is never chosen: its range needs loss scaling.

    Args:
        device: where the model will run; None means a CUDA device if there is one, else the processor.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        where = torch.device(device) if device is not None else None
        name = torch.cuda.get_device_name(where)
        major, minor = torch.cuda.get_device_capability(where)
        if major >= 8:
            return torch.bfloat16, f"{name} (capability {major}.{minor}) multiplies bfloat16 in hardware"
        return (
            torch.float32,
            f"{name} (capability {major}.{minor}) has no bfloat16; that needs capability 8.0",
        )
    if kind == "cpu":
        found = [flag for flag in BF16_FLAGS if flag in processor_flags()]
        if found:
            return torch.bfloat16, f"this processor multiplies bfloat16 in hardware ({', '.join(found)})"
        return torch.float32, "this processor does not list a bfloat16 multiply, and emulating one is slower"
    return torch.float32, f"bfloat16 in hardware is not known for device type {kind}"


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device | None = None) -> tuple[torch.dtype, str]:
    """A dtype from "auto", a name of `DTYPES`, or a dtype, with the reason for it in words."""
    if isinstance(dtype, torch.dtype):
        return dtype, "requested"
    if dtype == "auto":
        return choose_dtype(device)
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[name], "requested"


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    gguf_file: str | None = None,
    task: str = "causal-lm",
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | Quantisation | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a base model in evaluation mode, and its tokenizer with a padding token.

    Args:
        name_or_path: a hub name ("HuggingFaceTB/SmolLM2-135M-Instruct"), a folder written by `save_pretrained`, a `.gguf`
            file, or a folder that holds one. A folder or file wins over a hub name that reads the same.
        dtype: "auto" (see `choose_dtype`), a name of `DTYPES`, or a torch dtype.
        gguf_file: which file of the folder or hub repository, where there are several.
        task: a name of `TASKS`.
        device: where to put the model; None leaves it where transformers puts it.
        tokenizer: a folder or hub name to take the tokenizer from, when the model's own place has none.
        quantize: quantise the linear layers: a format's name ("nf4", "int8", ...) or its spec. A checkpoint that is
            quantised already is recognised by itself.
        options: passed on to transformers' `from_pretrained`.

    Returns:
        The model, of transformers' own class, and its tokenizer. `model.config._name_or_path` is the place as given, so
        that an adapter's record names what the user knows.

    Raises:
        LorakitError: the place does not exist, cannot be reached, holds an adapter instead of a model, or holds several
            GGUF files and none was named; an unknown task, dtype or quantisation, or one whose library is
        missing; a model that is to be quantised and is already.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    chosen, reason = resolve_dtype(dtype, device)
    place = find_local(name_or_path)
    logger.info("loading weights as %s (%s)", str(chosen).removeprefix("torch."), reason)
    source = str(name_or_path)
    if place is None and gguf_file is not None:
        place = hub.download_gguf(source, gguf_file)
    elif place is not None and place.is_dir():
        place = place / gguf_file if gguf_file is not None else gguf.only_file_of(place) or place
    if place is not None and not place.exists():
        raise LorakitError(f'load model: no such file: "{place}".')

    few = quantisation(quantize)
    told = None if few is None else few.config(chosen)
    if told is not None:
        options["quantization_config"] = told
    if place is not None and place.suffix == ".gguf":
        model, words = gguf.load(place, TASKS[task], chosen, options, with_tokenizer=tokenizer is None)
    else:
        where = str(place) if place is not None else hub.find_on_hub(source, options)
        _check_config(where, few, task, options)
        model = from_pretrained(TASKS[task], where, dtype=chosen, **options)
        words = load_tokenizer(where, options) if tokenizer is None else None
    if tokenizer is not None:
        words = load_tokenizer(str(tokenizer), {})

    model.config._name_or_path = model.name_or_path = words.name_or_path = source
    settle_padding(model, words)
    if device is not None:
        model.to(device)
    if few is not None:
        few.pack(model, chosen)
    held = holding(model)
    if held.packed:
        logger.info("quantised base: %s, %s in total", held.words(), megabytes(held.nbytes))
    return model.eval(), words


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _check_config(where: str, few: Quantisation | None, task: str, options: dict[str, Any]) -> None:
    """Refuses a task that would load a part of the model, and to quantise a checkpoint that is quantised already (the log says
    in what)."""
    try:
        config = transformers.AutoConfig.from_pretrained(where, **_of_the_place(options))
    except (OSError, ValueError):
        return  # what is wrong with the place is said by the loading itself
    check_task(config, task, where)
    method = existing(config)
    if method is None:
        return
    if few is not None:
        raise LorakitError(
            f'load model: quantize={few.name}, but "{where}" is quantised already ({method}). Leave quantize out, or start '
            "from the float model."
        )
    logger.info("%s is quantised already: %s", where, method)


def find_local(name_or_path: str | Path) -> Path | None:
    """The folder or file that was named, or None where the name can only be a hub name.

    Raises:
        LorakitError: the name is written as a path (or ends in .gguf) and nothing is there; the folder holds
            an adapter, or nothing that could be a model.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if not path.exists():
        named = hub.read_name(text)  # with "@", as it may have more parts
        if (
            isinstance(name_or_path, Path)
            or text.startswith(("/", ".", "~"))
            or (text.count("/") > 1 and named is None)
        ):
            raise LorakitError(
                f'load model: no such file or folder: "{text}" (from {Path.cwd()}).{models_beside(path)}'
            )
        if path.suffix == ".gguf":
            raise LorakitError(
                f'load model: no such file: "{text}" (from {Path.cwd()}). For a GGUF file in a hub repository, give the '
                'repository as name_or_path ("owner/name") and the file as gguf_file.'
            )
        return None
    if path.is_file() and path.suffix != ".gguf":
        raise LorakitError(
            f'load model: "{text}" is a file that is not GGUF. What works: a .gguf file, the folder with config.json and '
            "*.safetensors, or a hub name."
        )
    if path.is_dir() and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        if (path / "adapter_config.json").exists():
            raise LorakitError(
                f'load model: "{text}" holds an adapter (adapter_config.json), not a base model. '
                + advice(
                    "Load the base first, then the adapter on it with lorakit.load(model, folder).",
                    "Name the base model here, and the adapter where the command takes one (lorakit VERB --help).",
                )
            )
        raise LorakitError(
            f'load model: the folder "{text}" holds neither config.json nor a .gguf file; it holds: {found}.'
        )
    return path


_random: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def random_modules(model: Any) -> tuple[str, ...]:
    """The modules whose weights the checkpoint of a model lacked, so that transformers drew them at random."""
    return _random.get(model, ())


def from_pretrained(class_name: str, where: str, **options: Any) -> Any:
    """transformers' own loading, its failures in one line that names the place.

    Raises:
        LorakitError: it fails, or the checkpoint lacks a weight, which transformers would draw at random.
    """
    try:
        model, found = getattr(transformers, class_name).from_pretrained(where, output_loading_info=True, **options)
    except ImportError as error:
        raise LorakitError(
            f'load model: "{where}" needs a library that is not installed; transformers says: {first_line(error)}'
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LorakitError(
            f'load model: "{where}" cannot be loaded; transformers says: {first_line(error).rstrip(".")}. What works: a folder '
            "written by save_pretrained (config.json and whole *.safetensors), a hub name, or a .gguf file."
        ) from error
    lacks = sorted(found["missing_keys"])
    _random[model] = tuple(dict.fromkeys(key.rpartition(".")[0] for key in lacks if not key.endswith("bias")))
    if class_name in (TASKS["causal-lm"], TASKS["seq2seq"]) and lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise LorakitError(
            f'load model: "{where}" lacks {plural(len(lacks), "weight")}, which would be random: {", ".join(lacks[:3])}{more}. '
            "Is a file of it missing, or is it no language model? Copy or download it again."
        )
    return model


def models_beside(path: Path) -> str:
    """A sentence about the model folders beside a path that does not exist."""
    parent = path.parent
    return neighbours(path, (one.parent.name for one in parent.glob("*/config.json"))) if parent.is_dir() else ""


def load_tokenizer(where: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a hub name or folder."""
    where = hub.snapshot(where, weights=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **_of_the_place(options))
    except Exception as error:  # its files may be broken in any way, and transformers raises what it meets
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if (Path(where) / name).is_file():
                read_json(Path(where) / name, "load tokenizer")
        files = Path(where).is_dir() and not any(Path(where).glob("*token*")) and not any(Path(where).glob("vocab*"))
        raise no_tokenizer(where, "no tokenizer files are there" if files else first_line(error)) from error
    # Where a folder has no tokenizer files, transformers makes an empty one of the model's kind and is silent.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise no_tokenizer(where, "it would be empty")
    return tokenizer


def _of_the_place(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a model's options that say where its files are, for its configuration and tokenizer."""
    return {key: options[key] for key in ("revision", "cache_dir", "token", "trust_remote_code") if key in options}


def no_tokenizer(where: str, reason: str) -> LorakitError:
    """The error for a place without a tokenizer."""
    return LorakitError(
        f'load tokenizer: "{where}" holds no tokenizer that transformers can read ({reason}). What works: write one there with '
        "tokenizer.save_pretrained(folder)"
        + advice(", or name another place with tokenizer=.", ", or copy the tokenizer's files there.")
    )


def settle_padding(model: Any, tokenizer: Any) -> None:
    """Give the tokenizer a padding token, and the model the same, so that rows can be put into one batch."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise LorakitError(
                f'load tokenizer: "{tokenizer.name_or_path}" has neither a padding nor an end token; set tokenizer.pad_token '
                "and save it with tokenizer.save_pretrained(folder)."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer has no padding token: padding with %s (no loss on padding)", tokenizer.eos_token)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        logger.warning(
            "the tokenizer has %d tokens and the embedding %d rows: a text with one of the last %d cannot be read",
            len(tokenizer),
            rows,
            len(tokenizer) - rows,
        )
