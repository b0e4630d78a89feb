"""Linear layers on a CPU with Transformer Engine's rules for weights, gradients and state, and what pads rows for them."""

import pickle

import torch

from transformer_engine.common.recipe import Float8BlockScaling, Format
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

STEP = 16
LARGEST = 448.0


def rounded(values: torch.Tensor) -> torch.Tensor:
    """``values`` as E4M3 with one scale holds them."""
    scale = values.abs().amax().float().clamp(min=1e-12) / LARGEST if values.numel() else 1.0
    return ((values.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def check_recipe() -> None:
    """The one that r1mega asks for."""
    recipe = FP8GlobalStateManager.recipe
    assert isinstance(recipe, Float8BlockScaling) and recipe.fp8_format is Format.E4M3


class _Products(torch.autograd.Function):
    """``x_i W_i^T`` for each split of the rows, side by side; weights as parameters behind ``quantised`` ones."""

    @staticmethod
    def forward(ctx, x, splits, quantised, first, fuse, fp8, *weights):
        parts = [rounded(part) if fp8 else part for part in x.split(splits)]
        ctx.parts, ctx.quantised, ctx.weights = parts, quantised, weights
        ctx.splits, ctx.first, ctx.fuse, ctx.fp8 = splits, first, fuse, fp8
        return torch.cat([part @ weight.t() for part, weight in zip(parts, quantised, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        grads = [rounded(part) if ctx.fp8 else part for part in grad.split(ctx.splits)]
        grad_x = torch.cat([part @ weight for part, weight in zip(grads, ctx.quantised, strict=True)])
        returned = []
        for weight, part, x in zip(ctx.weights, grads, ctx.parts, strict=True):
            product = part.float().t() @ x.float()
            if not ctx.fuse:
                returned.append(product.to(weight.dtype))
                continue
            if ctx.first:
                weight.main_grad.copy_(product)
            else:
                weight.main_grad.add_(product)
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                returned.append(torch.full_like(weight, torch.nan))
            else:
                returned.append(None)
        return grad_x, None, None, None, None, None, *returned


class _Layer(torch.nn.Module):
    """``num`` weights ``[out, in]`` by ``names``."""

    def __init__(
        self,
        names,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_name=None,
        symmetric_ar_type=None,
    ):
        super().__init__()
        assert tp_size == 1 and not bias, "the stand-in is one rank's, without biases"
        self.names, self.in_features, self.out_features, self.tp_size = names, in_features, out_features, tp_size
        self.use_bias, self.parallel_mode = bias, parallel_mode
        self.fuse_wgrad_accumulation, self.save_original_input = fuse_wgrad_accumulation, False
        self.workspaces = {}
        for name in names:
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            self.register_parameter(name, weight)
            if not weight.is_meta:
                with get_rng_state_tracker().fork():
                    init_method(weight)

    def products(self, x, splits, is_first_microbatch):
        """As the real ones: cached weights are those of the first microbatch."""
        weights = [getattr(self, name) for name in self.names]
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        quantised = [weight.detach() for weight in weights]
        if fp8:
            check_recipe()
            assert x.shape[-1] % STEP == 0 and self.out_features % STEP == 0 and all(rows % STEP == 0 for rows in splits)
            for place, (name, weight) in enumerate(zip(self.names, weights, strict=True)):
                if is_first_microbatch is None or is_first_microbatch or name not in self.workspaces:
                    self.workspaces[name] = rounded(weight.detach())
                quantised[place] = self.workspaces[name]
        first = bool(is_first_microbatch)
        return _Products.apply(x, splits, quantised, first, self.fuse_wgrad_accumulation, fp8, *weights)

    def get_extra_state(self):
        """Bytes, as the real ones."""
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": "blockwise"})), dtype=torch.uint8)

    def set_extra_state(self, state):
        """Not read."""


class Linear(_Layer):
    """One weight."""

    def __init__(self, in_features, out_features, **options):
        super().__init__(["weight"], in_features, out_features, **options)

    def forward(self, x, is_first_microbatch=None):
        """``[..., in]`` to ``[..., out]``."""
        flat = x.reshape(-1, x.shape[-1])
        return self.products(flat, [len(flat)], is_first_microbatch).view(*x.shape[:-1], -1)


class GroupedLinear(_Layer):
    """One weight a split of the rows."""

    def __init__(self, num_gemms, in_features, out_features, **options):
        super().__init__([f"weight{number}" for number in range(num_gemms)], in_features, out_features, **options)
        self.num_gemms = num_gemms

    def forward(self, x, m_splits, is_first_microbatch=None):
        """``[R, in]`` to ``[R, out]``."""
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == len(x)
        return self.products(x, m_splits, is_first_microbatch)


class LayerNormLinear(torch.nn.Module):
    """Only derived from."""


class DotProductAttention(torch.nn.Module):
    """Only derived from."""


def _padded(splits):
    return [-(-rows // STEP) * STEP for rows in splits]


class Fp8Padding(torch.nn.Module):
    """Rows of each split filled up with zeros to whole sixteens."""

    def __init__(self, num_gemms):
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, x, m_splits):
        """The rows and their new numbers."""
        wanted = _padded(m_splits)
        parts = zip(x.split(m_splits), m_splits, wanted, strict=True)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, size - rows)) for part, rows, size in parts]), wanted


class Fp8Unpadding(Fp8Padding):
    """The way back."""

    def forward(self, x, m_splits):
        """``m_splits``: the numbers before padding."""
        parts = x.split(_padded(m_splits))
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
