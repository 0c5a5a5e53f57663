"""Second moments on disk: found, checked, and refused if they belong to another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import JobError
from pipeline.second_moments.files import (
    PROVENANCE,
    TENSORS,
    check_moments,
    moments_writer,
    read_moments,
    refuse_not_finite,
)
from pipeline.storage.store import Store
from pmet.errors import NotFiniteError
from pmet.model.architecture import Layout, resolve
from tests.conftest import GOLDEN, Golden, load_golden

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def layout() -> Layout:
    gpt2: Golden = load_golden("gpt2")
    return resolve(gpt2.model, gpt2.hparams)


def written(store: Store, layout: Layout) -> dict[int, torch.Tensor]:
    means = {i: torch.eye(layout.key_width).double() * (i + 1) for i in LAYERS}
    with moments_writer(store, layout, LAYERS, "a key") as write:
        for mean_KK in means.values():
            write(mean_KK)
    store.write_json(PROVENANCE, {"model": "this one"})
    return means


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_is_written_is_read(where: str, tmp_path: Path, layout: Layout) -> None:
    url = str(tmp_path) if where == "local" else "memory://moments-test"
    assert not check_moments(url, layout, LAYERS, "this one")
    means = written(Store(url), layout)
    assert check_moments(url, layout, LAYERS, "this one")
    read = read_moments(url, layout, LAYERS)
    assert all(torch.equal(read[i], means[i].float()) for i in LAYERS)


def test_without_its_provenance_a_folder_is_not_finished(tmp_path: Path, layout: Layout) -> None:
    written(Store(tmp_path), layout)
    (tmp_path / PROVENANCE).unlink()
    assert not check_moments(str(tmp_path), layout, LAYERS, "this one")
    # Given as a file, it is accepted like any other.
    assert check_moments(str(tmp_path / TENSORS), layout, LAYERS, "this one")


def test_a_plain_file_from_elsewhere_is_read(layout: Layout) -> None:
    url = str(GOLDEN / "gpt2" / TENSORS)
    assert check_moments(url, layout, (0, 1, 2), "any")
    assert read_moments(url, layout, (2,))[2].shape == (layout.key_width, layout.key_width)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, layout: Layout, odd: float) -> None:
    url = str(tmp_path)
    means = {f"transformer.h.{i}.mlp.c_proj": torch.eye(layout.key_width) for i in LAYERS}
    means["transformer.h.1.mlp.c_proj"][3, 2] = odd
    save_file(means, tmp_path / TENSORS)
    assert check_moments(url, layout, LAYERS, "any")
    refuse_not_finite(url, layout, (0,))
    for check in (refuse_not_finite, read_moments):
        with pytest.raises(JobError, match=rf"h\.1\.mlp\.c_proj at {url} holds NaN or infinity"):
            check(url, layout, LAYERS)


@pytest.mark.parametrize("odd", [float("nan"), 1e300])
def test_what_float32_does_not_hold_is_not_written(
    tmp_path: Path, layout: Layout, odd: float
) -> None:
    mean_KK = torch.eye(layout.key_width, dtype=torch.float64)
    mean_KK[0, 0] = odd
    with (
        pytest.raises(NotFiniteError, match="not finite in float32; the model's activations"),
        moments_writer(Store(tmp_path), layout, (0,), "a key") as write,
    ):
        write(mean_KK)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path: Path, layout: Layout) -> None:
    url = str(tmp_path)
    written(Store(url), layout)
    with pytest.raises(JobError, match="computed on another model"):
        check_moments(url, layout, LAYERS, "another")
    with pytest.raises(JobError, match=r"lacks transformer\.h\.2\.mlp\.c_proj"):
        check_moments(url, layout, (0, 2), "this one")
    with pytest.raises(JobError, match="lacks"):
        read_moments(url, layout, (2,))
    save_file({"transformer.h.0.mlp.c_proj": torch.eye(3)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(JobError, match=r"is \(3, 3\), but the model's keys are 256 wide"):
        check_moments(str(tmp_path / "x.safetensors"), layout, (0,), "any")
    with pytest.raises(JobError, match="there is nothing at"):
        read_moments(str(tmp_path / "nowhere"), layout, LAYERS)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(JobError, match=r"is not a whole safetensors file \(it is cut short\)"):
        check_moments(url, layout, LAYERS, "this one")
    (tmp_path / TENSORS).write_bytes(b"\x00" * 30)
    with pytest.raises(JobError, match="not a whole safetensors file"):
        check_moments(url, layout, LAYERS, "this one")
