"""``python -m jobs`` is ``pmet``, where no console script is at hand."""

from jobs.start import main

main()
