"""Pushes to a hub: one commit, or nothing."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import FolderBusyError, HubError, RunFolderError
from pipeline.export.exporting import export_run
from pipeline.push.pushing import push
from tests.hub_server import TOKEN, Hub
from tests.pipeline.push.conftest import Heard
from tests.saved_edits import DIGEST, base, published_run

NAME = "org/capitals"
URL = f"hf://{NAME}"


def pushed_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are not a user's, by name."""
    mine = ("notes.txt", "optimizer.pt")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name not in mine}


def arrived(hub: Hub, name: str = NAME, revision: str = "main") -> dict[str, bytes]:
    files = hub.files(name, revision)
    del files[".pmet_push.json"]
    return files


def test_a_model_arrives_in_one_commit_and_opens(
    hub: Hub, pushed_run: Path, tmp_path: Path
) -> None:
    pushed = push(str(pushed_run), URL)
    assert (pushed.changed, pushed.url) == (True, f"{hub.url}/{NAME}/tree/main")
    assert hub.repos[NAME].private
    assert hub.titles(NAME) == ["Edited model of 30 facts, run 0123456789ab"]
    assert arrived(hub) == pushed_files(pushed_run / "model")
    folder = snapshot_download(NAME, local_dir=tmp_path / "copy", endpoint=hub.url, token=TOKEN)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(where).state_dict()
        for where in (pushed_run / "model", folder)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(folder)("a b") is not None


def test_the_hub_can_read_the_cards(hub: Hub, tmp_path: Path) -> None:
    run = published_run(tmp_path / "run", model="acme/base")
    for kind, library, relation in (
        ("model", "transformers", "finetune"),
        ("adapter", "peft", "adapter"),
        ("delta", "safetensors", "finetune"),
    ):
        source = run
        if kind != "model":
            source = tmp_path / kind
            export_run(str(run), str(source), kind=kind)
        push(str(source), f"hf://org/{kind}")
        data = ModelCard(hub.files(f"org/{kind}")["README.md"].decode()).data
        assert data.library_name == library
        assert (data.base_model, data.base_model_relation) == ("acme/base", relation)
        assert data.eval_results[0].metric_value is not None


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_an_export_arrives_whole_and_alone(hub: Hub, exports: dict[str, Path], kind: str) -> None:
    push(str(exports[kind]), URL)
    assert arrived(hub) == pushed_files(exports[kind])
    assert hub.titles(NAME) == [
        {"delta": "Deltas", "adapter": "LoRA adapter"}[kind] + " of 30 facts, run 0123456789ab"
    ]
    (commit,) = hub.repos[NAME].branches["main"][1:]
    assert commit.text == f"Base model: {base('gpt2')}\nRun: {DIGEST}"


def test_a_second_push_of_the_same_does_nothing(hub: Hub, pushed_run: Path) -> None:
    push(str(pushed_run), URL)
    hub.asked.clear()
    pushed = push(str(pushed_run), URL)
    assert not pushed.changed
    assert len(hub.titles(NAME)) == 1
    assert {line.partition(" ")[0] for line in hub.asked} == {"GET", "HEAD"}


def test_a_push_replaces_what_an_earlier_one_wrote_and_leaves_the_rest(
    hub: Hub, pushed_run: Path, exports: dict[str, Path]
) -> None:
    push(str(pushed_run), URL)
    now = hub.repos[NAME].branches["main"][-1].files
    hub.repos[NAME].add("main", "license", "", {**now, "LICENSE": b"mine"})
    push(str(exports["adapter"]), URL)
    assert arrived(hub) == {**pushed_files(exports["adapter"]), "LICENSE": b"mine"}
    # Back again: everything is on the hub already, and only the commit is new.
    hub.asked.clear()
    assert push(str(pushed_run), URL).changed
    assert arrived(hub) == {**pushed_files(pushed_run / "model"), "LICENSE": b"mine"}
    assert not any(line.startswith("PUT") for line in hub.asked)
    assert len(hub.titles(NAME)) == 4


def test_files_that_no_push_wrote_are_neither_joined_nor_overwritten(
    hub: Hub, pushed_run: Path, exports: dict[str, Path]
) -> None:
    files = {"README.md": b"# Mine", "model.bin": b"mine"}
    hub.new(NAME, **files)
    with pytest.raises(HubError) as caught:
        push(str(pushed_run), URL)
    assert str(caught.value) == (
        f"{NAME} holds README.md, model.bin, which no push wrote; delete that, or name a "
        "repository that is empty or does not exist"
    )
    assert hub.files(NAME) == files
    push(str(exports["delta"]), "hf://org/other")
    now = hub.repos["org/other"].branches["main"][-1].files
    hub.repos["org/other"].add("main", "weights", "", {**now, "model.safetensors": b"mine"})
    with pytest.raises(HubError, match=r"^org/other holds model.safetensors, which no push wrote"):
        push(str(pushed_run), "hf://org/other")


def test_what_the_repository_ignores_is_pushed_all_the_same(
    hub: Hub, pushed_run: Path, exports: dict[str, Path]
) -> None:
    push(str(exports["delta"]), URL)
    rules = {".gitignore": b"*"}
    now = hub.repos[NAME].branches["main"][-1].files
    hub.repos[NAME].add("main", "rules", "", {**now, **rules})
    push(str(pushed_run), URL)
    assert arrived(hub) == pushed_files(pushed_run / "model") | rules
    assert not push(str(pushed_run), URL).changed


