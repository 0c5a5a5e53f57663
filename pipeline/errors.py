"""The exceptions of the engine.

They extend the tree of ``pmet.errors``:

    PMETError
    ├── InputError
    │   ├── JobError            a job file, key or value
    │   │   └── NoPresetError   hparams is missing, and no preset fits the model
    │   ├── RequestTableError   a request file that cannot be read, or a column that is missing
    │   │   └── NothingToEditError
    │   ├── FactDumpError       a fact dump, a templates file or a dataset to convert
    │   ├── ScheduleError       a schedule, its cron expression or its time zone
    │   ├── RunFolderError      a run folder that does not fit the job
    │   │   └── OtherJobError   it holds the work of another job
    │   ├── OutputError         an output file that already exists and belongs to the user
    │   ├── HubError            a hub refuses a push as it is
    │   └── ModelError          a model that cannot be opened
    ├── StorageError            a file that cannot be read, written or listed
    ├── FolderBusyError         another run is using the folder; try again later
    ├── HeldBackError           a gate held a model back, which is therefore not pushed
    ├── ClusterError            a cluster's job server is unreachable or refuses the request
    ├── NoEditError             no request got a target, though some were to be edited
    ├── LeaseLostError          another run has taken over the run folder
    └── WorkerError             a worker or a rank failed
        └── NoRoomError         the cluster had no room for workers or ranks in time
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.failures import FailureKind
from pmet.errors import InputError, PMETError

if TYPE_CHECKING:
    import pyarrow as pa


class JobError(InputError):
    """A job file is wrong; the message has one line for each problem."""


class NoPresetError(JobError):
    """A job does not say which hyper-parameters to use, and no preset fits its model.

    Attributes:
        depth: number of layers of the model.
    """

    def __init__(self, message: str, depth: int) -> None:
        super().__init__(message)
        self.depth = depth


class RequestTableError(InputError):
    """The request files cannot be read, or lack a column; the message names file and column."""


class NothingToEditError(RequestTableError):
    """No request can be edited.

    Attributes:
        rejected: all rows, each with its reason.
    """

    def __init__(self, message: str, rejected: pa.Table) -> None:
        super().__init__(message)
        self.rejected = rejected


class FactDumpError(InputError):
    """A fact dump, a templates file or a dataset cannot be used; the message names it."""


class ScheduleError(InputError):
    """A schedule is missing, exists already, or has a value that cannot be used."""


class RunFolderError(InputError):
    """A run folder is missing, incomplete, or belongs to another job."""


class OtherJobError(RunFolderError):
    """A run folder holds the work of another job.

    Attributes:
        url: the folder.
        changed: what differs, by the name of its digest, with details where known.
    """

    def __init__(self, url: str, changed: Mapping[str, str]) -> None:
        what = ", ".join(f"{name} ({text})" if text else name for name, text in changed.items())
        super().__init__(
            f"{url} holds a run of another job: {what} changed; name another output, or start over "
            "with --fresh"
        )
        self.url, self.changed = url, dict(changed)


class OutputError(InputError):
    """An output file already exists and belongs to the user, or is also an input."""


class ModelError(InputError):
    """A model cannot be opened: it is missing, incomplete, or in a format that is refused."""


class HubError(InputError):
    """A hub refuses a push as it is: the token, the repository's name, or what it holds."""


class StorageError(PMETError):
    """A file cannot be read, written or listed; the message names it and the remedy."""


class FolderBusyError(PMETError):
    """Another run holds the folder. The job itself is fine and can be tried again."""


class HeldBackError(PMETError):
    """A gate held an edited model back, which is therefore not pushed."""


class ClusterError(PMETError):
    """The job server of a cluster is unreachable, or refuses the request."""


class NoEditError(PMETError):
    """No fact was edited, though some were to be; the message gives the most frequent reasons."""


class LeaseLostError(PMETError):
    """Another run has taken over this run's folder; this run stopped before writing anything."""


class WorkerError(PMETError):
    """A worker or a rank failed.

    Attributes:
        cause_text: what the worker itself reported, traceback included; empty if its process
            exited without an error message.
        kind: decides how the failure is handled.
    """

    def __init__(
        self, message: str, *, cause_text: str = "", kind: FailureKind = FailureKind.OTHER
    ) -> None:
        super().__init__(message)
        self.cause_text, self.kind = cause_text, kind


class NoRoomError(WorkerError):
    """The cluster had no room for workers or ranks in time; retrying would wait as long again."""
