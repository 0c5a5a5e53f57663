"""``python -m jobs`` runs ``pmet`` where the console script is not installed."""

from jobs.start import main

main()
