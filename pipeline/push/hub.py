"""A model repository on a hub as the destination of a push, which makes one commit.

The commit comes last and names the one that it follows: what an interrupted push has uploaded by
then is in no revision, and of two pushes at once only one succeeds. The token is read from the
environment only. A token that `hf auth login` has stored is not used: which account a nightly job
writes as should not depend on who has logged in on its machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    HFValidationError,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from pipeline.errors import HubError
from pipeline.events import EventKind
from pipeline.progress import Progress, Stage
from pipeline.push.contents import RECORD, Contents, written_files
from pipeline.push.folder import damaged
from pipeline.push.hub_failures import hub_failures

HUB = "hf://"
TOKEN, ENDPOINT = "HF_TOKEN", "HF_ENDPOINT"
_MAIN = "main"
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_WRITE = f"write {HUB}ORG/NAME or {HUB}ORG/NAME@BRANCH"
# The hub itself writes it into every new repository.
_OF_HUB = frozenset({".gitattributes"})
_SHOWN = 3


@dataclass(frozen=True)
class _There:
    """The state of a repository before a push.

    Attributes:
        revision: what the push starts from.
        commit: its commit.
        files: its files, by name.
        ours: names of those that an earlier push wrote; None if there was none.
    """

    revision: str
    commit: str
    files: Mapping[str, RepoFile]
    ours: frozenset[str] | None


class Repository:
    """A model repository on a hub.

    Attributes:
        name: ``ORG/NAME``.
        branch: the branch that is written to.
        public: whether it is, or will be, public.
    """

    def __init__(
        self, api: HfApi, name: str, branch: str, *, public: bool, progress: Progress
    ) -> None:
        self._api, self._progress = api, progress
        self.name, self.branch, self.public = name, branch, public

    @classmethod
    def of(cls, url: str, *, public: bool, progress: Progress) -> Repository:
        """Read a repository's URL, and the token and the hub's address from the environment.

        Raises:
            HubError: the URL names no model repository, or there is no token.
        """
        name, branch = _parsed(url)
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            raise HubError(
                f"{TOKEN} is not set: pmet push takes the hub's token from there, and from nowhere "
                "else; create one with write access in the settings of your account"
            )
        endpoint = os.environ.get(ENDPOINT, "").strip().rstrip("/") or None
        api = HfApi(endpoint=endpoint, token=token, library_name="pmet")
        return cls(api, name, branch, public=public, progress=progress)

    @property
    def url(self) -> str:
        """The address of the branch, for browsers."""
        return f"{self._api.endpoint}/{self.name}/tree/{self.branch}"

    def push(self, contents: Contents, bar: Stage) -> bool:
        """Commit files to the branch; return whether there was anything to do.

        Args:
            contents: the files.
            bar: counts MB.

        Raises:
            HubError: the hub refuses, or the repository holds other files.
            RunFolderError: a file is not the one that was recorded.
            FolderBusyError: the branch has moved during the push.
            StorageError: a file cannot be read, or the hub cannot be reached or has no room.
        """
        with hub_failures(self.name, self._api.endpoint), self._quietly():
            there = self._opened()
            self._refuse_foreign(there, contents)
            changed = [name for name in contents.files if not _holds(there, contents, name)]
            stale = sorted((there.ours or frozenset()) & there.files.keys() - contents.files.keys())
            if not (changed or stale or not _holds_record(there, contents)):
                return False
            if there.revision != self.branch:
                self._api.create_branch(self.name, branch=self.branch, revision=there.commit)
            self._commit(there, contents, changed, stale, bar)
            return True

    def _opened(self) -> _There:
        """The repository's state; it is created if it does not exist."""
        try:
            info = self._api.model_info(self.name)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
            self._api.create_repo(self.name, private=not self.public)
        else:
            self._refuse_visibility(bool(info.private))
        revision = self.branch
        try:
            info = self._api.model_info(self.name, revision=revision)
        except RevisionNotFoundError:
            if revision == _MAIN or revision.startswith("refs/"):
                raise
            revision = _MAIN
            info = self._api.model_info(self.name, revision=revision)
        commit = str(info.sha)
        found = self._api.list_repo_tree(self.name, recursive=True, revision=commit)
        files = {file.path: file for file in found if isinstance(file, RepoFile)}
        return _There(revision, commit, files, self._ours(commit) if RECORD in files else None)

    def _ours(self, commit: str) -> frozenset[str] | None:
        with tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.name, RECORD, revision=commit, local_dir=folder)
            try:
                files = written_files(json.loads(Path(path).read_bytes()))
            except ValueError:
                return None
        return None if files is None else frozenset(files)

    def _refuse_visibility(self, private: bool) -> None:
        if private and self.public:
            raise HubError(
                f"{self.name} is private, and a push does not change that: leave --public out, or "
                "change its visibility in its settings"
            )
        if not private and not self.public:
            raise HubError(
                f"{self.name} is public: give --public to push there, or name another repository"
            )

    def _refuse_foreign(self, there: _There, contents: Contents) -> None:
        """Refuse to mix with or overwrite files that no push wrote."""
        foreign = there.files.keys() - _OF_HUB
        if there.ours is not None:
            foreign = foreign & contents.files.keys() - there.ours
        if foreign:
            more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
            some = ", ".join(sorted(foreign)[:_SHOWN])
            raise HubError(
                f"{self.name} holds {some}{more}, which no push wrote; delete that, or name "
                "a repository that is empty or does not exist"
            )

    def _commit(
        self, there: _There, contents: Contents, changed: list[str], stale: list[str], bar: Stage
    ) -> None:
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        for name in contents.files:
            if name in changed:
                bar.note(name)
                operations.append(self._uploaded(contents, name))
            bar.advance(contents.store.size(name) // 10**6)
        operations.append(self._announced(CommitOperationAdd(RECORD, contents.record)))
        self._api.create_commit(
            self.name,
            operations,
            commit_message=contents.title,
            commit_description=contents.description,
            revision=self.branch,
            parent_commit=there.commit,
        )

    def _uploaded(self, contents: Contents, name: str) -> CommitOperationAdd:
        """Upload a file for the commit; a copy of a remote one is on this machine meanwhile."""
        with contents.store.local_copy(name) as path:
            addition = CommitOperationAdd(name, str(path))
            if addition.upload_info.sha256.hex() != contents.files[name]:
                raise damaged(contents, name)
            self._announced(addition)
            if isinstance(addition.path_or_fileobj, str):
                # A small file: the commit itself carries it.
                addition.path_or_fileobj = path.read_bytes()
        return addition

    def _announced(self, addition: CommitOperationAdd) -> CommitOperationAdd:
        """Ask the hub how it wants a file, and upload it if it is large."""
        # Without .gitignore rules: the repository's own could leave out weights.
        self._api.preupload_lfs_files(
            self.name, [addition], revision=self.branch, gitignore_content=""
        )
        return addition

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Show the library's warnings as events, and no bars beside those of the command."""
        hidden = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            if not hidden:
                enable_progress_bars()
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                text = " ".join(str(warning.message).split())
                self._progress.event(EventKind.WARNING, text)


def _parsed(url: str) -> tuple[str, str]:
    name, at, branch = url.removeprefix(HUB).partition("@")
    parts = name.strip("/").split("/")
    if parts[0] in _OTHER_KINDS:
        raise HubError(f"{url} is none of the hub's models, which alone can be pushed; {_WRITE}")
    if parts[0] == "models":
        parts = parts[1:]
    if len(parts) != 2 or (at and not branch):
        raise HubError(f"{url} names no repository; {_WRITE}")
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise HubError(f"{url} names a commit, which cannot change; {_WRITE}")
    try:
        validate_repo_id("/".join(parts))
    except HFValidationError as error:
        raise HubError(f"{url}: {' '.join(str(error).split())}; {_WRITE}") from None
    return "/".join(parts), branch or _MAIN


def _holds(there: _There, contents: Contents, name: str) -> bool:
    """Whether a repository has a file with the same content."""
    file = there.files.get(name)
    if file is None or file.size != contents.store.size(name):
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == contents.files[name])
    return bool(file.blob_id == _blob(contents.store.read_bytes(name)))


def _holds_record(there: _There, contents: Contents) -> bool:
    file = there.files.get(RECORD)
    return file is not None and file.blob_id == _blob(contents.record)


def _blob(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data), usedforsecurity=False).hexdigest()
