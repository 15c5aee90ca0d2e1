"""Copies of subjects' files in a node's own memory or disk: ``data.stage=/dev/shm``.

The first process of a node copies what the recipe selects, the others wait for it and read the same
copy. Every file is read back after copying and compared by SHA-256; a copy that was interrupted
goes on where it was. When the last process is done with it the copy is removed, unless
``data.stage_keep`` asks otherwise; after a kill it stays, and the next run takes it up.

All nodes copy all of the selected runs: the order of clips is the same for any number of nodes, so
every node may be asked for any clip. With ``data.divide`` they copy what their ranks draw from, and
read everything else (validation, test) where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fmrizoo.data.mixture import Mixture
from fmrizoo.data.store import INDEX, PARTICIPANTS, RunInfo, Store
from fmrizoo.errors import DataError
from fmrizoo.files import PART

log = logging.getLogger(__name__)

_DONE = "staged.jsonl"  # one line a file that is here whole and was compared
_BLOCK = 8 << 20


def staged(store: Store, runs: Sequence[RunInfo], folder: Path, *, keep: bool = False) -> Store:
    """``store`` read from a copy of the files of ``runs`` below ``folder``.

    The copy lives at least as long as the store that is returned.

    Args:
        store: One store or several.
        runs: Of the store; no other run can be read from the copy.
        folder: On this node's own memory or disk; must exist.
        keep: Leave the copy there at the end.

    Raises:
        DataError: no such folder, not enough room, somebody else's copy, or a copy that differs
            from its source.
    """
    _check_folder(folder)
    if isinstance(store, Mixture):
        copies = {}
        for name, part in store.parts.items():
            own = {store.stored(run) for run in runs if run.key.data_set == name}
            copies[name] = _Copy(part, own, folder)
        found: Store = Mixture({name: copy.path for name, copy in copies.items()})
    else:
        copies = {"": _Copy(store, {run.file for run in runs}, folder)}
        found = Store(copies[""].path)
    for copy in copies.values():
        weakref.finalize(found, copy.release, keep)
    return found


def stage_share(store: Store, runs: Sequence[RunInfo], folder: Path, *, keep: bool = False) -> None:
    """Copy the files of ``runs`` below ``folder``, and let ``store`` read them there from now on.

    All other files are read where they are. Ranks of a node add to one copy. Arguments and errors
    as of :func:`staged`.
    """
    _check_folder(folder)
    parts = {"": store}
    if isinstance(store, Mixture):
        parts = store.parts
    for name, part in parts.items():
        files = {
            store.stored(run) if isinstance(store, Mixture) else run.file
            for run in runs
            if part is store or run.key.data_set == name
        }
        copy = _Copy(part, files, folder)
        part.divert(files, copy.path)
        weakref.finalize(store, copy.release, keep)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"data.stage={folder} is no folder: give one on this node, as /dev/shm")


class _Copy:
    """The copy of one store on this node; this process is one of its users.

    Attributes:
        path: A store with the wanted files.
    """

    def __init__(self, store: Store, files: set[str], folder: Path) -> None:
        index = (store.path / INDEX).read_bytes()
        key = hashlib.sha256(str(store.path.resolve()).encode() + index).hexdigest()[:16]
        name = f"fmrizoo-{os.getuid()}-{key}"
        self.path = folder / name
        self._process = os.getpid()
        # Beside the copy, so that they outlive its removal: who waits for them must not wait for
        # a file that is gone.
        self._users = _lock_file(folder / f".{name}.users")
        try:
            fcntl.flock(self._users, fcntl.LOCK_SH)
            with _alone(folder / f".{name}.copy"):
                self._fill(store.path, files)
        except BaseException:
            os.close(self._users)
            raise

    def release(self, keep: bool) -> None:
        """No longer a user; the last one removes the copy."""
        if os.getpid() != self._process:  # a forked worker shares the lock of its parent
            return
        try:
            if not keep:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.path)
        except BlockingIOError:
            pass  # others still read it
        except OSError as error:
            log.warning("the copy %s could not be removed: %s", self.path, error)
        finally:
            os.close(self._users)

    def _fill(self, source: Path, files: set[str]) -> None:
        """Copy what is not here yet."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        if self.path.is_symlink() or self.path.stat().st_uid != os.getuid():
            raise DataError(f"{self.path} is not yours: choose another data.stage")
        small = [name for name in (INDEX, PARTICIPANTS) if (source / name).is_file()]
        here = self._here()
        missing = [name for name in [*small, *sorted(files)] if name not in here]
        if not missing:
            return
        sizes = {name: _size(source / name) for name in missing}
        total, free = sum(sizes.values()), shutil.disk_usage(self.path).free
        if total > free:
            raise DataError(
                f"data.stage={self.path.parent} has {free} bytes free, but the {len(missing)} "
                f"files of {source} that are missing there need {total}: choose another folder, "
                "select fewer runs, or leave data.stage out"
            )
        log.info("copying %d files (%.2f GB) to %s", len(missing), total / 1e9, self.path)
        with (self.path / _DONE).open("a", encoding="utf-8") as done:
            for name in missing:
                sha = _copy(source / name, self.path / name)
                done.write(json.dumps({"file": name, "bytes": sizes[name], "sha256": sha}) + "\n")
                done.flush()

    def _here(self) -> set[str]:
        """Files that were copied whole, by this process or an earlier one."""
        path, found = self.path / _DONE, set()
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill: its file is copied again
            copy = self.path / entry["file"]
            if copy.is_file() and copy.stat().st_size == entry["bytes"]:
                found.add(str(entry["file"]))
        return found


def _lock_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DataError(f"data.stage: {path} cannot be made ({error.strerror})") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of the node at a time; a killed one lets go."""
    descriptor = _lock_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be copied ({error.strerror})") from None


def _copy(source: Path, target: Path) -> str:
    """Copy and read back; the SHA-256 of both.

    Raises:
        DataError: the disk is full, or the copy is not the source.
    """
    part = target.with_name(target.name + PART)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()
        with source.open("rb") as read, part.open("wb") as write:
            while block := read.read(_BLOCK):
                sha.update(block)
                write.write(block)
        with part.open("rb") as again:
            found = hashlib.file_digest(again, "sha256").hexdigest()
        if found != sha.hexdigest():
            raise DataError(f"{target} is not what was read from {source}: is the memory faulty?")
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{source} cannot be copied to {target} ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return found
