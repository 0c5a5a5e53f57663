"""Exports of a run's edit: its deltas alone, or a LoRA adapter, each with a card."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
