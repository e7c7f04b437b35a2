"""A folder that is replaced whole: a process killed at any moment leaves the old content or the new, never a mixture.

The new content is written beside the folder, flushed, and put in its place in one step of the system. Whoever looks at
the folder, also a program that knows nothing of this, sees the old files or the new ones. Where a system cannot exchange
two folders there is an instant with no folder; the next reader or writer then brings the old one back.

What is not part of the content (a card, metrics, checkpoints) belongs to others and survives. Locks are the operating
system's own, so that they end with the process that held them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import LorakitError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("lorakit")

_FRESH, _PREVIOUS = ".saving-", ".previous-"


Stamp = tuple[tuple[int, int, int], ...]


def stamp_of(*files: Path) -> Stamp:
    """What tells whether files are still the same ones: equal stamps, the same content. A file that is not there counts."""
    found = []
    for file in files:
        try:
            status = file.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def replace_folder(folder: Path, write: Callable[[Path], None], content: Collection[str]) -> None:
    """Let `write` fill a fresh folder, then put it in place of `folder` in one step.

    Two processes that save to one folder do so one after the other; the later content stays, whole.

    Args:
        folder: what to replace or make; a link is followed.
        write: fills the folder that it is given.
        content: names of the files that make up the content; all other entries of `folder` are carried over.

    Raises:
        LorakitError: `folder` cannot be replaced, or writing failed; it is as it was then.
    """
    folder = folder.resolve()
    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _fresh_beside(folder) as fresh:
            try:
                write(fresh)
                for entry in fresh.iterdir():
                    _flush(entry)
                _flush(fresh)
            except BaseException:
                with locked(folder.parent, wait=True):
                    shutil.rmtree(fresh, ignore_errors=True)
                raise
            with locked(folder.parent, wait=True):
                _settle(folder, content)
                _swap(fresh, folder, content)  # from its exchange on, `fresh` names the old folder: no cleaning up here
    except OSError as problem:
        raise LorakitError(
            f"save: {folder} could not be written ({problem}); what was there is as it was."
        ) from problem


def write_whole(path: Path, content: bytes, mode: int | None = None) -> Path:
    """Put a file in place whole (see `replace_file`): a reader sees the old content or the new, never a part."""

    def write(fresh: Path) -> None:
        fresh.write_bytes(content)

    replace_file(path, write, mode)
    return path


def claim(output: Path, names: Collection[str], overwrite: bool, verb: str, marks: Collection[str] = ()) -> None:
    """Make sure that writing a result replaces nothing that should stay: the one policy of all verbs.

    Args:
        output: the folder, or the file where `names` is empty.
        names: what will be written into the folder.
        overwrite: whether an earlier result may be replaced.
        verb: who writes, for the message.
        marks: files by which an earlier result is known; without any of them, the files there are the user's own.

    Raises:
        LorakitError: something is there.
    """
    output = output.expanduser()
    check_writable(output, verb)
    if names and os.path.lexists(output) and not output.is_dir():
        raise LorakitError(f"{verb}: {output} is a file; a folder was to be written.")
    if not names and output.is_dir():
        raise LorakitError(f"{verb}: {output} is a folder; a file was to be written.")
    found = [output.name] if not names and output.exists() else [name for name in names if (output / name).exists()]
    if not found:
        return
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    if not overwrite:
        there = f" ({shown})" if names else ""
        raise LorakitError(
            f"{verb}: {output} is there already{there}, and would be overwritten. Choose another output, or use --overwrite."
        )
    if marks and not any((output / name).exists() for name in marks):
        raise LorakitError(
            f"{verb}: {output} holds {shown} and no earlier result ({' or '.join(marks)}), so these are files of your own; "
            "choose another output."
        )


def check_writable(place: Path, verb: str) -> None:
    """Refuse a place at which nothing can be written: below a file, or in a folder that may not be changed.

    Raises:
        LorakitError: naming the file or folder that is in the way.
    """
    above = place.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise LorakitError(f"{verb}: {place} cannot be written, since {above} is no folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise LorakitError(f"{verb}: {place} cannot be written: {above} is read-only for this user.")


def replace_file(path: Path, write: Callable[[Path], None], mode: int | None = None) -> None:
    """Let `write` fill a fresh file beside `path`, then put it in its place in one step. `mode` are its permissions, from the
    first moment; by default those of the old file, or any file's.

    Raises:
        LorakitError: it cannot be written; what was there is as it was.
    """
    path = path.resolve()
    if path.is_dir():
        raise LorakitError(f"save: {path} is a folder; a file was to be written.")
    fresh = path.with_name(f".{path.stem}.writing-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # with the permissions of any file by default: safetensors would make it readable by its owner alone
            fresh.touch(0o666 if mode is None else mode)
            mode = (path if path.exists() and mode is None else fresh).stat().st_mode
            write(fresh)
            fresh.chmod(mode)
            _flush(fresh)
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        _flush(path.parent)
    except OSError as problem:
        raise LorakitError(f"save: {path} could not be written ({problem}); what was there is as it was.") from problem


def recover(folder: Path, content: Collection[str]) -> None:
    """Finish what a killed save left beside a folder: bring back its files, remove what is half-written.

    Called before reading. A save that is going on is left alone, and nothing is written where that is not allowed.
    """
    folder = folder.resolve()
    with contextlib.suppress(OSError):
        if not _leftovers(folder, _FRESH) and not _leftovers(folder, _PREVIOUS):
            return
        with locked(folder.parent, wait=not folder.exists()) as held:
            if held:
                _settle(folder, content)


# -- steps ---------------------------------------------------------------------------------------------------------------


def check_place(folder: Path) -> None:
    """Refuse a place that cannot be replaced by a folder in one step: a file, a mount point, the current directory."""
    # No lock is held yet, and by renames the folder is away for a moment while another save swaps: whatever is asked must
    # take either answer, so its kind is asked once, and not by Path.is_mount, which asks four times.
    try:
        kind = folder.stat().st_mode
    except OSError:
        kind = None  # what stands in the way will say so when it is written
    if kind is not None and not stat.S_ISDIR(kind):
        raise LorakitError(f"save: {folder} exists and is a file; an adapter is a folder.")
    if os.path.ismount(folder):
        raise LorakitError(
            f"save: {folder} is a mount point, which cannot be replaced in one step. A folder below it can: "
            f"{folder / 'adapter'}."
        )
    if Path.cwd().is_relative_to(folder):
        raise LorakitError(
            f"save: {folder} holds the current directory, which would be replaced under this process. A folder below it "
            f"can be: {folder / 'adapter'}."
        )


@contextmanager
def _fresh_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked while this process lives or until the block ends."""
    fresh = folder.with_name(f".{folder.name}{_FRESH}{secrets.token_hex(4)}")
    with contextlib.ExitStack() as stack:
        with locked(folder.parent, wait=True):  # so that nobody takes it for a leftover before its lock is held
            fresh.mkdir()
            stack.enter_context(locked(fresh, wait=True))
            if folder.exists():  # under the lock: by renames, the folder is away for a moment while another save swaps
                shutil.copymode(folder, fresh)
        yield fresh


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the system's lock of a folder or file, which ends with the process; yields whether it was free."""
    if sys.platform == "win32":
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError:
            held = True  # a file system without locks; two writers at once are then on their own
        yield held
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _leftovers(folder: Path, kind: str) -> list[Path]:
    """What saves of this folder have beside it, the oldest first."""
    start = f".{folder.name}{kind}"
    found = [entry for entry in folder.parent.iterdir() if entry.name.startswith(start)]
    return sorted(found, key=lambda entry: entry.stat().st_mtime)


