"""Error messages about a cluster's job server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from socket import socket

import pytest

from jobs.submit.server import JobServer
from pipeline.errors import ClusterError


@contextmanager
def answering(status: int, text: str) -> Iterator[str]:
    """Start a server that gives the same answer to every request; return its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def unused() -> str:
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, "Unauthorized: Missing authentication token", "requires a token, and none was given"),
        (403, "Forbidden: Invalid authentication token", "does not accept this token"),
    ],
)
def test_a_refused_token_is_explained(status: int, text: str, said: str) -> None:
    with (
        answering(status, text) as address,
        pytest.raises(ClusterError, match=rf"{said} \(HTTP {status}\): set RAY_AUTH_MODE=token"),
    ):
        JobServer.at(address)


def test_an_address_without_a_server_fails_at_once() -> None:
    with pytest.raises(ClusterError, match=r"no job server answers .*8265.*ray\[default\]"):
        JobServer.at(unused())


def test_a_server_that_is_not_rays_is_an_error() -> None:
    with answering(500, "out of order") as address, pytest.raises(ClusterError, match="HTTP 500"):
        JobServer.at(address)


def test_the_address_given_comes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", unused())
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", unused())
    with answering(200, json.dumps({"ray_version": "2.60.0"})) as address:
        assert JobServer.at(address).address == address


def test_a_client_that_is_not_installed_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ClusterError, match=r"pip install 'pmet-pipeline\[cluster\]'"):
        JobServer.at("http://127.0.0.1:1")
