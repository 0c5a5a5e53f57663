"""Reports after a run: report page, comparison, model card, charts, trackers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
