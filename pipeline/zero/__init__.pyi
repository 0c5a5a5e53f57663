from .layer_edit import LayerReport as LayerReport
from .rank import UpdateJob as UpdateJob
from .rank import UpdateRank as UpdateRank
from .rank import UpdateShard as UpdateShard
from .slices import deepspeed as deepspeed
