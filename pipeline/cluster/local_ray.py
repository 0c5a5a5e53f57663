"""What a Ray cluster started here needs on this machine: a folder and a token.

Ray keeps its sockets in the folder, so the folder's path must be short and, for Ray, ASCII. Anyone
who can reach the sockets can run code as this user, so the folder is closed to others.
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
"""Maximum length in bytes of the path of Ray's folder."""


def folder_for_ray() -> tuple[Path, str | None]:
    """Return a folder that Ray can use, and the reason if it is not the expected one.

    That is ``$RAY_TMPDIR/ray``, else ``ray`` in the user's own folder in the temporary folder, else
    the same in another temporary folder of the machine.

    Returns:
        The folder, which Ray creates, and the reason as text; None if it is the first choice.

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
    """Folders that Ray might use, best first, each with the variable that determines its path."""
    if named := os.environ.get(RAY_FOLDER):
        yield RAY_FOLDER, Path(named).absolute() / "ray"
    usual = temporary_folder()
    yield "TMPDIR" if os.environ.get("TMPDIR") else "temporary folder", own_folder(usual) / "ray"
    for other in _ELSEWHERE:
        yield other, own_folder(Path(other)) / "ray"


def _unusable(folder: Path) -> str | None:
    """Why Ray cannot use a path; None if it can."""
    if not str(folder).isascii():
        return f"Ray cannot use {folder}: it accepts only ASCII"
    if len(str(folder)) > LONGEST_PATH:
        return f"Ray cannot use {folder}: it accepts at most {LONGEST_PATH} bytes"
    return None


def _unmade(folder: Path) -> str | None:
    """Create the user's own folder around Ray's; return why that fails, or None."""
    try:
        if folder.parent == own_folder(folder.parent.parent):
            make_own(folder.parent)
    except (OSError, StorageError) as error:
        return str(error)
    return None if can_write(folder) else f"{folder} cannot be written to"


def token() -> dict[str, str]:
    """The variable that gives a cluster about to start a token of its own.

    Ray would otherwise create one in ``~/.ray``, which may be missing or read-only. If the user has
    a token, it is used and the variable is left out.
    """
    reset_token()
    home = os.environ.get("HOME")
    kept = home is not None and os.access(Path(home, ".ray", "auth_token"), os.R_OK)
    given = any(os.environ.get(name) for name in (_TOKEN, f"{_TOKEN}_PATH"))
    return {} if kept or given else {_TOKEN: secrets.token_hex(32)}
