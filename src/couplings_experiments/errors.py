"""The one exception that a user is meant to see, as a single line."""

from __future__ import annotations

import errno


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
        return UserError(f"no permission while {doing}{where}. Choose another place with --out.")
    return UserError(f"{error.strerror or error} while {doing}{where}.")
