"""Second moments of keys: their files, published ones, factors, and the pass over a corpus."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
