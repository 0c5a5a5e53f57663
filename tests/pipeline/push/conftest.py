"""A hub, and runs and exports to push to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipeline.events import EventKind
from pipeline.export.exporting import export_run
from pipeline.progress import Progress
from tests.hub_server import TOKEN, Hub, hub_server
from tests.saved_edits import published_run


class Heard(Progress):
    """Keeps the texts of events."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, kind: EventKind, text: str, **_: Any) -> None:
        self.texts.append(text)


@pytest.fixture(scope="session")
def pushed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes, in a folder that holds a user's files as well."""
    folder = published_run(tmp_path_factory.mktemp("run") / "run")
    (folder / "model" / "notes.txt").write_text("mine")
    (folder / "model" / "optimizer.pt").write_bytes(b"mine")
    return folder


@pytest.fixture(scope="session")
def exports(pushed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of the run, by their kind."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("delta", "adapter"):
        export_run(str(pushed_run), str(folder / kind), kind=kind)
        (folder / kind / "notes.txt").write_text("mine")
    return {kind: folder / kind for kind in ("delta", "adapter")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub; the environment has its address and a token, a file another token."""
    stored = tmp_path / "stored-token"
    stored.write_text("hf_of_the_file")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    # The library takes no token by itself: every request shows that it was given ours.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
