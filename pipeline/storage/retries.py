"""Retries of storage operations that may succeed a moment later.

Connections break; services restart, are overloaded or respond too late. The libraries retry some of
these failures themselves, each in its own way and mostly for a second or two. Refused requests and
missing files are never retried.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE_S = 20.0
"""Seconds after the first attempt during which another may begin.

A run's lease on its folder is valid for longer than that after each check, so a late write is
still made by the holder.
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
# By name, so that no storage library has to be imported: botocore, aiohttp, azure.core.
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
    """Return the result of ``call``, retrying it while its failure may be temporary.

    Each pause is twice the previous one, starting at half a second, and is randomly shortened a
    little, so that many workers do not retry at the same moment.

    Raises:
        Exception: the last attempt's.
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
    """Whether the request may succeed a moment later: lost connections, time-outs, 5xx."""
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
    """The status that a service responded with, if the error came from one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None
