"""Files that are there completely or not at all and show damage, and a directory that one process owns at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from couplings_experiments.errors import UserError, explain_os_error

_UNFINISHED = (".couplings-", ".tmp")  # how the names of files begin and end that are being written
_OWNER = ".owner"


class Damaged(Exception):
    """A file does not hold what was written to it."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash at any moment, sees the old file or the new one."""
    prefix, suffix = _UNFINISHED
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        error.filename, error.filename2 = (
            str(path),
            None,
        )  # not the temporary name, which says nothing to the user
        raise


def sweep(directory: Path) -> None:
    """Delete what killed processes left half written in ``directory``, which nobody else writes to."""
    for path in directory.glob("*".join(_UNFINISHED)):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``value`` as indented JSON with a checksum, atomically; NaN is refused, because JSON has none."""
    plain = json.dumps(value, allow_nan=False)
    sealed = {"sha256": hashlib.sha256(plain.encode()).hexdigest(), **json.loads(plain)}
    write_atomic(path, (json.dumps(sealed, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote to ``path``, or None where there is no such file.

    Raises:
        Damaged: the file holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is not JSON") from None
    seal = value.pop("sha256", None) if isinstance(value, dict) else None
    if seal is None:
        raise Damaged(f"{path} has no checksum")
    if seal != hashlib.sha256(json.dumps(value).encode()).hexdigest():
        raise Damaged(f"{path} does not fit its checksum")
    return dict(value)


def make_directory(path: Path) -> None:
    """Create ``path`` and make sure that files can be written there."""
    prefix, suffix = _UNFINISHED
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe, name = tempfile.mkstemp(dir=path, prefix=prefix, suffix=suffix)
        os.close(probe)
        os.unlink(name)
    except FileExistsError:
        raise UserError(f"--out {path} is a file. Choose a directory with --out.") from None
    except NotADirectoryError:
        raise UserError(f"--out {path} lies under a file. Choose a directory with --out.") from None
    except OSError as error:
        raise explain_os_error(error, f"preparing --out {path}") from None


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Hold ``path`` for this process; a second process is refused. A killed process lets go by itself."""
    lock = filelock.FileLock(path / ".lock", timeout=0)
    owner = path / _OWNER  # beside the lock: some versions of filelock empty the lock file when they try it
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run{_process(owner)} is working in {path}. Wait for it or stop it, or choose another "
            "directory with --out."
        ) from None
    try:
        sweep(path)
        write_atomic(owner, str(os.getpid()).encode())
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _process(owner: Path) -> str:
    """The process that says in ``owner`` that it holds the lock; nothing if it does not say."""
    try:
        return f" (process {int(owner.read_bytes())})"
    except (OSError, ValueError):
        return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    """Make a rename durable. Where directories cannot be opened (Windows), the rename itself has to do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
