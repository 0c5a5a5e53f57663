"""Two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import RunFolderError, StorageError
from pipeline.report.comparison import PAGE, Comparison, compare_runs, write_comparison
from pipeline.storage.store import Store
from tests.pipeline.report.test_run_report import GATES, HOSTILE, UNSEEN, Page, figures, results_of

JOB = "model: gpt2\nrequests: a.parquet\nseed: {seed}\ntargets:\n  workers: {workers}\n"


def run_in(
    store: Store, results: pa.Table, *, score: float = 0.9, seed: int = 0, **changes: Any
) -> Store:
    """Write the folder of a finished run."""
    status = {
        "status": "complete",
        "started_at": "2026-11-23T02:00:00+00:00",
        "finished_at": "2026-11-23T02:01:00+00:00",
        "stages": [{"name": "targets", "seconds": 10.0 * score, "detail": {"found": 30}}],
        "digests": {"model": "same", "requests": f"digest {seed}"},
        "layers": [{"parameter": "h.3.w", "delta_norm": 2 * score, "weight_norm": 100.0}],
    }
    metrics = {
        "before": figures(0.1),
        "after": figures(score) | {"perplexity": 20 * score},
        "counts": {"requested": 33, "rejected": 3, "edited": 30},
        "gates": GATES[:1],
    }
    store.write_json("run.json", status | changes.pop("run", {}))
    store.write_json("metrics.json", metrics | changes)
    store.write_bytes("job.yaml", JOB.format(seed=seed, workers=2 + seed).encode())
    store.write_table("results.parquet", results)
    return store


def compared(tmp_path: Path, a: pa.Table, b: pa.Table, **changes: Any) -> Comparison:
    """The comparison of two runs with these results; the second one differs by ``changes``."""
    first = run_in(Store(tmp_path / "a"), a)
    return compare_runs(first, run_in(Store(tmp_path / "b"), b, **changes))


def rows_of(pairs: list[Any]) -> list[tuple[int, int]]:
    return [(a["row"], b["row"]) for a, b in pairs]


def with_wrong(count: int, wrong: set[int], **columns: Any) -> pa.Table:
    return results_of(
        count, after_efficacy=[float(i not in wrong) for i in range(count)], **columns
    )


def test_requests_whose_verdict_changed_are_found_wherever_they_stand(tmp_path: Path) -> None:
    b = with_wrong(30, {2, 3}).take(pa.array([*range(29, -1, -1)]))
    b = b.set_column(b.column_names.index("row"), "row", pa.array([*range(30)]))
    found = compared(tmp_path, with_wrong(30, {3, 4}), b).verdicts
    assert rows_of(found.lost) == [(2, 27)]
    assert rows_of(found.gained) == [(4, 25)]
    assert (found.both, found.only_a, found.only_b) == (30, 0, 0)


def test_a_reworded_request_is_known_by_its_case_and_subject(tmp_path: Path) -> None:
    cases = {"case_id": [100 + i for i in range(5)]}
    reworded = {"prompt": ["{}'s capital is"] * 5}
    a, b = with_wrong(5, set(), **cases), with_wrong(5, {1}, **cases, **reworded)
    assert rows_of(compared(tmp_path, a, b).verdicts.lost) == [(1, 1)]


def test_equal_case_ids_of_other_facts_are_not_taken_for_each_other(tmp_path: Path) -> None:
    cases = {"case_id": [0, 1, 2]}
    others = {"subject": [f"Star {i}" for i in range(3)]}
    found = compared(tmp_path, with_wrong(3, set(), **cases), with_wrong(3, {0}, **cases, **others))
    verdicts = found.verdicts
    assert (verdicts.both, verdicts.only_a, verdicts.only_b) == (0, 3, 3)
    assert verdicts.lost == []


def test_requests_that_one_run_has_not_measured_have_no_verdict(tmp_path: Path) -> None:
    nothing = results_of(4, after_efficacy=[None, 1.0, None, None],
                         after_efficacy_strict=[None, 1.0, 0.0, None])  # fmt: skip
    found = compared(tmp_path, results_of(4), nothing).verdicts
    # The third request is compared in the strict form, which both runs have.
    assert (found.both, rows_of(found.lost)) == (2, [(2, 2)])


@pytest.mark.parametrize(
    ("lost", "gained", "chance"), [(0, 0, 1.0), (3, 3, 1.0), (0, 6, 2 / 64), (1, 9, 22 / 1024)]
)
def test_the_sign_test_says_how_much_chance_explains(
    tmp_path: Path, lost: int, gained: int, chance: float
) -> None:
    a = with_wrong(30, set(range(gained)))
    b = with_wrong(30, set(range(20, 20 + lost)))
    assert compared(tmp_path, a, b).verdicts.chance == pytest.approx(chance)


def test_the_page_shows_what_differs(tmp_path: Path) -> None:
    rows = [{"name": "P17", "requests": 9, "before": {}, "after": {"efficacy": 0.75}}]
    group = {"column": "relation", "rows": rows}
    first = run_in(Store(tmp_path / "a"), with_wrong(30, {4}), groups=group)
    rows[0] = rows[0] | {"after": {"efficacy": 0.5}}
    ends = {"after": {"efficacy": [0.75, 0.85]}}
    second = run_in(Store(tmp_path / "b"), with_wrong(30, {7}), score=0.8, seed=1, groups=group,
                    intervals=ends, gates=GATES[1:2], run={"status": "held"})  # fmt: skip
    write_comparison(compare_runs(first, second), second)
    text = Page(second.read_bytes(PAGE).decode()).text
    for wanted in (
        "A: Promoted",
        "B: Held",
        "efficacy 90.0 % 80.0 % 75.0 to 85.0 −10.0 points",
        "perplexity 18 16 −11.11 %",
        "efficacy at least 95.0 % 99.0 % passed –",
        "specificity – at least 70.0 % 61.0 % not passed",
        "seed 0 1",
        "targets.workers 2 3",
        "digest of requests digest 0 digest 1",
        "edited 30 30",
        "P17 9 75.0 % 50.0 % −25.0",
        "Of 30 requests measured in both runs, 1 are right only in A and 1 only in B.",
        "Right in A, wrong in B row in A in B prompt wanted A says B says 7 7 The capital of",
        "Wrong in A, right in B row in A in B prompt wanted A says B says 4 4 The capital of",
        "h.3.w 1.8 1.6 1.800 % 1.600 %",
        "targets 9.0 s 8.0 s 3.33 targets/s 3.75 targets/s",
        "whole run 1 min 00 s 1 min 00 s",
    ):
        assert wanted in text, wanted
    assert "model" not in text.split("Settings that differ")[1].split("Counts")[0]


def test_two_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    same = compared(tmp_path, results_of(3), results_of(3))
    write_comparison(same, Store(tmp_path / "b"))
    text = Page((tmp_path / "b" / PAGE).read_text()).text
    assert "Settings that differ None." in text
    assert "0 are right only in A and 0 only in B. Right:" in text


def test_runs_grouped_by_other_columns_are_not_compared_by_group(tmp_path: Path) -> None:
    rows = [{"name": "x", "requests": 1, "after": {"efficacy": 1.0}}]
    first, second = (
        run_in(Store(tmp_path / name), results_of(2), groups={"column": name, "rows": rows})
        for name in ("a", "b")
    )
    assert compare_runs(first, second).groups == []


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, kind: str) -> None:
    def page(text: str) -> Page:
        text = text.encode(errors="backslashreplace").decode()
        words = {n: [text] * 3 for n in ("prompt", "target_new", "after_answer")}
        rows = [{"name": text, "requests": 3, "after": {"efficacy": 0.5}}]
        gates = [dict(GATES[1], name=text)]
        changes = {"groups": {"column": "x", "rows": rows}, "gates": gates}
        first = run_in(Store(tmp_path / "a"), with_wrong(3, {0}, **words), **changes)
        status = {"status": "held", "machine": text, "digests": {text: text}}
        second = run_in(Store(tmp_path / "b"), with_wrong(3, {1}, **words), run=status, **changes)
        second.write_bytes("job.yaml", b"{model: " + repr(text).encode() + b"}")
        write_comparison(compare_runs(first, second), second)
        html = second.read_bytes(PAGE).decode()
        assert len(html) < 500_000
        return Page(html)

    plain, hostile = page("plain"), page(HOSTILE[kind])
    assert set(hostile.tags) == set(plain.tags)
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    shown = HOSTILE[kind][:40].encode("unicode_escape" if kind in UNSEEN else "utf-8").decode()
    assert shown in "".join(hostile.words)


def test_runs_may_be_anywhere(tmp_path: Path) -> None:
    remote = run_in(Store("memory://compare-test"), results_of(3))
    found = compare_runs(remote, run_in(Store(tmp_path), results_of(3)))
    write_comparison(found, remote, "elsewhere/page.html")
    assert remote.exists("elsewhere/page.html")


@pytest.mark.parametrize("missing", ["run.json", "metrics.json", "results.parquet"])
def test_what_is_not_a_finished_run_is_refused(tmp_path: Path, missing: str) -> None:
    good, bad = (run_in(Store(tmp_path / name), results_of(3)) for name in ("good", "bad"))
    bad.delete(missing)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(RunFolderError, match=rf"bad holds no finished run \({missing} missing"):
            compare_runs(*pair)


@pytest.mark.parametrize("status", ["running", "failed", None])
def test_a_run_that_has_not_ended_well_is_refused(tmp_path: Path, status: str | None) -> None:
    good = run_in(Store(tmp_path / "good"), results_of(3))
    bad = run_in(Store(tmp_path / "bad"), results_of(3), run={"status": status})
    with pytest.raises(RunFolderError, match=f"bad holds no finished run: it is {status}; run its"):
        compare_runs(good, bad)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    good, bad = (run_in(Store(tmp_path / name), results_of(3)) for name in ("good", "bad"))
    bad.write_bytes("metrics.json", b"[1]")
    with pytest.raises(RunFolderError, match=r"bad/metrics.json was not written by a run"):
        compare_runs(good, bad)
    bad.write_bytes("results.parquet", b"PAR1")
    bad.write_json("metrics.json", {})
    with pytest.raises(StorageError, match=r"cannot read .*bad/results\.parquet"):
        compare_runs(good, bad)
