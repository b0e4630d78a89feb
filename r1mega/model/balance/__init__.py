"""Where experts lie. Registers the package's own choices; imports no torch."""

from r1mega.model.balance.choices import Balancer, Eplb, Proposal, Unmoved

__all__ = ["Balancer", "Eplb", "Proposal", "Unmoved"]
