"""The user's folders on this machine: caches, and what libraries would otherwise keep in HOME.

Several users share a machine, and a container may have no HOME or a read-only one. A folder with a
fixed name in the temporary folder, which all users can write to, is used only if it belongs to this
user and is closed to all others: any of them may have prepared it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StorageError
from pmet.errors import InputError

CACHE_VARIABLE = "PMET_CACHE"
# For libraries that write below HOME: the variable that names another folder, and a folder for it.
# Not HF_HOME: the hub's token, and models that an image contains, can be read from such a HOME.
_LIBRARIES = {
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_HOME": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "HF_XET_CACHE": "xet",
    "HF_DATASETS_CACHE": "datasets",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}


def cache_folder() -> Path:
    """The folder for this user's caches on this machine; it is not created yet (see `make_cache`).

    That is ``$PMET_CACHE``, else ``pmet`` in ``$XDG_CACHE_HOME`` if it can be written to, else the
    user's own folder in the temporary folder.

    Raises:
        InputError: ``PMET_CACHE`` is a relative path, which each process resolves differently.
        StorageError: the machine has no temporary folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        if not os.path.isabs(named):
            raise InputError(
                f"{CACHE_VARIABLE}: {named!r} is relative, but processes run in several folders; "
                "give an absolute path"
            )
        return Path(named)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    if os.path.isabs(shared) and can_write(Path(shared, "pmet")):
        return Path(shared, "pmet")
    return own_folder(temporary_folder())


def hub_cache() -> Path | None:
    """The cache for hub models if the hub library's own folder cannot be written to; else None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    usual = Path(HF_HUB_CACHE)
    # Without a home this is relative: "~" in the working directory.
    return None if usual.is_absolute() and can_write(usual) else cache_folder() / "hub"


def make_cache(folder: Path) -> None:
    """Create a folder in the cache, unless it exists.

    Raises:
        StorageError: it cannot be created, or the temporary folder's belongs to another user.
    """
    own = own_folder(temporary_folder())
    with cache_failures(folder):
        if folder.is_relative_to(own):
            make_own(own)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def cache_failures(folder: Path) -> Iterator[None]:
    """Convert file system errors in a cache; the message says how to use another one."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the cache {folder} cannot be written to ({error.strerror or error}); set "
            f"{CACHE_VARIABLE} to a folder that you can write to"
        ) from error


def temporary_folder() -> Path:
    """The temporary folder: ``$TMPDIR`` if it can be written to, else the system's.

    Raises:
        StorageError: no temporary folder can be written to.
    """
    try:
        return Path(tempfile.gettempdir()).absolute()
    except FileNotFoundError as error:
        raise StorageError(f"{error}; set TMPDIR to a folder that you can write to") from error


def own_folder(temporary: Path) -> Path:
    """The name of this user's folder in a temporary folder."""
    return temporary / f"pmet-{os.getuid()}"


def make_own(folder: Path) -> None:
    """Create the folder that `own_folder` names, for this user only, unless it exists.

    Raises:
        StorageError: it belongs to another user, is open to others, or is a link.
        OSError: it cannot be created.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if fault := _fault(folder.lstat()):
        raise StorageError(
            f"{folder} {fault}, so other users could change its contents: remove it, or set "
            f"{CACHE_VARIABLE} (for models) and RAY_TMPDIR (for Ray) to folders of your own"
        )


def _fault(found: os.stat_result) -> str | None:
    """Why a folder is not trusted; None if it is."""
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}, not to you (user {os.getuid()})"
    if found.st_mode & 0o077:
        return f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o}, not 0700)"
    return None


def can_write(folder: Path) -> bool:
    """Whether files can be created in a folder, which itself may not exist yet."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def home_folder() -> Path | None:
    """The user's home; None if there is none, as for a user id without a name."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() else None


def libraries_environment() -> Mapping[str, str]:
    """Variables that point libraries away from a HOME that is missing or read-only.

    Empty if HOME can be written to; variables already set are left out.

    Raises:
        StorageError: there is no other folder that they could use.
    """
    home = home_folder()
    if home is not None and can_write(home):
        return {}
    cache = cache_folder()
    missing = {
        name: str(cache / part) for name, part in _LIBRARIES.items() if name not in os.environ
    }
    if missing:
        make_cache(cache)
    return missing
