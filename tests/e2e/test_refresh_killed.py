"""A refresh on S3 whose process is killed while it writes, and the refresh that resumes it.

Each computes in one process, the one that is killed. Jobs on Ray whose driver is killed are in
`tests.e2e.test_chaos`. ``PMET_CHAOS_KILLS`` sets how many are killed, ``PMET_CHAOS_SEED`` draws the
moments.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from jobs.refresh.home import CURRENT
from jobs.refresh.night import refresh
from pipeline.storage.store import Store
from tests.conftest import ROOT
from tests.e2e.test_chaos import KILLED
from tests.e2e.test_refresh import Place, place

KILLS = int(os.environ.get("PMET_CHAOS_KILLS", "1"))
SEED = int(os.environ.get("PMET_CHAOS_SEED", "0"))

# The refresh, which dies during the n-th file that it writes, or right after it.
DRIVER = """
import os, signal, sys
from contextlib import contextmanager
from jobs.refresh.config import load_refresh
from jobs.refresh.night import refresh
from pipeline.storage.store import Store

kind, when = sys.argv[2], int(sys.argv[3])
written, write_stream, create_bytes = 0, Store.write_stream, Store.create_bytes

def count(now):
    global written
    written += now == "inside"
    if (kind, written) == (now, when):
        os.kill(os.getpid(), signal.SIGKILL)

@contextmanager
def counted(self, name):
    with write_stream(self, name) as stream:
        yield stream
        count("inside")
    count("after")

def created(self, name, data):
    count("inside")
    done = create_bytes(self, name, data)
    count("after")
    return done

Store.write_stream, Store.create_bytes = counted, created
refresh(load_refresh(sys.argv[1]))
print(written)
"""


def drive(python: str, found: Place, kind: str, when: int) -> tuple[int, str]:
    done = subprocess.run(
        [python, "-c", DRIVER, str(found.file()), kind, str(when)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300 + 120 * KILLS)
def test_a_refresh_that_is_killed_leaves_current_and_ends_as_an_undisturbed_one(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_python: str
) -> None:
    first = place(tmp_path / "first", f"{s3_url}/first")
    first.objects = dict(list(first.objects.items())[:8])

    def after_the_first_night(name: str) -> Place:
        found = place(tmp_path / name, f"{s3_url}/{name}")
        for file in first.home.store.list():
            found.home.store.write_bytes(file, first.home.store.read_bytes(file))
        found.objects = dict(first.objects)
        found.tell(30, 32)
        found.write()
        return found

    first.tonight()
    undisturbed, writes = after_the_first_night("undisturbed"), []
    with monkeypatch.context() as patch:
        for name in ("write_stream", "create_bytes"):
            write = getattr(Store, name)
            patch.setattr(Store, name, lambda *a, _of=write: (writes.append(a[1]), _of(*a))[1])
        refresh(undisturbed.config())
    draw = random.Random(SEED)
    for number in range(KILLS):
        found = after_the_first_night(f"killed-{number}")
        how = draw.choice(["inside", "after"])
        status, said = drive(warm_python, found, how, draw.randint(1, len(writes)))
        assert status == KILLED, said
        in_use = json.loads(found.home.store.read_bytes(CURRENT))["version"]
        assert in_use in (1, 2)
        assert found.home.is_kept(in_use)
        result = refresh(found.config())
        assert result.version == 2
        assert json.loads(found.home.store.read_bytes(CURRENT))["version"] == 2
        assert found.home.night(2)["status"] == "promoted"
        assert found.weights(2) == undisturbed.weights(2)
        assert _files(found) == _files(undisturbed)


def _files(found: Place) -> list[str]:
    """Return all files except leases, without the marks of the attempts that wrote them."""
    names = found.home.store.list(unfinished=True)
    names = [name for name in names if "lease" not in name.split("/")]
    return sorted(re.sub(r"-[0-9a-f]{32}", "", name) for name in names)
