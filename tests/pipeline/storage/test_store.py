import errno
import hashlib
import os
import pickle
import resource
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Timer
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pipeline.errors import RequestTableError, StorageError
from pipeline.storage import retries
from pipeline.storage.store import Store, attempt, expand, read_file, read_parquet

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", None]})


class Interruption(BaseException):
    """A ``BaseException`` such as a signal or a cancelled task raises."""


def write_half(store, name, failure):
    with store.write_stream(name) as stream:
        stream.write(b"half of it" * 1_200_000)
        raise failure


class StorageSuite:
    """Tests for every kind of storage; subclasses provide the fixture ``url``."""

    @pytest.fixture
    def store(self, url):
        return Store(url)

    def test_a_new_store_is_empty(self, store):
        assert store.list() == []
        assert not store.exists("a.bin")

    def test_bytes_are_read_back(self, store):
        store.write_bytes("deep/er/a.bin", b"\x00hello")
        assert store.read_bytes("deep/er/a.bin") == b"\x00hello"
        assert store.exists("deep/er/a.bin")
        assert store.exists("deep")

    def test_an_empty_file_exists(self, store):
        store.write_bytes("a", b"")
        assert store.exists("a")
        assert store.read_bytes("a") == b""

    def test_writing_again_replaces(self, store):
        store.write_bytes("a", b"first, and longer")
        store.write_bytes("a", b"second")
        assert store.read_bytes("a") == b"second"
        assert store.list() == ["a"]

    def test_json_is_read_back_in_its_order(self, store):
        value = {"z": [1, 2.5, None], "a": "Zürich \U0001f9ea"}
        store.write_json("v.json", value)
        assert store.read_json("v.json") == value
        assert list(store.read_json("v.json")) == ["z", "a"]
        assert "Zürich" in store.read_bytes("v.json").decode()

    def test_json_holds_what_is_not_finite_in_words(self, store):
        store.write_json("v.json", {"a": [float("inf")]})
        text = b"".join(store.read_bytes("v.json").split())
        assert text == b'{"a":[{"$numberDouble":"Infinity"}]}'
        assert store.read_json("v.json") == {"a": [float("inf")]}

    def test_damaged_json_is_named(self, store):
        store.write_bytes("v.json", b'{"a": ')
        with pytest.raises(StorageError, match=r"v\.json is not JSON .*delete it and run again"):
            store.read_json("v.json")

    def test_tables_are_read_back_compressed(self, store):
        store.write_table("t.parquet", TABLE)
        assert store.read_table("t.parquet") == TABLE
        assert store.read_table("t.parquet", ["b"]).column_names == ["b"]
        with fsspec.open(store.join("t.parquet"), "rb") as file:
            assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"

    def test_a_missing_column_is_named(self, store):
        store.write_table("t.parquet", TABLE)
        with pytest.raises(StorageError, match=r"t\.parquet has no column 'c'"):
            store.read_table("t.parquet", ["a", "c"])

    def test_a_damaged_table_is_named(self, store):
        store.write_table("t.parquet", TABLE)
        store.write_bytes("t.parquet", store.read_bytes("t.parquet")[:-20])
        with pytest.raises(StorageError, match=r"cannot read .*t\.parquet .*damaged"):
            store.read_table("t.parquet")

    def test_a_missing_file_is_named(self, store):
        for read in (store.read_bytes, store.read_json, store.read_table, store.sha256):
            with pytest.raises(StorageError, match=r"cannot read .*nowhere\.x .*check the path"):
                read("nowhere.x")

    def test_a_stream_appears_when_it_has_ended(self, store):
        with store.write_stream("big/s.bin") as stream:
            stream.write(b"....data")
            stream.seek(0)
            stream.write(b"head")
            assert not store.exists("big/s.bin")
            assert store.list() == []
        assert store.read_bytes("big/s.bin") == b"headdata"

    @pytest.mark.parametrize("failure", [RuntimeError, Interruption])
    def test_an_exception_leaves_what_was_there(self, store, failure):
        store.write_bytes("old.bin", b"old")
        for name in ("old.bin", "new.bin"):
            with pytest.raises(failure):
                write_half(store, name, failure)
        assert store.read_bytes("old.bin") == b"old"
        assert store.list() == ["old.bin"]
        assert all(store.fs.info(f)["size"] == 3 for f in store.fs.find(store.root))

    def test_of_many_writers_at_once_one_creates_a_file(self, store):
        assert store.creates_exclusively
        names = [f"writer {number}".encode() for number in range(8)]
        with ThreadPoolExecutor(len(names)) as threads:
            written = list(threads.map(lambda name: store.create_bytes("lock/1", name), names))
        assert sum(written) == 1
        assert store.read_bytes("lock/1") == names[written.index(True)]
        assert store.create_bytes("lock/1", b"late") is False
        assert store.list() == ["lock/1"]

    def test_the_storage_says_when_a_file_was_written(self, store):
        store.write_bytes("a", b"x")
        first = store.modified("a")
        assert abs((datetime.now(UTC) - first).total_seconds()) < 5
        with pytest.raises(StorageError, match=r"cannot look for .*nowhere"):
            store.modified("nowhere")

    def test_files_are_listed_by_folder_in_order(self, store):
        for name in ("b/2", "b/10", "a", "bc/1", "b/d/0"):
            store.write_bytes(name, b"x")
        assert store.list() == ["a", "b/10", "b/2", "b/d/0", "bc/1"]
        assert store.list("b") == ["b/10", "b/2", "b/d/0"]
        assert store.list("none") == []

    def test_another_store_sees_the_change_at_once(self, store, url):
        assert store.list() == []
        Store(url).write_bytes("a", b"1")
        assert store.list() == ["a"]
        assert store.exists("a")
        Store(url).delete("a")
        assert not store.exists("a")

    def test_deleting_a_file_a_folder_and_nothing(self, store):
        for name in ("a", "b/1", "b/c/2"):
            store.write_bytes(name, b"x")
        store.delete("a")
        assert store.list() == ["b/1", "b/c/2"]
        store.delete("b")
        assert store.list() == []
        store.delete("b")

    def test_sha256_is_of_the_bytes(self, store):
        data = os.urandom(5_000_000)
        store.write_bytes("a", data)
        assert store.sha256("a") == hashlib.sha256(data).hexdigest()

    @pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/passwd", ""])
    def test_names_stay_inside(self, store, name):
        with pytest.raises(StorageError, match="relative path without"):
            store.write_bytes(name, b"x")

    def test_a_joined_name_is_a_url_that_fsspec_opens(self, store):
        store.write_bytes("b/a", b"x")
        with fsspec.open(store.join("b", "a"), "rb") as file:
            assert file.read() == b"x"
        assert read_file(store.join("b/a")) == b"x"
        assert Store(store.join("b")).read_bytes("a") == b"x"
        assert Store(store.url).list() == ["b/a"]

    def test_a_store_travels_to_another_process(self, store):
        store.write_bytes("a", b"x")
        assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"x"

    def test_read_file_stops_at_its_limit(self, store):
        store.write_bytes("a", b"0123456789")
        store.write_bytes("empty", b"")
        assert read_file(store.join("a"), limit=4) == b"0123"
        assert read_file(store.join("a"), limit=40) == b"0123456789"
        assert read_file(store.join("empty"), limit=4) == b""

    def test_read_parquet_takes_a_url(self, store):
        store.write_table("t.parquet", TABLE)
        assert read_parquet(store.join("t.parquet")) == TABLE

    @pytest.fixture
    def files(self, store):
        for name in ("f/b.parquet", "f/a.parquet", "f/.hidden.parquet", "f/note.txt"):
            store.write_bytes(name, b"x")
        store.write_bytes("f/sub/c.parquet", b"x")
        return store

    def test_expanding_a_glob_a_folder_and_a_file(self, files):
        a, b = files.join("f/a.parquet"), files.join("f/b.parquet")
        assert expand(files.join("f/[ab].parquet")) == [a, b]
        assert expand(files.join("f")) == [a, b]
        assert expand(files.join("f") + "/") == [a, b]
        assert expand([b, files.join("f/*.txt")]) == [b, files.join("f/note.txt")]
        assert expand(files.join("f/**/c.parquet")) == [files.join("f/sub/c.parquet")]

    def test_expanding_keeps_the_order_of_patterns_and_lists_a_file_once(self, files):
        a, b = files.join("f/a.parquet"), files.join("f/b.parquet")
        assert expand([b, files.join("f")]) == [b, a]

    def test_a_folder_can_stand_for_all_below_it(self, files):
        names = ("f/sub/x=1/c.parquet", "f/_temporary/d.parquet", "f/sub/.e/f.parquet")
        for name in names:
            files.write_bytes(name, b"x")
        files.write_bytes("f/sub/note.txt", b"x")
        shallow, deep = (expand(files.join("f"), deep=deep) for deep in (False, True))
        assert names[0] not in {file.removeprefix(f"{files.url}/") for file in shallow}
        assert set(deep) - set(shallow) >= {files.join(names[0])}
        assert not [file for file in deep if "_temporary" in file or "/." in file or "note" in file]

    def test_a_glob_matches_files_only(self, files):
        assert files.join("f/sub") not in expand(files.join("f/*"))

    @pytest.mark.parametrize("pattern", ["f/*.csv", "f/x.parquet", "none", "f/su*"])
    def test_a_pattern_without_files_is_named(self, files, pattern):
        files.write_bytes("f/sub/c.txt", b"x")
        with pytest.raises(RequestTableError) as caught:
            expand([files.join("f"), files.join(pattern)])
        assert str(caught.value).startswith(f"{files.join(pattern)} matches no file; give")

    def test_a_folder_without_parquet_matches_nothing(self, files):
        files.write_bytes("g/a.txt", b"x")
        with pytest.raises(RequestTableError, match="matches no file"):
            expand(files.join("g"))


