"""Overlaps of inputs and outputs are found, whatever the paths look like."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import JobError
from pipeline.storage.overlap import locate, locate_pattern, refuse_inside, refuse_overlap


def overlaps(a: str | Path, b: str | Path) -> bool:
    """Whether two places overlap, checked in both directions."""
    (first,), (second,) = locate(str(a)), locate(str(b))
    assert first.overlaps(second) == second.overlaps(first)
    return first.overlaps(second)


NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


# The first use of a file system imports its library.
@settings(deadline=None)
@given(NAMES, NAMES, st.sampled_from(["", "memory://", "s3://bucket"]))
def test_a_place_overlaps_with_what_is_around_and_inside_it(
    a: list[str], b: list[str], root: str
) -> None:
    def url(parts: list[str]) -> str:
        return root + "/nowhere/" + "/".join(parts)

    shorter = min(len(a), len(b))
    assert overlaps(url(a), url(b)) == (a[:shorter] == b[:shorter])


def test_one_name_that_begins_like_another_is_another_place(tmp_path: Path) -> None:
    assert not overlaps(tmp_path / "run", tmp_path / "run2")
    assert not overlaps("s3://bucket/run", "s3://bucket/run2")
    assert not overlaps("s3://bucket/run", "memory://bucket/run")


def test_spellings_of_a_path_do_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "läuf 1"
    place.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("läuf 1", "./läuf 1/", "x/../läuf 1", f"file://{place}", "~/läuf 1"):
        assert overlaps(spelling, place), spelling
    assert overlaps("memory://a/b/", "memory:///a//b")


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base", target_is_directory=True)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"w")
    (tmp_path / "weights").symlink_to(tmp_path / "base" / "model.safetensors")
    assert overlaps(tmp_path / "link", tmp_path / "base")
    assert overlaps(tmp_path / "link" / "new" / "run", tmp_path / "base")
    assert overlaps(tmp_path / "weights", tmp_path / "base")


def test_one_folder_under_two_names_is_one_place(tmp_path: Path) -> None:
    # As with letter case or a bind mount: only the inode shows that they are the same.
    (tmp_path / "base").mkdir()
    (first,) = locate(str(tmp_path / "base"))
    other = type(first)("", "/elsewhere/base", first.identities)
    assert first.overlaps(other)
    assert first.holds(type(first)("", "/elsewhere/base/run", (None, *first.identities)))


def test_an_archive_is_where_it_lies(tmp_path: Path) -> None:
    chained = f"zip://model::{tmp_path}/runs/m.zip"
    (run,) = locate(str(tmp_path / "runs"))
    assert any(run.holds(place) for place in locate(chained))
    (bucket,) = locate("s3://bucket/runs")
    assert any(bucket.holds(place) for place in locate("simplecache::s3://bucket/runs/x"))


def test_a_folder_is_read_whole_and_a_pattern_as_far_as_it_matches(tmp_path: Path) -> None:
    files = [str(tmp_path / "facts" / "a.parquet")]
    (output,) = locate(str(tmp_path / "facts" / "run"))
    for pattern, found in (("facts", True), ("facts/*.parquet", False), ("facts/**/*.p", True)):
        places = locate_pattern(str(tmp_path / pattern), files)
        assert any(place.overlaps(output) for place in places) is found, pattern
    (beside,) = locate(files[0])
    assert any(place.overlaps(beside) for place in locate_pattern(f"{tmp_path}/facts/*", files))


def test_the_refusal_names_both_places_and_the_remedy(tmp_path: Path) -> None:
    read = [("model", locate(str(tmp_path / "x" / "model"))), ("corpus", locate("s3://b/c"))]
    with pytest.raises(JobError) as refused:
        refuse_overlap(("output", f"{tmp_path}/x"), read)
    assert str(refused.value) == (
        f"model: {tmp_path}/x/model lies inside the output {tmp_path}/x, where it could be "
        "overwritten or deleted; name another output"
    )
    with pytest.raises(JobError, match=r"model: .*/x/model holds the output .*/x/model/run,"):
        refuse_overlap(("output", f"{tmp_path}/x/model/run"), read)
    with pytest.raises(JobError, match=r"corpus: s3://b/c is the output s3://b/c,"):
        refuse_overlap(("output", "s3://b/c"), read)
    refuse_overlap(("output", str(tmp_path / "y")), read)


def test_nothing_is_written_into_a_model(tmp_path: Path) -> None:
    places = locate(str(tmp_path / "model"))
    refuse_inside([("targets.store", str(tmp_path))], "model", places)
    with pytest.raises(JobError, match=r"second_moments: .*/model/stats lies inside the model"):
        refuse_inside([("second_moments", f"{tmp_path}/model/stats")], "model", places)
