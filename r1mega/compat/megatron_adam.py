"""Megatron-Core 0.16.1's distributed optimizer around torch's own Adam (no Transformer Engine, no Apex). Owns the bends of its load.

| bend | symptom without it | remove when |
|---|---|---|
| states that the checkpoint does not carry a tensor for are left alone | ``KeyError: 'step'`` when a fully reshardable checkpoint is loaded | ``_set_main_param_and_optimizer_states`` copies what it was given |
| every parameter gets a step counter of its own after a load | one counter tensor is shared by all parameters, so the next update adds their number to it: the bias correction, and with it the resumed run, is wrong | ``load_state_dict`` clones it |
| an optimizer without weights (a pipeline stage without experts) takes its step from its neighbours | ``AssertionError`` at ``len(steps) == 1`` when such a rank saves or loads | ``state_dict`` allows for no state |

Versions: megatron-core 0.16.1, torch 2.11 to 2.13.
"""

from __future__ import annotations


def apply() -> None:
    """Bend the class; safe to call again."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    if hasattr(DistributedOptimizer, "_r1mega_bent"):
        return
    load = DistributedOptimizer.load_state_dict
    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def put_given(self, model_param, tensors):
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            put(self, model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        held = {"param": main, **self.optimizer.state[main]}
        for key, value in tensors.items():
            held[key].detach().copy_(value)

    def load_unshared(self, state_dict):
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    describe, synchronize = DistributedOptimizer.state_dict, ChainedOptimizer._synchronize_steps

    def describe_with_step(self):
        inner = self.optimizer
        if not isinstance(inner, torch.optim.Adam) or inner.state:
            return describe(self)
        own = inner.state_dict
        inner.state_dict = lambda: {**own(), "state": {0: {"step": torch.tensor(getattr(self, "_r1mega_step", 0.0))}}}
        try:
            return describe(self)
        finally:
            del inner.state_dict

    def synchronize_with_empty(self):
        synchronize(self)
        parts = [part for part in self.chained_optimizers if isinstance(getattr(part, "optimizer", None), torch.optim.Adam)]
        steps = [float(state["step"]) for part in parts for state in part.optimizer.state.values() if "step" in state]
        for part in parts:
            part._r1mega_step = max(steps, default=0.0)

    DistributedOptimizer.state_dict, ChainedOptimizer._synchronize_steps = describe_with_step, synchronize_with_empty
    DistributedOptimizer._set_main_param_and_optimizer_states = put_given
    DistributedOptimizer.load_state_dict = load_unshared
    DistributedOptimizer._r1mega_bent = True
