"""Checkpoints of a run: an adapter's folder, what is needed to resume exactly beside it, and nothing of the base model.

    checkpoint-120/
        adapter_config.json  adapter_model.safetensors  lorakit.json  chat_template.jinja  ...   the adapter, as ever
        adapter_state.safetensors   the tensors that the adapter's file holds in another form or not at all, and where in that
                                    file each of the others is
        schedule_state.safetensors  what its schedule remembers, where the method has one
        average_state.safetensors   the moving average of the weights, with train.ema
        trained_state.safetensors   the tensors that are trained, where the adapter is an average of them
        loss_scale.pt               the loss scale, in fp16
        optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json      written by transformers
        checkpoint.json             written last: the run's configuration, its data, every file's size and
        hash

Whatever loads an adapter loads a checkpoint. One without `checkpoint.json` was being written when the run was killed.
One whose files do not agree with it is damaged. One of another configuration or of other rows would go on as a run
that never was. Each is refused with the reason; nothing is loaded in part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import LorakitError, plural
from lorakit.files.bundle import CONFIG, CONTENT, OWN, TENSORS, read_own
from lorakit.files.folder import check_place, claim, locked, write_whole
from lorakit.files.prompt import TEMPLATE, read_prompt
from lorakit.files.store import contents, kept_in, save_within
from lorakit.train.report import CARD, CURVES, METRICS
from lorakit.train.report import CONFIG as RUN

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.train.data.store import Example

log = logging.getLogger("lorakit.train")

FOLDER = "checkpoints"
ADAPTER = "adapter_state.safetensors"
SCHEDULE = "schedule_state.safetensors"
AVERAGE = "average_state.safetensors"
TRAINED = "trained_state.safetensors"
SCALER = "loss_scale.pt"
MANIFEST = "checkpoint.json"
FINISHED = "finished"
LOCK = "lock"

FREE = {
    "name",
    "overwrite",
    "evaluate",
    "train.output",
    "train.resume",
    "train.report_to",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.keep_best",
    "train.early_stopping_patience",
    "train.evaluation_batch_size",
    "data.evaluation_limit",
    "data.date",  # the rows say whether it moves anything
    "data.cache",
}
"""Options that may differ between a checkpoint and the run that resumes from it: they move no parameter."""

MAY_CHANGE = {"train.epochs", "train.max_steps", "train.learning_rate"}
"""Options that may differ too: from here on the learning rate follows the schedule of the new run."""

UNSAID = {"overwrite", "train.output", "train.resume", "data.date"}
"""Options that may differ without a word."""

REASONS = {
    "model quantize task train.precision": "the base would be another",
    "method adapters init target_modules exclude_modules layers patterns modules_to_save bias continue_from": (
        "the adapter would be another"
    ),
    "data": "the rows would be others",
    "train.seed train.batch_size train.gradient_accumulation": "its batches would be others",
    "train": "its steps would be others than those that were made",
}
"""Why an option may not differ; the first that fits."""


def digest_examples(examples: Iterable[Example]) -> str:
    """A hash of the tokens and labels of all rows in their order: the data as the run saw it."""
    if (known := getattr(examples, "digest", None)) is not None:  # of examples that are not all in memory
        return str(known())
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.input_ids, example.labels):
            digest.update(repr(list(ids)).encode())
    return digest.hexdigest()


# -- the adapter's tensors ---------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path, adapter: Adapter, base: str, record: Mapping[str, Any], sampled: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Write the adapter of a checkpoint: its folder as ever, and beside that what its file does not hold to the bit, and where
    it holds the rest.

    Returns the base's fingerprint, to be given again as `sampled`: the base is frozen, and slow to read where it is quantised.

    Raises:
        OSError, SafetensorError: it cannot be written.
        LorakitError: the adapter cannot be saved.
    """
    bundle = contents(adapter, folder, base, record, sampled=sampled)
    others = (one for one in reversed(checkpoints_in(folder.parent.parent)) if one.name != folder.name)
    save_within(bundle, adapter, base, next(others, None))
    state = adapter.state_dict()
    files = {tensor.untyped_storage().data_ptr(): (key, tensor) for key, tensor in bundle.tensors.items()}
    own = {tensor.untyped_storage().data_ptr(): name for name, tensor in state.items()}
    found: dict[str, dict[str, list[Any]]] = {}
    for target, value in kept_in(adapter, bundle):
        name, file = own.get(target.untyped_storage().data_ptr()), files.get(value.untyped_storage().data_ptr())
        if name is not None and file is not None:
            piece = [*_view(target, state[name]), file[0], *_view(value, file[1])]
            found.setdefault(name, {})[str(piece)] = piece
    whole = {
        name: [list(state[name].shape), str(state[name].dtype).removeprefix("torch."), list(pieces.values())]
        for name, pieces in found.items()
        if sum(torch.Size(piece[0]).numel() for piece in pieces.values()) == state[name].numel()
    }
    # Copies of their own: tensors that share memory cannot be written side by side.
    rest = {name: tensor.contiguous().clone() for name, tensor in state.items() if name not in whole}
    save_file(rest, folder / ADAPTER, metadata={"kept": json.dumps(whole)})
    fingerprint: Mapping[str, Any] = bundle.own["base"]["fingerprint"]
    return fingerprint


