from .prediction import Estimate as Estimate
from .prediction import estimate as estimate
