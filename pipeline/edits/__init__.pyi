from .rewriting import Rewritten as Rewritten
from .rewriting import apply_edit as apply_edit
from .rewriting import revert_edit as revert_edit