def _view(part: Tensor, whole: Tensor) -> tuple[list[int], list[int], int]:
    """Shape, strides and offset of a view within a contiguous tensor."""
    return list(part.shape), list(part.stride()), int(part.storage_offset() - whole.storage_offset())


def read_state(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors of a checkpoint, to the bit."""
    with safe_open(folder / ADAPTER, framework="pt") as file:
        kept = json.loads((file.metadata() or {}).get("kept", "{}"))  # one of an earlier version has them all here
    state, written = load_file(folder / ADAPTER), load_file(folder / TENSORS) if kept else {}
    for name, (shape, dtype, pieces) in kept.items():
        state[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        for *target, key, size, stride, offset in pieces:
            state[name].as_strided(*target).copy_(written[key].contiguous().view(-1).as_strided(size, stride, offset))
    return state


# -- the seal ----------------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, *, config: Mapping[str, Any], data: str, step: int, findings: Sequence[str]) -> None:
    """Seal a checkpoint: only from now on is it one."""
    known = {TENSORS: read_own(folder)["files"][TENSORS]} if (folder / OWN).is_file() else {}
    files = {
        path.name: {"size": path.stat().st_size, "sha256": known.get(path.name) or _digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"config": config, "data": data, "step": step, "findings": list(findings), "files": files}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoint folders of a run in order of steps, complete or not."""
    found = [path for path in (output / FOLDER).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output: Path, resume: bool | str) -> Path:
    """The checkpoint to resume from: the newest complete one for `True`, else the one named.

    Raises LorakitError when there is none. A newest one that was never completed is passed over, and said so.
    """
    if isinstance(resume, str):
        folder = Path(resume)
        if not folder.is_dir():
            known = ", ".join(path.name for path in checkpoints_in(output)) or "none"
            raise LorakitError(f"resume: there is no checkpoint {folder}; checkpoints in {output / FOLDER}: {known}")
        if not (folder / MANIFEST).is_file():
            raise unfinished(folder)
        return folder
    for folder in reversed(checkpoints_in(output)):
        if (folder / MANIFEST).exists():
            return folder
        log.warning("resume: skipping %s, which was not finished when its run ended (it has no %s)", folder, MANIFEST)
    raise LorakitError(
        f"resume: found no complete checkpoint in {output / FOLDER}. "
        "Start without train.resume, or name a checkpoint folder"
    )


def date_of(folder: Path) -> str | None:
    """The date that the chat template of a checkpoint writes, where it writes one."""
    prompt = read_prompt(folder)
    return None if prompt is None else prompt.given.get("date")


def unfinished(folder: Path) -> LorakitError:
    """The error for a folder that is no complete checkpoint."""
    return LorakitError(
        f"resume: {folder} has no {MANIFEST}, so it was not finished or is no checkpoint of lorakit; use an earlier "
        "one, or start without train.resume"
    )


def check_checkpoint(folder: Path, *, config: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Read a checkpoint's manifest and make sure that going on from it is the same run; returns the manifest, and as "changed"
    the options that differ.

    Raises LorakitError for a checkpoint that is incomplete, damaged, of another configuration or of other rows.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files, saved = manifest["files"], manifest["config"]
    except FileNotFoundError:
        raise unfinished(folder) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LorakitError(f"resume: {folder / MANIFEST} cannot be read ({error}); use an earlier checkpoint") from None
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != facts["size"]:
            problem = f"has {path.stat().st_size:,} bytes and should have {facts['size']:,}"
        elif _digest(path) != facts["sha256"]:
            problem = "has other content than was written (its hash differs)"
        else:
            continue
        raise LorakitError(
            f"resume: {folder} is damaged: {name} {problem}; use an earlier checkpoint, or start without train.resume"
        )
    changed = _check_config(folder, saved, config)
    if manifest["data"] != data:
        raise LorakitError(
            f"resume: {folder} was trained on other rows (the options are the same, the tokens are not); restore the data of "
            "that run, or start without train.resume"
        )
    return {**manifest, "changed": changed}


def _check_config(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The options that differ, each allowed and told.

    Raises:
        LorakitError: one would make the run another.
    """
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    differing = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    told = {name: f"{name} was {before.get(name)!r}, is {after.get(name)!r}" for name in differing}
    refused = [name for name in differing if not _within(name, FREE | MAY_CHANGE)]
    if refused:
        shown = "; ".join(f"{told[name]} ({_reason(name)})" for name in refused[:5])
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise LorakitError(
            f"resume: {folder} has another configuration: {shown}{more}. Restore these; or, to begin a new run from this "
            f"adapter with other settings, give it as --from {folder} and another train.output"
        )
    changed = [name for name in differing if not _within(name, UNSAID)]
    if changed:
        follows = (
            " (the learning rate follows the schedule of the new run from here on)" if MAY_CHANGE & set(changed) else ""
        )
        log.warning("resume: %s%s", "; ".join(told[name] for name in changed), follows)
    return set(changed)


def _within(name: str, options: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in options)


def _reason(name: str) -> str:
    return next(
        (reason for options, reason in REASONS.items() if _within(name, options.split())), "the run would be another"
    )


@contextmanager
def claimed(output: Path, resume: bool | str, overwrite: bool) -> Iterator[None]:
    """Hold the output folder of a run while it goes on: nothing in it is replaced unasked, and no other run writes there. The
    lock is the operating system's, so that it ends with the process, however that ends.

    Raises:
        LorakitError: another run writes there; something is there that would be replaced; it cannot be written; there is no
            checkpoint to resume from.
    """
    check_place(output.resolve())
    try:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
        (output / FOLDER / LOCK).touch()
    except OSError as problem:
        raise LorakitError(
            f"train: train.output {output} cannot be written ({problem.strerror or problem})."
        ) from problem
    with locked(output / FOLDER / LOCK, wait=False) as free:
        if not free:
            raise LorakitError(
                f"train: another run is writing to {output}; choose another train.output, or wait for it."
            )
        try:
            if resume:
                find_checkpoint(output, resume)
            else:
                check_unfinished(output, overwrite)
                names = [*CONTENT, TEMPLATE, CARD, RUN, CURVES, *([] if _is_log(output / METRICS) else [METRICS])]
                claim(output, names, overwrite, "train", marks=(CONFIG, f"{FOLDER}/{FINISHED}", *_names(output)))
            yield
        finally:
            if [entry.name for entry in (output / FOLDER).glob("*")] == [LOCK]:  # nothing came of it
                (output / FOLDER / LOCK).unlink()
                (output / FOLDER).rmdir()
                with contextlib.suppress(OSError):
                    output.rmdir()


def _names(output: Path) -> list[str]:
    return [f"{FOLDER}/{one.name}" for one in checkpoints_in(output)]


def _is_log(path: Path) -> bool:
    """Whether a file is what a run logs, which one that failed early leaves behind."""
    try:
        with path.open("rb") as file:
            first = file.readline()
        return not first or "step" in json.loads(first)
    except (OSError, ValueError, TypeError):
        return False


def check_unfinished(output: Path, overwrite: bool) -> None:
    """Raises LorakitError when an earlier run in the same folder was interrupted: its work is not thrown away unasked."""
    earlier = checkpoints_in(output)
    if earlier and not overwrite and not (output / FOLDER / FINISHED).exists():
        raise LorakitError(
            f"train: {output} holds an unfinished run ({plural(len(earlier), 'checkpoint')}, the newest {earlier[-1].name}). "
            "Continue with --train.resume true, choose another train.output, or start over with --overwrite"
        )


def begin(output: Path, overwrite: bool = False) -> None:
    """Make room for a fresh run: the checkpoints of an earlier one are removed (see `check_unfinished`)."""
    check_unfinished(output, overwrite)
    earlier = checkpoints_in(output)
    for folder in earlier:
        shutil.rmtree(folder)
    if earlier:
        log.info("overwriting the earlier run in %s: removed its %s", output, plural(len(earlier), "checkpoint"))
    (output / FOLDER / FINISHED).unlink(missing_ok=True)


def finish(output: Path) -> None:
    """Mark the run in `output` as finished."""
    write_whole(output / FOLDER / FINISHED, b"")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration under their dotted names; a list is one value."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
