"""``pmet report`` on one run and on two."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.storage.store import Store
from tests.jobs.conftest import Invoke
from tests.pipeline.report.test_comparison import run_in, with_wrong
from tests.pipeline.report.test_run_report import results_of


def two_runs(folder: Path) -> tuple[Path, Path]:
    run_in(Store(folder / "a"), with_wrong(30, {4}))
    run_in(Store(folder / "b"), with_wrong(30, {7, 8}), score=0.8, seed=1)
    return folder / "a", folder / "b"


def test_two_runs_are_compared_on_the_terminal_and_on_a_page(pmet: Invoke, tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    status, out, _ = pmet("report", a, b)
    assert status == 0
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    for wanted in (
        "efficacy 90.0 % 80.0 % −10.0 points",
        "seed 0 1",
        "edited 30 30",
        "h.3.w 1.800 % 1.600 %",
        "targets 9.0 s 8.0 s",
        "only in A 7 The capital of {} is Land 7 City 7",
        "only in B 4 The capital of {} is Land 4 City 4",
        "efficacy at least 95.0 %: 99.0 %, passed at least 95.0 %: 99.0 %, passed",
    ):
        assert wanted in lines, wanted
    assert "of 30 requests measured in both, 2 are right only in A, 1 only in B" in out
    assert lines[-1] == str(b / "compare.html")
    assert (b / "compare.html").exists()
    assert not (a / "compare.html").exists()


def test_the_comparison_is_written_to_the_given_place(pmet: Invoke, tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    for given, written in (("x/mine.html", "x/mine.html"), ("folder", "folder/compare.html")):
        assert pmet("report", a, b, "--output", tmp_path / given)[0] == 0
        assert (tmp_path / written).is_file()
    assert not (b / "compare.html").exists()


def test_what_is_no_run_is_one_line_and_exit_2(pmet: Invoke, tmp_path: Path) -> None:
    a, _ = two_runs(tmp_path)
    for pair in ((a, tmp_path), (tmp_path, a), (a, "memory://nowhere")):
        status, out, err = pmet("report", *pair)
        assert status == 2
        assert "holds no finished run" in err
        assert len(err.splitlines()) == 1
        assert out == ""
    status, _, err = pmet("report", a, "--output", tmp_path)
    assert (status, "--output needs two runs" in err) == (2, True)


def test_text_of_a_run_does_not_control_the_terminal(pmet: Invoke, tmp_path: Path) -> None:
    evil = "\x1b[31m[bold]red[/bold]\u202e"
    for name, wrong in (("a", {0}), ("b", {1})):
        run_in(Store(tmp_path / name), with_wrong(3, wrong, target_new=[evil] * 3))
    status, out, _ = pmet("report", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert "\\x1b[31m[bold]red[/bold]\\u202e" in out


def test_a_versions_report_lists_what_is_quarantined(pmet: Invoke, tmp_path: Path) -> None:
    run_in(Store(tmp_path), results_of(3))
    facts = [
        {"relation": "mayor", "subject": place, "object": "Ann", "reason": "not learned"}
        | {"since": "2026-11-20", "state": state}
        for place, state in (("Nice", "quarantined"), ("Bonn", "live"))
    ]
    Store(tmp_path).write_table("ledger.parquet", pa.Table.from_pylist(facts))
    status, out, _ = pmet("report", tmp_path)
    assert (status, out.strip()) == (0, str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "Quarantined facts" in html
    assert ">Nice<" in html
    assert ">Bonn<" not in html


def test_a_page_that_is_the_users_is_not_replaced(pmet: Invoke, tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("<title>Mine</title>")
    status, _, err = pmet("report", a, b, "--output", mine)
    assert status == 2
    assert "mine.html already exists and was not written by this command" in err
    assert mine.read_text() == "<title>Mine</title>"
    # A comparison may be overwritten.
    assert [pmet("report", a, b, "--output", tmp_path / "x.html")[0] for _ in range(2)] == [0, 0]
