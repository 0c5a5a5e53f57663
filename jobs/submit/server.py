"""The job server of a Ray cluster: where it is, and what it says when it does not answer.

Ray's client is used as it is; here its errors are told with what to do about them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray import exceptions as ray_exceptions

from pipeline.cluster import environment, knock, one_line, quiet_job_client
from pipeline.errors import ClusterError

ADDRESS = "RAY_API_SERVER_ADDRESS"
DASHBOARD_PORT = 8265
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
INSTALL = "pip install 'pmet-pipeline[cluster]'"
_MISSING = f"submitting needs the client of Ray's job server: {INSTALL} (it brings ray[default])"
_AUTHENTICATION = getattr(ray_exceptions, "AuthenticationError", ())
_HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token, and give the cluster's token in RAY_AUTH_TOKEN, in a file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
)


class JobServer:
    """The job server of one cluster.

    Attributes:
        address: as it was given, for people.
    """

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self.address = address

    @classmethod
    def at(cls, address: str | None) -> JobServer:
        """Find a cluster's job server.

        Args:
            address: ``http://HEAD:8265``, or whatever else Ray takes: ``ray://…``, ``auto``,
                ``HOST:6379``. None: what the environment names, else a cluster of this machine.

        Raises:
            ClusterError: it does not answer, refuses, or Ray's client is not installed.
        """
        try:
            import aiohttp  # noqa: F401  # Ray's client tells logs with it
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ClusterError(f"{_MISSING}; missing is {error.name}") from None
        quiet_job_client()
        where = _whole(address)
        _knock(where)
        # To Ray, the environment comes before what its client is told; here it is the other way.
        named = {} if where is None else {ADDRESS: where}
        with environment(named), _explained(where or "this machine's cluster"):
            client = JobSubmissionClient(where)
        return cls(client, where or client.get_address())

    def submit(
        self,
        name: str,
        entrypoint: str,
        *,
        folder: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        """Submit a job; returns False where there is one of this name already.

        Args:
            name: of the job.
            entrypoint: command; the copied folder is where it runs.
            folder: copied to the cluster.
            environment: variables of the command and of all workers; anybody may read them.
            metadata: kept with the job; anybody may read it.
        """
        runtime = {"working_dir": str(folder), "env_vars": dict(environment)}
        try:
            with _explained(self.address):
                self._client.submit_job(
                    submission_id=name,
                    entrypoint=entrypoint,
                    runtime_env=runtime,
                    metadata=dict(metadata),
                )
        except ClusterError:
            # Whoever else submitted the same a moment ago was faster.
            if self.find(name) is not None:
                return False
            raise
        return True

    def jobs(self) -> list[Any]:
        """All jobs that were submitted to the cluster, as Ray describes them."""
        with _explained(self.address):
            return list(self._client.list_jobs())

    def find(self, name: str) -> Any | None:
        """A submitted job; None where the cluster does not know it."""
        return next((job for job in self.jobs() if job.submission_id == name), None)

    def stop(self, name: str) -> None:
        """Tell a job to stop."""
        with _explained(self.address):
            self._client.stop_job(name)

    def logs(self, name: str) -> str:
        """All that a job has printed."""
        with _explained(self.address):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, say: Callable[[str], None], shown: int = 0) -> int:
        """Say what a job prints until it ends; returns how many characters it has printed.

        Args:
            name: of the job.
            say: called with each piece.
            shown: characters that have been said already, before a connection was lost.
        """

        async def tell() -> int:
            told = 0
            async for piece in self._client.tail_job_logs(name):
                if told + len(piece) > shown:
                    say(piece[max(0, shown - told) :])
                told += len(piece)
            return told

        with _explained(self.address):
            return max(shown, asyncio.run(tell()))


def _whole(address: str | None) -> str | None:
    """An address that Ray understands as it was meant: to Ray, HOST:PORT is no dashboard."""
    if address and address.endswith(f":{DASHBOARD_PORT}") and "://" not in address:
        return f"http://{address}"
    return address


def _knock(where: str | None) -> None:
    """Fail at once where nobody listens: the client would wait for minutes."""
    if where is None or not where.startswith(("http://", "https://")):
        return
    if requests.utils.get_environ_proxies(where):
        return
    parts = urlsplit(where)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        knock(f"{parts.hostname}:{port}")
    except OSError as error:
        raise ClusterError(_unreachable(where, str(error))) from None


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Tell what Ray's client raises, with what to do."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
        raise ClusterError(_explanation(where, error)) from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise ClusterError(_explanation(where, error)) from error


def _of_the_network(error: Exception) -> bool:
    return isinstance(error, _AUTHENTICATION) or type(error).__module__.startswith("aiohttp")


def _explanation(where: str, error: Exception) -> str:
    text = one_line(str(error)) or type(error).__name__
    status = _http_status(error, text)
    if isinstance(error, _AUTHENTICATION) or status in (401, 403):
        refused = status == 403 or "invalid" in text.lower()
        how = "does not accept this token" if refused else "asks for a token, and none was given"
        code = f" (HTTP {status})" if status else ""
        return (
            f"the cluster at {where} {how}{code}: {_HOW_TO_AUTHENTICATE} (on the head, `ray "
            f"get-auth-token` shows it). A proxy may want credentials of its own. It said: {text}"
        )
    if status is not None:
        return f"the job server at {where} refuses (HTTP {status}): {text}"
    if isinstance(error, OSError) or "connect" in text.lower():
        return _unreachable(where, text)
    if "running Ray" in text:
        return (
            f"there is no Ray cluster on this machine; name one: --address "
            f"http://HEAD:{DASHBOARD_PORT}"
        )
    return f"the job server at {where} refuses: {text}"


def _http_status(error: Exception, text: str) -> int | None:
    """The status that a server answered with; None if none was heard."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    if isinstance(error, _AUTHENTICATION):
        # Ray's own error tells it in words.
        return 403 if "Forbidden" in text else 401 if "Unauthorized" in text else None
    found = re.search(r"status(?: code|=)\s*'?(\d{3})", text)
    return int(found[1]) if found else None


def _unreachable(where: str, reason: str) -> str:
    return (
        f"no job server answers at {where} ({reason}). Give the address of the dashboard, "
        f"http://HEAD:{DASHBOARD_PORT}; from outside, forward its port (`ray dashboard "
        "cluster.yaml`, `kubectl port-forward`); and the head needs ray[default], which "
        f"{INSTALL} brings there"
    )
