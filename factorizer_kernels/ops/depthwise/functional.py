"""The public function ``depthwise_conv``."""

from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.depthwise import reference
from factorizer_kernels.ops.depthwise.autograd import DepthwiseConv
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.checks import feature_map, tensor
from factorizer_kernels.shared.dtypes import autocast_dtype, compute_dtype

load_kernels(__package__)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Filter each channel of a feature map by a small filter of its own.

    y[b, c, p] = bias[c] + Σ_t weight[c, t] x[b, c, p + t - (k - 1) / 2], where x is zero outside of the map:
    ``torch.nn.functional.conv3d(x, weight[:, None], bias, padding=(k - 1) / 2, groups=C)``, and the same of
    other dimensions. Autograd keeps x and weight.

    Args:
        x: (B, C, S1..Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16. Under autocast x is first
            converted to autocast's dtype, as for torch's convolutions; float64 is not.
        weight: (C, k1..kp), each k odd. Converted to the arithmetic's dtype: float32, or float64 where x is.
        bias: (C), or None for none; converted likewise.

    Returns:
        (B, C, S1..Sp) in x's dtype.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = feature_map("x", x)
    channels, axes = x.shape[1], x.dim() - 2
    layout = "(C, k1..kp), one k for each spatial axis of x"
    weight = tensor("weight", weight, layout, axes + 1, axes + 1, x.device)
    if weight.shape[0] != channels:
        raise ValueError(
            f"weight must have {channels} filters, one for each channel of x, got shape {tuple(weight.shape)}"
        )
    if any(k % 2 == 0 for k in weight.shape[1:]):
        raise ValueError(f"weight must have an odd extent along each axis, got shape {tuple(weight.shape)}")
    if bias is not None:
        bias = tensor("bias", bias, "(C)", 1, 1, x.device)
        if bias.shape[0] != channels:
            raise ValueError(
                f"bias must have {channels} entries, one for each channel of x, got shape {tuple(bias.shape)}"
            )
    x = x.to(autocast_dtype(x))
    dtype = compute_dtype(x.dtype)
    weight = weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    backend = choose("depthwise_conv", x, tuple(weight.shape[1:]))
    if backend == "reference":
        return reference.depthwise_conv(x, weight, bias)
    return call_function("depthwise_conv", DepthwiseConv, x, weight, bias, backend)
