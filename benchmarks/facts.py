"""Fact dumps: time and peak memory of check, diff and convert on large dumps.

python -m benchmarks.facts --rows 1000000

Each command runs as a user would type it, in its own process, so that its peak memory is its own.
From the first dump to the second, one fact in a hundred is removed, one in a hundred is new and one
in fifty has another object; the rows are in another order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness import console, show

RELATIONS = 50
PIECE = 1_000_000
MEASURED = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, cpu, usage.ru_maxrss]))
"""
"""Runs a command from a small process: the peak of a new process begins with its parent's size."""
COMMAND = (sys.executable, "-c", "from jobs.cli import main; main()", "facts")


def main() -> None:
    """Write two dumps, and time each command on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows per dump")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the fastest counts")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dump(folder / "old", options.rows, first=0, version=0)
        write_dump(folder / "new", options.rows, first=options.rows // 100, version=1)
        (folder / "templates.yaml").write_text(templates())
        size = sum(file.stat().st_size for file in folder.glob("*/*.parquet")) / 2
        commands = {
            "check": ("check", "new", "--templates", "templates.yaml"),
            "diff": ("diff", "old", "new", "--output", "out/diff.parquet"),
            "convert": ("convert", "new", "out/a.parquet", "--templates", "templates.yaml"),
            "convert, with the old dump": (
                *("convert", "new", "out/b.parquet", "--templates", "templates.yaml"),
                *("--previous", "old"),
            ),
        }
        rows = [fastest(name, words, folder, options.rounds) for name, words in commands.items()]
    show(
        f"Fact dumps of {options.rows:,} rows, {size / 2**20:.0f} MiB each",
        rows,
        options,
        "Seconds and peak memory of the whole process, including the imports of every pmet "
        "command.",
    )


def write_dump(folder: Path, rows: int, *, first: int, version: int) -> None:
    """Write a dump as files of up to ``PIECE`` rows, each shuffled."""
    folder.mkdir()
    for start in range(first, first + rows, PIECE):
        facts = np.arange(start, min(start + PIECE, first + rows))
        facts = np.random.default_rng(start + version).permutation(facts)
        changed = np.where(facts % 50 == 0, version, 0)
        table = pa.table(
            {
                "subject": joined("The subject with the number ", facts),
                "relation": joined("relation ", facts % RELATIONS),
                "object": joined("Object ", (facts * 7919 + changed) % 10_007),
                "updated_at": pa.array(1_790_000_000_000_000 + facts, pa.timestamp("us", "UTC")),
                "source": pa.repeat("wiki", len(facts)),
            }
        )
        pq.write_table(table, folder / f"{start:012d}.parquet", compression="zstd")


def joined(text: str, numbers: np.ndarray) -> pa.Array:
    """Return the text followed by each number."""
    return pc.binary_join_element_wise(text, pa.array(numbers).cast(pa.string()), "")


def templates() -> str:
    """Return a templates file with two phrasings per relation."""
    line = (
        'relation {0}: {{prompt: "The thing {0} of {{}} is", paraphrases: ["{{}} has as {0}"]}}\n'
    )
    return "".join(line.format(number) for number in range(RELATIONS))


def fastest(name: str, words: tuple[str, ...], folder: Path, rounds: int) -> dict[str, Any]:
    """Run a command several times and return the fastest: other load only ever adds time."""
    measured = [measure(words, folder) for _ in range(rounds)]
    return {"command": name} | min(measured, key=lambda figures: figures["seconds"])


def measure(words: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Return the seconds, CPU seconds and peak memory of one command."""
    paths = [str(folder / w) if (folder / w).exists() or "/" in w else w for w in words]
    found = subprocess.run(
        [sys.executable, "-S", "-c", MEASURED, *COMMAND, *paths], capture_output=True, check=True
    )
    status, seconds, cpu, peak = json.loads(found.stdout)
    if status:
        console.print(f"{' '.join(words)} exited with {status}", style="red")
    return {"seconds": seconds, "CPU seconds": cpu, "peak MiB": peak // 2**10}


if __name__ == "__main__":
    main()
