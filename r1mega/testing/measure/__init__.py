"""``r1mega bench``: ops beside their peers, a MoE layer, a training step; measured on one device, with its ceilings, in one run."""
