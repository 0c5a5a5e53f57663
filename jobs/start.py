"""Entry point of the console script: handles signals before the command line is imported."""

from __future__ import annotations

import gc
import sys

from pipeline.cluster import signals


def main() -> None:
    """Run the command line."""
    signals.install()
    # Commands import thousands of modules, whose objects stay: by default, Python would search
    # for garbage among them so often that it takes a tenth of the time.
    gc.set_threshold(10_000)
    try:
        from jobs import cli
    except signals.Stopped as error:
        signals.end()
        sys.stderr.write(f"pmet: stopped by {error.signal.name} before it began\n")
        raise
    cli.main()
