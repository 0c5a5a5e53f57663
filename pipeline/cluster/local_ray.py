"""What a Ray cluster that is started here needs of this machine: a folder, and a token.

Ray keeps its sockets in the folder, so that its path has to be short and, as Ray takes it, ASCII.
Everyone who reaches the sockets can run anything as this user: the folder is closed to others.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster.ray_internals import SOCKET, reset_token
from pipeline.errors import StorageError
from pipeline.storage import can_write, make_own, own_folder, temporary_folder

RAY_FOLDER = "RAY_TMPDIR"
_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - a variable's name
_ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - only a closed folder in them is used
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
LONGEST_PATH = _LONGEST_SOCKET - len(SOCKET)
"""Bytes that the path of Ray's folder may have."""


def folder_for_ray() -> tuple[Path, str | None]:
    """A folder that Ray can use, and why it is not where the user would look for it.

    That is ``$RAY_TMPDIR/ray``, else ``ray`` in the user's own folder in the temporary folder, else
    the same in another temporary folder of the machine.

    Returns:
        The folder, which Ray makes, and the reason in words; None where it is the first choice.

    Raises:
        StorageError: no temporary folder of this machine can be used.
    """
    reasons: list[str] = []
    for name, folder in _choices():
        if fault := _unusable(folder) or _unmade(folder):
            reasons.append(f"{name}: {fault}")
        else:
            return folder, reasons[0] if reasons else None
    raise StorageError(
        f"Ray has no folder for its files on this machine; {'; '.join(reasons)}. Set {RAY_FOLDER} "
        f"to a folder of your own whose path is ASCII and has at most {LONGEST_PATH - 4} bytes"
    )


def _choices() -> Iterator[tuple[str, Path]]:
    """Folders that Ray might use, the best first, each with what its path follows from."""
    if named := os.environ.get(RAY_FOLDER):
        yield RAY_FOLDER, Path(named).absolute() / "ray"
    usual = temporary_folder()
    yield "TMPDIR" if os.environ.get("TMPDIR") else "temporary folder", own_folder(usual) / "ray"
    for other in _ELSEWHERE:
        yield other, own_folder(Path(other)) / "ray"


def _unusable(folder: Path) -> str | None:
    """What Ray has against a path; None if nothing."""
    if not str(folder).isascii():
        return f"Ray cannot use {folder}, it takes only ASCII"
    if len(str(folder)) > LONGEST_PATH:
        return f"Ray cannot use {folder}, it takes at most {LONGEST_PATH} bytes"
    return None


def _unmade(folder: Path) -> str | None:
    """Make the user's own folder around Ray's; why that cannot be done, or None."""
    try:
        if folder.parent == own_folder(folder.parent.parent):
            make_own(folder.parent)
    except (OSError, StorageError) as error:
        return str(error)
    return None if can_write(folder) else f"{folder} cannot be written"


def token() -> dict[str, str]:
    """The variable that gives a cluster that is started now a token of its own.

    Ray would make one in ``~/.ray``, which may not be there or not be writable. One that the user
    has is used as it is, and the variable left out.
    """
    forget_token()
    home = os.environ.get("HOME")
    kept = home is not None and os.access(Path(home, ".ray", "auth_token"), os.R_OK)
    given = any(os.environ.get(name) for name in (_TOKEN, f"{_TOKEN}_PATH"))
    return {} if kept or given else {_TOKEN: secrets.token_hex(32)}


def forget_token() -> None:
    """Have the next cluster, which may be another's, asked with the user's own token."""
    reset_token()
