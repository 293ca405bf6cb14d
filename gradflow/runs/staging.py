"""Folders that appear by one atomic rename, once complete; until then hidden and locked.

Nothing is ever overwritten, and what a killed process left half-written is never read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradflow.errors import MeasurementError, UsageError

STAGING = ".gradflow-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(out: Path) -> Path:
    """Make sure, before anything is measured, that runs can be stored in `out`; leaves no trace.

    Returns:
        The folder itself, or the nearest above it that exists: temporary rows fit on its disk.

    Raises:
        UsageError: it cannot be made, or nothing can be written into it.
        MeasurementError: the disk is full.
    """
    nearest = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return nearest
    except OSError as error:
        if error.errno in _FULL:
            raise not_stored(out, error) from None
        rule = "--out is a folder that can be written to"
        raise UsageError(rule, f"{out} ({error.strerror})", "choose another --out") from None


def not_stored(out: Path, error: OSError) -> MeasurementError:
    """The error that says why a run is not stored, and what to do."""
    what = "disk full" if error.errno in _FULL else (error.strerror or str(error))
    return MeasurementError(
        f"the run could not be stored in {out}: {what}; "
        "free some space or choose another --out; nothing half-written remains"
    )


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Make a hidden folder in `out`, removed at the end unless it has been renamed away.

    A lock on the folder tells others that its owner lives; the system drops it with the process.
    """
    folder, lock = locked_folder(out, STAGING)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def locked_folder(out: Path, prefix: str) -> tuple[Path, int]:
    """A new hidden folder in `out`, and the lock that says its owner lives: a file descriptor."""
    out.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # another process took it for abandoned before it was locked


def remove_abandoned(out: Path) -> None:
    """Remove the staging folders of processes that are gone."""
    for folder in abandoned(out, STAGING):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(out: Path, prefix: str) -> Iterator[Path]:
    """Hidden folders whose owners are gone, each locked until the next is asked for."""
    for folder in sorted(out.glob(prefix + "*")):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # just removed or renamed by its owner
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        except BlockingIOError:
            continue  # its owner is at work
        finally:
            os.close(lock)


def publish(folder: Path, out: Path, name: str) -> Path:
    """Rename the folder to a name that is not taken yet."""
    for count in range(1, 1000):
        target = out / (name if count == 1 else f"{name}-{count}")
        try:
            # rename(2) replaces an empty folder only, and no run folder is empty.
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return target
    raise FileExistsError(errno.EEXIST, "a thousand runs of this name", str(out / name))
