from . import optimization as optimization
from .memory import attention_shape as attention_shape
from .memory import free_memory as free_memory
from .memory import room_beside as room_beside
from .optimization import Targets as Targets
from .optimization import compute_targets as compute_targets
from .problem import Problem as Problem
from .problem import sharing_a_key as sharing_a_key