def _settle(folder: Path, content: Collection[str]) -> None:
    """Clear the leftovers of killed saves; the parent's lock is held, and a living save holds that of its own folder."""
    for previous in reversed(_leftovers(folder, _PREVIOUS)):
        if not folder.exists():
            previous.rename(folder)
        else:
            _absorb(previous, folder, content)
    for fresh in _leftovers(folder, _FRESH):
        with locked(fresh, wait=False) as dead:
            if dead and folder.exists():
                _absorb(fresh, folder, content)
            elif dead:
                shutil.rmtree(fresh)


def _swap(fresh: Path, folder: Path, content: Collection[str]) -> None:
    """Put `fresh` in place of `folder`, and carry over what is not content."""
    if not folder.exists():
        fresh.rename(folder)
        _flush(folder.parent)
        return
    for entry in folder.iterdir():
        if entry.name not in content and entry.is_file() and not entry.is_symlink():
            # Already in place when the exchange comes; a system without hard links moves them afterwards instead.
            with contextlib.suppress(OSError):
                os.link(entry, fresh / entry.name)
    if exchange(fresh, folder):
        old = fresh
    else:
        old = folder.with_name(f".{folder.name}{_PREVIOUS}{secrets.token_hex(4)}")
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    try:
        _flush(folder.parent)
        _absorb(old, folder, content)
    except OSError as problem:
        log.warning(
            "save: %s is in place, but what others keep in it could not be brought over (%s); it is in %s until the next "
            "save or load",
            folder,
            problem,
            old,
        )


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (Linux renameat2, macOS renamex_np); False where it cannot."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_cwd, both = -100, 2
        return bool(libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), both) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(first), os.fsencode(second), 2) == 0)
    return False


def _absorb(old: Path, folder: Path, content: Collection[str]) -> None:
    """Move what others put into `old` over to `folder`, then remove `old`."""
    for entry in list(old.iterdir()):
        if entry.name not in content:
            _carry(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _carry(entry: Path, target: Path) -> None:
    """Move one file or folder to `target`; what is there already is merged (folders) or kept as well (files)."""
    if not os.path.lexists(target):
        entry.rename(target)
    elif entry.is_dir() and not entry.is_symlink() and target.is_dir():
        for child in list(entry.iterdir()):
            _carry(child, target / child.name)
    elif not (entry.exists() and target.exists() and entry.samefile(target)):
        kept = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        log.warning(
            "save: %s was rewritten while its folder was being replaced; the other one is kept as %s", target, kept
        )
        entry.rename(kept)
