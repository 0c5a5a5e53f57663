"""Pushing: a run's model or an export to a hub repository or a folder."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import HeldBackError
from pipeline.events import PUSH, EventKind
from pipeline.progress import Progress
from pipeline.push.contents import Contents, contents_of
from pipeline.push.folder import Folder
from pipeline.push.hub import HUB, Repository
from pipeline.storage import locate, refuse_overlap
from pmet.errors import InputError


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        contents: what was pushed.
        url: where it is.
        changed: False if all of it was there already.
    """

    contents: Contents
    url: str
    changed: bool

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(map(self.contents.store.size, self.contents.files))


def push(
    source: str,
    destination: str,
    *,
    public: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a run's model, or an export, with its card.

    Args:
        source: path or URL of the folder of a finished run, or of an export.
        destination: ``hf://ORG/NAME``, ``hf://ORG/NAME@BRANCH``, or the path or URL of a folder
            that is empty or does not exist.
        public: create a public repository, or push to one.
        force: push what a gate held back.
        progress: shows what is uploaded; None shows nothing.

    Raises:
        InputError: an argument, the run or the destination cannot be used; nothing was uploaded.
        HeldBackError: a gate held the model back.
        FolderBusyError: another command is writing to the destination.
        StorageError: a file cannot be read or written, or the hub cannot be reached.
    """
    progress = progress or Progress()
    target = _destination(destination, source, public=public, progress=progress)
    contents = contents_of(source)
    if contents.held and not force:
        raise HeldBackError(
            f"a gate held the model of {source} back, so it is not pushed; see its report, or give "
            "--force to push it all the same, with a card that says so"
        )
    for text in _warnings(contents):
        progress.event(EventKind.WARNING, text)
    megabytes = sum(contents.store.size(name) // 10**6 for name in contents.files)
    with progress.stage(PUSH, megabytes) as bar:
        changed = target.push(contents, bar)
    return Pushed(contents, target.url, changed)


def _destination(url: str, source: str, *, public: bool, progress: Progress) -> Repository | Folder:
    if url.startswith(HUB):
        return Repository.of(url, public=public, progress=progress)
    if public:
        raise InputError(
            f"--public is for repositories ({HUB}ORG/NAME); who can read {url} is set in its "
            "storage"
        )
    refuse_overlap(("destination", url), [("pushed folder", locate(source))])
    return Folder(url)


def _warnings(contents: Contents) -> list[str]:
    held = "a gate held this model back; it is pushed because of --force" if contents.held else None
    return [text for text in (held, contents.warning) if text]
