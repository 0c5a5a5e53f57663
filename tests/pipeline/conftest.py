"""Where a folder may be: the local disk, memory, S3."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture(params=["local", "memory", "s3"])
def any_url(request: pytest.FixtureRequest) -> str:
    """A folder on each kind of storage in turn."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "run")
    return f"memory://{uuid.uuid4().hex}/run"
