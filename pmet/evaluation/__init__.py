"""Evaluation: a model's answers, the likelihood it gives texts, and the metrics of both."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
