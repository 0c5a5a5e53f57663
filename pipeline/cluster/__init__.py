"""Ray: the session, pools of workers, groups of ranks, and where they fit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