class TestLocal(StorageSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return str(tmp_path / "a folder" / "run 1")

    def test_paths_are_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        store = Store("runs/a")
        assert store.url == str(tmp_path / "runs" / "a")
        assert store.local_path() == tmp_path / "runs" / "a"
        assert store.local_path("b/c") == tmp_path / "runs" / "a" / "b" / "c"
        monkeypatch.chdir("/")
        store.write_bytes("x", b"1")
        assert (tmp_path / "runs" / "a" / "x").read_bytes() == b"1"

    def test_file_urls_are_local(self, tmp_path):
        assert Store(f"file://{tmp_path}").local_path("a") == tmp_path / "a"

    def test_a_failed_rename_leaves_nothing(self, store, monkeypatch):
        def full(*_args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(StorageError, match=r"cannot write .*/a .*No space left.*make room"):
            store.write_bytes("a", b"x")
        assert list(store.local_path().iterdir()) == []

    def test_the_bytes_reach_the_disk_before_the_name(self, store, monkeypatch):
        events = []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
        monkeypatch.setattr(
            Path, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1]
        )
        store.write_bytes("a", b"x")
        assert events == ["fsync", "rename", "fsync"]

    def test_leftovers_of_a_killed_writer_are_not_listed(self, store):
        store.write_bytes("a", b"x")
        stream = store.write_stream("b")
        stream.__enter__().write(b"half")
        assert len(list(store.local_path().iterdir())) == 2
        assert store.list() == ["a"]

    def test_an_unwritable_place_is_named(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x")
        with pytest.raises(StorageError, match=r"cannot write .*file/a"):
            Store(tmp_path / "file").write_bytes("a", b"x")

    def test_a_table_that_cannot_be_written_is_not_called_damaged(self, store, monkeypatch):
        def refuse(*_args, **_options):
            raise pa.ArrowInvalid("no such type")

        monkeypatch.setattr(pq, "write_table", refuse)
        with pytest.raises(StorageError, match=r"cannot write .*/t \(no such type\); check that"):
            store.write_table("t", TABLE)

    def test_a_full_disk_is_named_with_what_to_do(self, store):
        """The kernel refuses files above a size limit just as it does on a full disk."""
        store.write_bytes("old", b"old")
        block = os.urandom(1 << 20)

        def stream():
            with store.write_stream("old") as file:
                file.write(block)

        def target():
            with store.local_target("old") as path:
                path.write_bytes(block)

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for write in (
            lambda: store.write_bytes("old", block),
            lambda: store.create_bytes("new", block),
            lambda: store.write_table("old", pa.table({"a": [block]})),
            stream,
            target,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
            try:
                with pytest.raises(StorageError, match=r"cannot write /.*/\w+ .*; make room there"):
                    write()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [file.name for file in store.local_path().iterdir()] == ["old"]
        assert store.read_bytes("old") == b"old"

    def test_links_are_files(self, tmp_path):
        pq.write_table(TABLE, tmp_path / "real.parquet")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "link.parquet").symlink_to(tmp_path / "real.parquet")
        for pattern in ("d", "d/*.parquet", "d/link.parquet"):
            assert expand(str(tmp_path / pattern)) == [str(tmp_path / "d" / "link.parquet")]

    def test_a_name_with_brackets_is_a_name_first(self, tmp_path):
        (tmp_path / "a[1].parquet").write_bytes(b"x")
        (tmp_path / "a1.parquet").write_bytes(b"x")
        assert expand(str(tmp_path / "a[1].parquet")) == [str(tmp_path / "a[1].parquet")]


class RemoteSuite(StorageSuite):
    """Tests for storage that is not on this machine."""

    def test_there_is_no_local_path(self, store):
        assert store.local_path() is None
        assert store.local_path("a") is None


class TestMemory(RemoteSuite):
    @pytest.fixture
    def url(self):
        return f"memory://{uuid.uuid4().hex}/run"


class TestS3(RemoteSuite):
    @pytest.fixture
    def url(self, s3_url):
        return s3_url

    def test_no_parts_of_a_failed_stream_stay(self, store):
        with pytest.raises(RuntimeError):
            write_half(store, "a", RuntimeError)
        bucket = store.root.split("/")[0]
        uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket)
        assert "Uploads" not in uploads

    def test_a_missing_bucket_is_named(self, store):
        with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket-x/a"):
            Store("s3://no-such-bucket-x").write_bytes("a", b"x")

    def test_an_unreachable_storage_is_not_an_empty_one(self, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3 = fsspec.get_filesystem_class("s3")
        monkeypatch.setattr(s3, "retries", 1)
        monkeypatch.setattr(retries, "PATIENCE_S", 0)
        s3.clear_instance_cache()
        store = Store("s3://bucket/a")
        for action in (store.list, lambda: store.exists("b"), lambda: expand(store.join("c"))):
            with pytest.raises(StorageError, match=r"s3://bucket/a.*can be reached, then run the"):
                action()
        s3.clear_instance_cache()

    def test_a_storage_that_comes_back_is_asked_again(self, monkeypatch):
        """Make each request before its server has started."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        # The libraries' own retries.
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3 = fsspec.get_filesystem_class("s3")
        monkeypatch.setattr(s3, "retries", 1)
        s3.clear_instance_cache()
        store = Store("s3://away/a")

        @contextmanager
        def late():
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
            timer = Timer(0.7, server.start)
            timer.start()
            yield
            timer.join()
            server.stop()

        def made_and_written():
            store.fs.mkdir("away")
            store.write_bytes("f", b"1")

        with late():
            attempt("write", "s3://away", made_and_written)
        with late():
            store.write_bytes("f", b"23")
        for look, seen in (
            (lambda: store.read_bytes("f"), b"23"),
            (lambda: store.exists("f"), True),
            (store.list, ["f"]),
            (lambda: store.size("f"), 2),
            (lambda: store.create_bytes("f", b"4"), False),
            (lambda: read_file(store.join("f")), b"23"),
        ):
            with late():
                assert look() == seen
        s3.clear_instance_cache()


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match=r"cannot open nope://a .*nope"):
        Store("nope://a")


@pytest.mark.parametrize("look", ["list", "glob", "expand"])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    """Deny access as for another user; tests may run as root, which can read everything."""
    secret = tmp_path / "a" / "secret"
    secret.mkdir(parents=True)
    (secret / "x.parquet").write_bytes(b"x")
    (tmp_path / "a" / "y.parquet").write_bytes(b"y")
    scandir = os.scandir

    def refused(path: str) -> Any:
        if Path(path) == secret:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    looks = {
        "list": lambda: Store(tmp_path).list("a"),
        "glob": lambda: Store(secret).glob("*.parquet"),
        "expand": lambda: expand(str(tmp_path / "a"), deep=True),
    }
    assert looks[look]()
    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(StorageError, match=r"Permission denied.*; check the credentials and the"):
        looks[look]()


def test_a_path_through_a_folder_that_does_not_exist_is_the_same_before_and_after(
    tmp_path: Path,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    store = Store(f"{tmp_path}/./nowhere/../out")
    assert store.entries() == ["mine.txt"]
    assert store.url == str(tmp_path / "out")
    store.write_bytes("new", b"")
    assert not (tmp_path / "nowhere").exists()
    # What stands before the dots may be a link, which the system follows.
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert Store(f"{tmp_path}/link/../out").url == str(tmp_path / "far" / "out")
    assert Store("/../..").url == "/"
