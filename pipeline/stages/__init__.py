"""The stages of a run; each reuses what the run folder already has, and does only the rest."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
