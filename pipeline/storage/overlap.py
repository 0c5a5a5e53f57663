"""Whether two paths or URLs overlap: they are the same place, or one lies inside the other.

Links, ``..``, ``~``, other spellings of a URL, bind mounts and letter case do not hide an overlap:
local paths are resolved, and compared by the files they lead to. For a chained URL
(``zip://model::/archives/m.zip``) the outermost file is checked as well.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import JobError
from pipeline.storage.store import is_local, opened

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Location:
    """A resolved path or URL.

    Attributes:
        root: what the path is relative to: empty for the local disk, else protocol and host.
        path: absolute and normalised.
        identities: device and inode of the path and of each folder around it, as far as they
            exist, innermost first. Empty for remote places.
    """

    root: str
    path: str
    identities: tuple[tuple[int, int] | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.root}{self.path.lstrip('/')}" if self.root else self.path

    def holds(self, other: Location) -> bool:
        """Whether ``other`` is this place or lies inside it."""
        if self.root != other.root:
            return False
        if other.path == self.path or other.path.startswith(f"{self.path.rstrip('/')}/"):
            return True
        here = self.identities[0] if self.identities else None
        return here is not None and here in other.identities

    def overlaps(self, other: Location) -> bool:
        """Whether one of the two places is or contains the other."""
        return self.holds(other) or other.holds(self)


def locate(url: str) -> list[Location]:
    """Return the places that a path or URL refers to; a chained URL has one per part.

    Raises:
        StorageError: no file system supports such a URL.
    """
    *wrappers, innermost = url.split("::")
    places = [_locate(innermost)]
    for wrapper in wrappers:
        # ``simplecache::s3://…`` refers to one place once, ``simplecache::file:///x::…`` twice.
        if wrapper.startswith(("file://", "local://")):
            places.append(_locate(wrapper))
    return places


def locate_pattern(pattern: str, matches: Iterable[str]) -> list[Location]:
    """Return the places that a path, URL or glob reads.

    A folder is one place, because files added to it are read the next time; so is the folder of
    a pattern with ``**``. Of any other glob only the files count. Links to files are followed.

    Args:
        pattern: as the user wrote it.
        matches: the files it matches.
    """
    places = [place for file in matches for place in locate(file)]
    if "**" in pattern:
        return [*places, *locate(_literal_prefix(pattern))]
    return places if _GLOB & set(pattern) else [*places, *locate(pattern)]


def refuse_overlap(output: tuple[str, str], read: Iterable[tuple[str, Sequence[Location]]]) -> None:
    """Refuse an output that is, contains, or lies inside something that is read.

    Args:
        output: its name in messages, and its path or URL.
        read: for each input, its name in messages and its places.

    Raises:
        JobError: with one line for each overlapping input.
        StorageError: no file system supports such a URL.
    """
    name, url = output
    target = locate(url)[0]
    problems = []
    for what, places in read:
        place = next((place for place in places if place.overlaps(target)), None)
        if place is not None:
            problems.append(
                f"{what}: {place} {_relation(place, target)} the {name} {url}, where it could be "
                f"overwritten or deleted; name another {name}"
            )
    if problems:
        raise JobError("\n".join(problems))


def refuse_inside(
    outputs: Iterable[tuple[str, str]], what: str, places: Sequence[Location]
) -> None:
    """Refuse outputs that lie inside an input which must not change.

    Args:
        outputs: for each, its name in messages, and its path or URL.
        what: the input's name in messages.
        places: the places of the input.

    Raises:
        JobError: with one line for each such output.
    """
    problems = [
        f"{name}: {url} lies inside the {what} {place}, which must not be written to; name "
        "another folder"
        for name, url in outputs
        for place in places
        if place.holds(locate(url)[0])
    ]
    if problems:
        raise JobError("\n".join(problems))


def _relation(place: Location, target: Location) -> str:
    if not place.holds(target):
        return "lies inside"
    return "is" if target.holds(place) else "holds"


def _locate(url: str) -> Location:
    fs, path = opened(url)
    if is_local(fs):
        resolved = os.path.realpath(path)
        return Location("", resolved, tuple(_identities(Path(resolved))))
    protocol = fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])
    host = fs.storage_options.get("host", "")
    return Location(f"{protocol}://{host}", posixpath.normpath(f"/{path.lstrip('/')}"))


def _identities(path: Path) -> Iterator[tuple[int, int] | None]:
    for place in (path, *path.parents):
        try:
            found = place.stat()
        except OSError:
            yield None
        else:
            yield found.st_dev, found.st_ino


def _literal_prefix(pattern: str) -> str:
    """The innermost folder that a pattern names without wildcards."""
    kept = []
    for part in pattern.split("/"):
        if _GLOB & set(part):
            break
        kept.append(part)
    prefix = "/".join(kept)
    # The part of a URL or absolute path before its first folder.
    if not prefix:
        return "/" if pattern.startswith("/") else "."
    return f"{prefix}/" if prefix.endswith(":/") else prefix
