"""Where a model holds its facts: causal tracing, and what the optimisation of targets moves."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
