"""Failures of a hub as one sentence: what it refuses, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pipeline.errors import FolderBusyError, HubError, StorageError
from pmet.errors import PMETError

_FULL = frozenset({402, 413, 507})
_NO_ROOM = re.compile(r"storage|quota|too large|payment|limit (reached|exceeded)", re.IGNORECASE)
# By name: releases of the hub's library use requests, httpx or a successor of it.
_LOST = frozenset(
    {"TransportError", "RequestError", "RequestException", "ConnectionError", "TimeoutError"}
)
_LONGEST = 300


@contextmanager
def hub_failures(name: str, endpoint: str) -> Iterator[None]:
    """Convert what the hub's library raises.

    Args:
        name: the repository, ``ORG/NAME``.
        endpoint: the hub's address.

    Raises:
        HubError: the hub refuses the push as it is.
        FolderBusyError: the repository has changed meanwhile.
        StorageError: the hub cannot be reached, or has no room.
    """
    try:
        yield
    except PMETError:
        raise
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so no hub can be reached; unset it") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _explained(error, name, endpoint) from error
    except Exception as error:
        # Errors of httpx derive from none of those above.
        if not _is_lost(error):
            raise
        raise _explained(error, name, endpoint) from error


def _explained(error: Exception, name: str, endpoint: str) -> PMETError:
    answer = next((c for c in _causes(error) if isinstance(c, HfHubHTTPError)), None)
    if answer is not None:
        status = int(answer.response.status_code)
        return _of_status(status, _answered(answer), name, endpoint)
    if any(map(_is_lost, _causes(error))):
        return StorageError(
            f"cannot reach {endpoint} ({_one_line(error)}); check the network and HF_ENDPOINT, "
            "then push again: the repository shows nothing of this push"
        )
    if _NO_ROOM.search(str(error)):
        return _full(_one_line(error), name)
    if isinstance(error, ValueError):
        return HubError(f"{endpoint} refuses the push to {name}: {_one_line(error)}")
    return StorageError(
        f"cannot push to {name} ({_one_line(error)}); push again: the repository shows nothing of "
        "this push"
    )


def _of_status(status: int, said: str, name: str, endpoint: str) -> PMETError:
    answer = f"{status}: {said}" if said else str(status)
    if status in _FULL or (status == 403 and _NO_ROOM.search(said)):
        return _full(answer, name)
    match status:
        case 401:
            return HubError(
                f"{endpoint} does not accept the token in HF_TOKEN ({answer}); create another one "
                "with write access in the settings of your account"
            )
        case 403:
            return HubError(
                f"the token in HF_TOKEN may not write to {name} ({answer}); give it write access "
                "there, or name a repository of yours"
            )
        case 404:
            return HubError(
                f"{endpoint} knows no {name} that the token in HF_TOKEN can see ({answer}); check "
                "the name, the branch and the token's access"
            )
        case 409 | 412:
            return FolderBusyError(
                f"{name} changed during the push, which therefore committed nothing ({answer}); "
                "push again"
            )
        case _ if status == 429 or status >= 500:
            return StorageError(
                f"{endpoint} is not available ({answer}); push again later: the repository shows "
                "nothing of this push"
            )
    return HubError(f"{endpoint} refuses the push to {name} ({answer})")


def _full(reason: str, name: str) -> StorageError:
    return StorageError(
        f"there is no room for this push to {name} ({reason}); delete old revisions or "
        "repositories there, or raise the account's limit, then push again"
    )


def _answered(error: HfHubHTTPError) -> str:
    """What the server said, if anything."""
    return _cut(error.server_message or "")


def _one_line(error: Exception) -> str:
    return _cut(str(error)) or type(error).__name__


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _is_lost(error: BaseException) -> bool:
    return bool({kind.__name__ for kind in type(error).__mro__} & _LOST)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
