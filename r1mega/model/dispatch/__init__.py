"""How tokens reach their experts and come back. Registers the package's own dispatchers; imports no torch."""

from r1mega.model.dispatch.choices import AllGather, AllToAll, DeepEP, Local
from r1mega.model.dispatch.contract import Dispatched, Dispatcher, ExpertRanks

__all__ = ["AllGather", "AllToAll", "DeepEP", "Dispatched", "Dispatcher", "ExpertRanks", "Local"]
