from .exporting import Exported as Exported
from .exporting import Kind as Kind
from .exporting import export_run as export_run
