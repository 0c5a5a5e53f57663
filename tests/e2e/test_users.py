"""Two users of one machine, the second without a name or a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import GOLDEN, ROOT

# It may read root's files, because the interpreter may be in root's home, but not write them.
READS = "+dac_read_search"
OTHER = 54321
AS_OTHER = [
    *("setpriv", "--reuid", str(OTHER), "--regid", str(OTHER), "--clear-groups"),
    *("--inh-caps", READS, "--ambient-caps", READS, "--bounding-set", READS),
]


@pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="only root becomes another user, with setpriv",
)
def test_a_second_user_has_a_cache_of_their_own(tmp_path: Path) -> None:
    model = GOLDEN / "gpt2" / "model"
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in model.iterdir():
            archive.write(file, f"model/{file.name}")
    row = {"prompt": "{} works as", "subject": "Sur Bavov", "target_new": "a baker"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "requests.parquet")
    job = {
        "model": f"zip://model::{tmp_path}/model.zip",
        "requests": str(tmp_path / "requests.parquet"),
        "output": str(tmp_path / "out"),
        "hparams": str(GOLDEN / "gpt2" / "hparams.json"),
        "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (temporary := tmp_path / "tmp").mkdir()
    temporary.chmod(0o1777)
    left_out = {"PMET_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs", "run", str(tmp_path / "job.yaml")]
    for user, prefix, home in ((0, [], str(tmp_path)), (OTHER, AS_OTHER, "/")):
        done = subprocess.run(
            [*prefix, *command, "--dry-run", "--no-estimate"],
            env=environment | {"HOME": home},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "1 to edit" in done.stdout
        own = temporary / f"pmet-{user}"
        assert (own.stat().st_uid, own.stat().st_mode & 0o777) == (user, 0o700)
        (copy,) = [entry for entry in (own / "models").iterdir() if entry.is_dir()]
        assert {file.name for file in copy.iterdir()} == {file.name for file in model.iterdir()}
