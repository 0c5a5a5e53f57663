"""The world of ``pmet demo``: facts that everybody can check and a small model that knows them."""