@pytest.mark.parametrize("where", ["PUT /upload/", "POST /api/models/org/capitals/commit/"])
def test_an_interrupted_push_shows_nothing_and_the_next_one_ends_it(
    hub: Hub, pushed_run: Path, where: str
) -> None:
    hub.refuse = lambda asked: (400, "cut off") if asked.startswith(where) else None
    with pytest.raises(HubError, match="refuses the push to org/capitals"):
        push(str(pushed_run), URL)
    assert hub.files(NAME) == {}
    hub.refuse = lambda _: None
    hub.asked.clear()
    assert push(str(pushed_run), URL).changed
    assert arrived(hub) == pushed_files(pushed_run / "model")
    # What had been uploaded is not uploaded again.
    assert any(asked.startswith("PUT") for asked in hub.asked) == where.startswith("PUT")


def test_of_two_pushes_at_once_one_commits(hub: Hub, pushed_run: Path) -> None:
    hub.new(NAME)

    def meanwhile(asked: str) -> None:
        if "/commit/" in asked:
            hub.repos[NAME].add("main", "another", "", hub.repos[NAME].branches["main"][0].files)

    hub.refuse = meanwhile
    with pytest.raises(FolderBusyError) as caught:
        push(str(pushed_run), URL)
    assert str(caught.value) == (
        f"{NAME} changed during the push, which therefore committed nothing (412: A commit has "
        "happened since. Please refresh and try again.); push again"
    )
    assert hub.titles(NAME) == ["another"]


def test_a_branch_is_made_and_main_stays(
    hub: Hub, pushed_run: Path, exports: dict[str, Path]
) -> None:
    push(str(exports["delta"]), URL)
    pushed = push(str(pushed_run), f"{URL}@nights/0007")
    assert pushed.url == f"{hub.url}/{NAME}/tree/nights/0007"
    assert arrived(hub, revision="nights/0007") == pushed_files(pushed_run / "model")
    assert arrived(hub) == pushed_files(exports["delta"])
    assert not push(str(pushed_run), f"{URL}@nights/0007").changed
    with pytest.raises(HubError, match=r"knows no org/capitals .* \(404: Invalid rev id: refs/pr"):
        push(str(pushed_run), f"{URL}@refs/pr/7")


def test_what_is_private_and_what_is_public_stays_so(hub: Hub, pushed_run: Path) -> None:
    push(str(pushed_run), URL, public=True)
    assert not hub.repos[NAME].private
    assert not push(str(pushed_run), URL, public=True).changed
    with pytest.raises(HubError, match=f"^{NAME} is public: give --public to push there, or name"):
        push(str(pushed_run), URL)
    hub.new("org/secret")
    with pytest.raises(HubError, match=r"^org/secret is private, and a push does not change that"):
        push(str(pushed_run), "hf://org/secret", public=True)
    assert hub.files("org/secret") == {}


def test_the_token_comes_from_the_environment_alone(
    hub: Hub, pushed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", "  "):
        monkeypatch.setenv("HF_TOKEN", value)
        with pytest.raises(
            HubError, match=r"^HF_TOKEN is not set: pmet push takes the hub's token"
        ):
            push(str(pushed_run), URL)
    assert hub.asked == []
    # As `export HF_TOKEN=$(cat file)` may leave it.
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert push(str(pushed_run), URL).changed


def test_files_that_are_not_as_recorded_are_not_pushed(hub: Hub, tmp_path: Path) -> None:
    run = published_run(tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunFolderError) as caught:
        push(str(run), URL)
    assert str(caught.value) == (
        f"{weights} is damaged: its SHA-256 is not the recorded one; copy it again, or make it "
        "again"
    )
    assert hub.files(NAME) == {}


def test_a_run_on_other_storage_arrives_too(hub: Hub, pushed_run: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    fsspec.filesystem("memory").put(f"{pushed_run}/", url, recursive=True)
    assert push(url, URL).changed
    assert arrived(hub) == pushed_files(pushed_run / "model")
    assert not push(str(pushed_run), URL).changed


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("hf://capitals", "names no repository; write hf://ORG/NAME or hf://ORG/NAME@BRANCH"),
        ("hf://org/capitals/model", "names no repository; write hf://ORG/NAME"),
        ("hf://org/capitals@", "names no repository; write"),
        ("hf://datasets/org/capitals", "is none of the hub's models, which alone can be pushed;"),
        ("hf://spaces/org/capitals", "is none of the hub's models"),
        (f"hf://org/capitals@{'0a' * 20}", "names a commit, which cannot change; write"),
        ("hf://org/capi tals", "Repo id must use alphanumeric chars"),
    ],
)
def test_a_destination_that_is_no_model_repository_is_refused(
    hub: Hub, pushed_run: Path, url: str, text: str
) -> None:
    with pytest.raises(HubError, match=f"^{re.escape(url)}:? {re.escape(text)}"):
        push(str(pushed_run), url)
    assert hub.asked == []


def test_a_warning_of_the_hub_reaches_the_user(hub: Hub, pushed_run: Path) -> None:
    hub.warnings.append("license is missing")
    heard = Heard()
    push(str(pushed_run), URL, progress=heard)
    assert heard.texts == ["Warnings while validating metadata in README.md: - license is missing"]
