"""The .npz files of ROME and MEMIT: read unchanged and never unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import JobError
from pipeline.second_moments.files import check_moments, read_moments
from pipeline.storage.store import Store
from pmet.model.architecture import Layout, resolve
from tests.conftest import load_golden

MODULE = "transformer.h.{}.mlp.c_proj"


@pytest.fixture(scope="module")
def layout() -> Layout:
    gpt2 = load_golden("gpt2")
    return resolve(gpt2.model, gpt2.hparams)


def sums(layer: int, width: int) -> np.ndarray:
    keys = np.random.default_rng(layer).standard_normal((300, width)).astype(np.float32)
    return keys.T @ keys


def publish(folder: Path, layer: int, width: int, name: str = "", **changes: Any) -> Path:
    """A file in the format in which util/runningstats.py saves a CombinedStat."""
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": 300,
        "mom2.mom2": sums(layer, width),
        "sample_size": 100000,
    }
    path = folder / (name or f"{MODULE.format(layer)}_float32_mom2_100000.npz")
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_folder_of_layers_is_read(where: str, tmp_path: Path, layout: Layout) -> None:
    for layer in (0, 1):
        publish(tmp_path, layer, layout.key_width)
    (tmp_path / "notes.npz").write_bytes(b"something else")
    url = str(tmp_path)
    if where == "memory":
        url = "memory://published-moments"
        for file in tmp_path.iterdir():
            Store(url).write_bytes(file.name, file.read_bytes())
    assert check_moments(url, layout, (0, 1), "any")
    for layer, mean_KK in read_moments(url, layout, (0, 1)).items():
        expected = sums(layer, layout.key_width).astype(np.float64) / 300
        assert mean_KK.dtype == torch.float32
        torch.testing.assert_close(mean_KK.double(), torch.from_numpy(expected), rtol=1e-7, atol=0)
    with pytest.raises(JobError, match=r"lacks transformer\.h\.2\.mlp\.c_proj; it has transformer"):
        check_moments(url, layout, (0, 2), "any")


def test_one_of_several_is_chosen_by_a_glob(tmp_path: Path, layout: Layout) -> None:
    few = publish(tmp_path, 0, layout.key_width)
    publish(tmp_path, 0, layout.key_width, f"{MODULE.format(0)}_float32_mom2_t500_9.npz")
    with pytest.raises(
        JobError, match=r"has 2 files of transformer\.h\.0.*select one of each module"
    ):
        check_moments(str(tmp_path), layout, (0,), "any")
    for url in (few, tmp_path / "*_mom2_100000.npz"):
        assert check_moments(str(url), layout, (0,), "any")
        assert read_moments(str(url), layout, (0,)).keys() == {0}
    assert not check_moments(str(tmp_path / "none.npz"), layout, (0,), "any")


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["mom2.mom2", "mom2.count"])
def test_nothing_is_unpickled(name: str, tmp_path: Path, layout: Layout) -> None:
    mark = tmp_path / "mark"
    array = np.array([Malice(mark)], dtype=object)
    path = publish(tmp_path, 0, layout.key_width, **{name: array})
    refusal = f"{name} in .* would require unpickling, which can run code and is refused"
    for read in (
        lambda: check_moments(str(tmp_path), layout, (0,), "any"),
        lambda: read_moments(str(tmp_path), layout, (0,)),
    ):
        with pytest.raises(JobError, match=refusal):
            read()
    path.write_bytes(pickle.dumps(Malice(mark)))
    with pytest.raises(JobError, match=r"is not a complete \.npz file"):
        check_moments(str(tmp_path), layout, (0,), "any")
    assert not mark.exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, layout: Layout) -> None:
    url, width = str(tmp_path), layout.key_width
    path = publish(tmp_path, 0, 3)
    with pytest.raises(JobError, match=r"is \(3, 3\), but the model's keys are 256 wide"):
        check_moments(url, layout, (0,), "any")
    publish(tmp_path, 0, width, **{"mom2.count": None})
    with pytest.raises(JobError, match=r"complete \.npz file with mom2\.mom2 and mom2\.count"):
        check_moments(url, layout, (0,), "any")
    publish(tmp_path, 0, width, **{"mom2.count": 0})
    with pytest.raises(JobError, match="counts 0 tokens"):
        read_moments(url, layout, (0,))
    for odd in (float("nan"), float("inf"), -1.0, 5e-324):
        publish(tmp_path, 0, width, **{"mom2.count": odd})
        with pytest.raises(JobError, match=f"counts {odd} tokens"):
            read_moments(url, layout, (0,))
    publish(tmp_path, 0, width, **{"mom2.count": "many"})
    with pytest.raises(JobError, match=r"mom2\.count holds <U4, not numbers"):
        read_moments(url, layout, (0,))
    whole = publish(tmp_path, 0, width).read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(JobError, match=r"is not a complete \.npz file"):
        check_moments(url, layout, (0,), "any")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(JobError, match=r"is not a complete \.npz file"):
        read_moments(url, layout, (0,))
