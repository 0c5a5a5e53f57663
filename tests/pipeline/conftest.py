"""An S3 server on the loopback interface, for tests of what lies on object stores."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a new bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/runs/1"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def any_url(request: pytest.FixtureRequest) -> str:
    """A folder on each kind of storage in turn."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "run")
    return f"memory://{uuid.uuid4().hex}/run"
