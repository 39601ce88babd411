"""Files that are either there completely or not at all, and a directory that one run owns at a time."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from couplings_experiments.errors import UserError, explain_os_error


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash at any moment, sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically; NaN is refused, because JSON has none."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in ``path``, or None where there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def make_directory(path: Path) -> None:
    """Create ``path`` and make sure that files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe, name = tempfile.mkstemp(dir=path, prefix=".probe")
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
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is working in {path}. Wait for it, or choose another directory with --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


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
