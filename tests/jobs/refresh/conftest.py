"""Storages that a home may be on."""

from tests.pipeline.conftest import any_url, s3_server, s3_url

__all__ = ["any_url", "s3_server", "s3_url"]
