"""The client of a Ray cluster's job server.

It wraps Ray's own client, finds the server, and turns its errors into messages with a remedy.
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
_MISSING = f"submitting needs the client of Ray's job server: {INSTALL} (it installs ray[default])"
_AUTHENTICATION = getattr(ray_exceptions, "AuthenticationError", ())
_HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN, in the file named by "
    "RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)


class JobServer:
    """The job server of one cluster.

    Attributes:
        address: the address as given, for messages.
    """

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self.address = address

    @classmethod
    def at(cls, address: str | None) -> JobServer:
        """Connect to a cluster's job server.

        Args:
            address: ``http://HEAD:8265``, or any other form that Ray accepts: ``ray://…``,
                ``auto``, ``HOST:6379``. None: the one in the environment, else a cluster on this
                machine.

        Raises:
            ClusterError: it does not answer, it refuses, or Ray's client is not installed.
        """
        try:
            import aiohttp  # noqa: F401  # Ray's client needs it to stream logs
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ClusterError(f"{_MISSING}; missing is {error.name}") from None
        quiet_job_client()
        where = _whole(address)
        _knock(where)
        # For Ray the environment overrides the argument; here the argument overrides it.
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
        """Submit a job; return False if there already is one with this name.

        Args:
            name: name of the job.
            entrypoint: command, run in the uploaded folder.
            folder: folder to upload to the cluster.
            environment: variables of the command and all workers; readable by every user.
            metadata: metadata stored with the job; readable by every user.
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
            # Another client may have submitted the same job a moment earlier.
            if self.find(name) is not None:
                return False
            raise
        return True

    def jobs(self) -> list[Any]:
        """Return all jobs submitted to the cluster, as Ray describes them."""
        with _explained(self.address):
            return list(self._client.list_jobs())

    def find(self, name: str) -> Any | None:
        """Return a submitted job; None if the cluster does not know it."""
        return next((job for job in self.jobs() if job.submission_id == name), None)

    def stop(self, name: str) -> None:
        """Ask a job to stop."""
        with _explained(self.address):
            self._client.stop_job(name)

    def logs(self, name: str) -> str:
        """Return all output of a job."""
        with _explained(self.address):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, say: Callable[[str], None], shown: int = 0) -> int:
        """Pass on a job's output until it ends; return the number of characters printed.

        Args:
            name: name of the job.
            say: called with each piece of output.
            shown: number of characters passed on before a connection was lost.
        """

        async def stream() -> int:
            printed = 0
            async for piece in self._client.tail_job_logs(name):
                if printed + len(piece) > shown:
                    say(piece[max(0, shown - printed) :])
                printed += len(piece)
            return printed

        with _explained(self.address):
            return max(shown, asyncio.run(stream()))


def _whole(address: str | None) -> str | None:
    """Add http:// to the dashboard's HOST:PORT, which Ray would take for a GCS address."""
    if address and address.endswith(f":{DASHBOARD_PORT}") and "://" not in address:
        return f"http://{address}"
    return address


def _knock(where: str | None) -> None:
    """Fail at once if nothing listens at the address: the client would wait for minutes."""
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
    """Turn errors of Ray's client into ``ClusterError`` with a remedy."""
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
        how = "does not accept this token" if refused else "requires a token, and none was given"
        code = f" (HTTP {status})" if status else ""
        return (
            f"the cluster at {where} {how}{code}: {_HOW_TO_AUTHENTICATE} (on the head, `ray "
            f"get-auth-token` shows it). A proxy may require credentials of its own. Answer: {text}"
        )
    if status is not None:
        return f"the job server at {where} refused (HTTP {status}): {text}"
    if isinstance(error, OSError) or "connect" in text.lower():
        return _unreachable(where, text)
    if "running Ray" in text:
        return (
            f"there is no Ray cluster on this machine; give one with --address "
            f"http://HEAD:{DASHBOARD_PORT}"
        )
    return f"the job server at {where} refused: {text}"


def _http_status(error: Exception, text: str) -> int | None:
    """Return the HTTP status of the answer; None if there was none."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    if isinstance(error, _AUTHENTICATION):
        # Ray's own error gives the status only in its text.
        return 403 if "Forbidden" in text else 401 if "Unauthorized" in text else None
    found = re.search(r"status(?: code|=)\s*'?(\d{3})", text)
    return int(found[1]) if found else None


def _unreachable(where: str, reason: str) -> str:
    return (
        f"no job server answers at {where} ({reason}). Give the address of the dashboard, "
        f"http://HEAD:{DASHBOARD_PORT}; from outside, forward its port (`ray dashboard "
        "cluster.yaml`, `kubectl port-forward`). The head needs ray[default], which "
        f"{INSTALL} installs"
    )
