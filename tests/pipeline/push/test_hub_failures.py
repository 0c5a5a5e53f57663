"""Failures of a hub: each in one sentence, with what to do, and without the token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.errors import HubError, StorageError
from pipeline.push.hub_failures import hub_failures
from pipeline.push.pushing import push
from pmet.errors import PMETError
from tests.hub_server import TOKEN, Hub

NAME = "org/capitals"
URL = f"hf://{NAME}"
INFO, CREATE = f"GET /api/models/{NAME}", "POST /api/repos/create"
BATCH, UPLOAD = f"POST /{NAME}.git/info/lfs/objects/batch", "PUT /upload/"
COMMIT = f"POST /api/models/{NAME}/commit/main"
FULL = "Private repository storage limit reached, please upgrade your plan"


def refused(source: Path, destination: str = URL) -> PMETError:
    with pytest.raises(PMETError) as caught:
        push(str(source), destination)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return caught.value


@pytest.mark.parametrize(
    ("where", "answer", "kind", "text"),
    [
        (
            INFO,
            (401, "Invalid credentials in Authorization header"),
            HubError,
            "{url} does not accept the token in HF_TOKEN (401: Invalid credentials in "
            "Authorization header); create another one with write access in the settings of your "
            "account",
        ),
        (INFO, (401, ""), HubError, "{url} does not accept the token in HF_TOKEN (401); create"),
        (
            CREATE,
            (403, "You don't have the rights to create a model there"),
            HubError,
            "the token in HF_TOKEN may not write to org/capitals (403: You don't have the rights "
            "to create a model there); give it write access there, or name a repository of yours",
        ),
        (COMMIT, (403, "read-only"), HubError, "the token in HF_TOKEN may not write to org/capi"),
        (
            COMMIT,
            (404, "gone"),
            HubError,
            "{url} knows no org/capitals that the token in HF_TOKEN can see (404: gone); check the "
            "name, the branch and the token's access",
        ),
        (
            BATCH,
            (403, FULL),
            StorageError,
            f"there is no room for this push to org/capitals (403: {FULL}); delete old revisions "
            "or repositories there, or raise the account's limit, then push again",
        ),
        (UPLOAD, (413, ""), StorageError, "there is no room for this push to org/capitals (413);"),
        (COMMIT, (402, "pay"), StorageError, "there is no room for this push to org/capitals (4"),
        (
            INFO,
            (503, "maintenance"),
            StorageError,
            "{url} is not available (503: maintenance); push again later: the repository shows "
            "nothing of this push",
        ),
        (
            "POST /api/validate-yaml",
            (400, "license"),
            HubError,
            "{url} refuses the push to org/capitals (400: license)",
        ),
    ],
)
def test_what_a_hub_refuses_is_a_sentence(
    hub: Hub,
    pushed_run: Path,
    where: str,
    answer: tuple[int, str],
    kind: type[PMETError],
    text: str,
) -> None:
    hub.refuse = lambda asked: answer if asked.startswith(where) else None
    error = refused(pushed_run)
    assert type(error) is kind
    assert str(error).startswith(text.format(url=hub.url))
    assert NAME not in hub.repos or hub.files(NAME) == {}


def test_another_organisation_is_refused(hub: Hub, pushed_run: Path) -> None:
    error = refused(pushed_run, "hf://others/capitals")
    assert str(error).startswith("the token in HF_TOKEN may not write to others/capitals (403: You")


def test_a_hub_without_room_for_one_file_says_so(hub: Hub, pushed_run: Path) -> None:
    hub.full = FULL
    error = refused(pushed_run)
    assert type(error) is StorageError
    assert str(error).startswith(f"there is no room for this push to {NAME} (LFS batch API retur")
    assert FULL in str(error)


def test_a_hub_that_cannot_be_reached_is_named(
    hub: Hub, pushed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"{url}/")
        error = refused(pushed_run)
    assert type(error) is StorageError
    assert str(error) == (
        f"cannot reach {url} ([Errno 111] Connection refused); check the network and HF_ENDPOINT, "
        "then push again: the repository shows nothing of this push"
    )


def test_no_hub_is_asked_offline(
    hub: Hub, pushed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    error = refused(pushed_run)
    assert type(error) is HubError
    assert str(error) == "HF_HUB_OFFLINE is set, so no hub can be reached; unset it"


def test_a_fault_of_our_own_stays_what_it_is() -> None:
    with pytest.raises(AttributeError), hub_failures(NAME, "https://hub"):
        raise AttributeError("x")
