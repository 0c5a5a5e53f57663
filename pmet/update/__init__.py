"""The update: keys, second moments, sums of keys and residuals, and the solve."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
