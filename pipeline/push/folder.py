"""A folder on any storage that a push writes to: one that holds nothing else.

The file without which nothing opens the folder is written last but for the record of the push.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from pipeline.edits import check_claim, claim, is_claimed, refuse_used, release
from pipeline.errors import RunFolderError
from pipeline.progress import Stage
from pipeline.push.contents import RECORD, Contents
from pipeline.storage import CHUNK_BYTES, Store


class Folder:
    """A folder as the destination of a push.

    Attributes:
        store: its files.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)

    @property
    def url(self) -> str:
        """The folder's path or URL."""
        return self.store.url

    def push(self, contents: Contents, bar: Stage) -> bool:
        """Copy files into the folder; return whether there was anything to do.

        Args:
            contents: the files.
            bar: counts MB.

        Raises:
            OutputError: the folder holds something else.
            RunFolderError: a file is not the one that was recorded.
            FolderBusyError: another command has begun to write to it.
            StorageError: a file cannot be read or written.
        """
        if self._holds(contents):
            return False
        refuse_used(self.store)
        names = [*(name for name in contents.files if name != contents.last), contents.last]
        token = claim(self.store, {*names, RECORD}, contents.last)
        for name in names:
            check_claim(self.store, token)
            copy(contents, name, self.store)
            bar.advance(contents.store.size(name) // 10**6)
        check_claim(self.store, token)
        self.store.write_bytes(RECORD, contents.record)
        release(self.store)
        return True

    def _holds(self, contents: Contents) -> bool:
        """Whether an earlier push has put these files here, and all are there still."""
        store = self.store
        if store.is_file() or not store.exists(RECORD) or is_claimed(store):
            return False
        return store.read_bytes(RECORD) == contents.record and all(
            store.exists(name) and store.size(name) == contents.store.size(name)
            for name in contents.files
        )


def copy(contents: Contents, name: str, target: Store) -> None:
    """Copy a file; one that is not as recorded does not arrive.

    Raises:
        RunFolderError: its SHA-256 is another.
    """
    with contents.store.read_stream(name) as source, target.write_stream(name) as sink:
        digest = _copied(source, sink)
        if digest != contents.files[name]:
            raise damaged(contents, name)


def damaged(contents: Contents, name: str) -> RunFolderError:
    """The error for a file whose SHA-256 is not the recorded one."""
    return RunFolderError(
        f"{contents.store.join(name)} is damaged: its SHA-256 is not the recorded one; copy it "
        "again, or make it again"
    )


def _copied(source: BinaryIO, sink: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        sink.write(chunk)
    return digest.hexdigest()
