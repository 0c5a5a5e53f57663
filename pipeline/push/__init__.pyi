from .pushing import Pushed as Pushed
from .pushing import push as push
