"""Retries: which errors are retried, which are not, and for how long."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

import aiohttp
import botocore.exceptions as boto
import pytest
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from pipeline.storage import retries
from pipeline.storage.retries import is_transient, patiently


def answered(code: str, status: int) -> Exception:
    """Return the error that s3fs raises for an answer of S3."""
    said = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(said, "PutObject"))


PASSING = [
    ConnectionResetError("reset by peer"),
    BrokenPipeError(),
    TimeoutError("no answer"),
    FSTimeoutError(),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.ENETUNREACH, "no route"),
    boto.EndpointConnectionError(endpoint_url="http://x"),
    boto.ConnectTimeoutError(endpoint_url="http://x"),
    boto.ReadTimeoutError(endpoint_url="http://x"),
    boto.ConnectionClosedError(endpoint_url="http://x"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    answered("InternalError", 500),
    answered("SlowDown", 503),
    answered("Unheard", 502),
    answered("TooManyRequests", 429),
]
STAYING = [
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "no"),
    FileExistsError(),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("not Parquet"),
    boto.NoCredentialsError(),
    boto.SSLError(endpoint_url="https://x", error="certificate"),
    answered("AccessDenied", 403),
    answered("ExpiredToken", 400),
    answered("NoSuchBucket", 404),
    answered("PreconditionFailed", 412),
    answered("NotImplemented", 501),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_what_stays(error: Exception) -> None:
    assert not is_transient(error)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records pauses, on a clock that only they advance."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(made))
    return made


def failing(times: int, error: Exception) -> Callable[[], int]:
    tries = 0

    def call() -> int:
        nonlocal tries
        tries += 1
        if tries <= times:
            raise error
        return tries

    return call


def test_the_pauses_grow(pauses: list[float]) -> None:
    assert patiently(failing(4, ConnectionResetError())) == 5
    assert len(pauses) == 4
    assert all(0.5 <= pause / (0.5 * 2**n) <= 1 for n, pause in enumerate(pauses))


def test_patience_ends(pauses: list[float]) -> None:
    with pytest.raises(ConnectionResetError):
        patiently(failing(99, ConnectionResetError()))
    assert 0 < sum(pauses) <= retries.PATIENCE_S
    assert 5 <= len(pauses) <= 7


def test_what_stays_is_tried_once(pauses: list[float]) -> None:
    with pytest.raises(PermissionError):
        patiently(failing(1, PermissionError()))
    assert pauses == []
