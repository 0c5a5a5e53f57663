"""``python -m jobs`` is ``pmet``, where no console script is at hand."""

from jobs.cli import main

main()
