"""What a storage fails at and does a moment later: tried again, for a while.

Connections break, services restart, are too busy or answer too late. The libraries try some of
that again by themselves, each in its own way and mostly for a second or two. What is refused or
not there stays so, and is never tried again.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE_S = 20.0
"""Seconds after the first try in which another may begin.

A run's lease on its folder is good for more than that from when it was last checked: what is
written late is still written by its holder.
"""
_FIRST_DELAY_S = 0.5
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_ERRNOS = frozenset({errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE})
_FINAL = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# By name, in place of an import of every storage library: botocore, aiohttp, azure.core.
_LOST = frozenset(
    {
        "HTTPClientError",
        "ConnectionError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)
_MISTRUSTED = frozenset({"SSLError", "ClientSSLError"})


def patiently(call: Callable[[], Result]) -> Result:
    """The result of ``call``, which is tried again while its failure may pass by itself.

    The pauses grow from half a second to twice the one before, and are drawn a little shorter, so
    that many workers do not come back at once.

    Raises:
        Exception: what the last try raised.
    """
    end = time.monotonic() + PATIENCE_S
    delay_s = _FIRST_DELAY_S
    while True:
        pause_s = delay_s * random.uniform(0.5, 1.0)
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + pause_s > end:
                raise
        time.sleep(pause_s)
        delay_s *= 2


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later: lost connections, time-outs, 5xx."""
    if isinstance(error, _FINAL):
        return False
    for cause in _causes(error):
        if (status := _http_status(cause)) is not None:
            return status in _BUSY
        names = {kind.__name__ for kind in type(cause).__mro__}
        if names & _MISTRUSTED:
            return False
        lost = isinstance(cause, TimeoutError) or bool(names & _LOST)
        if lost or getattr(cause, "errno", None) in _ERRNOS:
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _http_status(error: BaseException) -> int | None:
    """The status that a service answered with, where the error came from one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None
