"""What a user is meant to see of an error: a single line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch


class UserError(Exception):
    """Something the user can put right: the message says what was found and what to do."""

    exit_code = 1


def explain_os_error(error: OSError, doing: str) -> UserError:
    """A single line for an operating-system error met while ``doing`` something."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"disk full while {doing}{where}: nothing was left half written. Free some space and add --resume."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"no permission while {doing}{where}. Make it writable, or choose another place with --out."
        )
    return UserError(f"{error.strerror or error} while {doing}{where}.")


class OutOfMemory(UserError):
    """Another attempt may succeed, or a smaller run."""


def explain_memory_error(error: Exception, doing: str) -> OutOfMemory | None:
    """A single line if ``error``, met while ``doing`` something, says that memory ran out, on a processor or a GPU."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in text:
        return None  # torch's allocator on a CPU raises a plain RuntimeError
    said = text.strip().partition("\n")[0]
    return OutOfMemory(
        f"out of memory while {doing}{said and f' ({said})'}. Every finished epoch is kept: free some memory and add "
        "--resume, or start a smaller run in another --out (--preset quick or smoke, fewer --seeds)."
    )


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an operating-system error met while ``doing`` something into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, doing) from None
