"""The pointwise operators in PyTorch, a block of voxels at a time: for any device, where no compiler was.

Written as separate operations the chains wait for memory, and autograd keeps every intermediate. Here each
chain runs block by block: on a CPU the intermediates stay in the cache, and elsewhere few of them exist at a
time. The backward computes them again. Sums over voxels are added block by block, in order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from factorizer_kernels.ops.pointwise import reference
from factorizer_kernels.ops.pointwise.reference import linear, standardise
from factorizer_kernels.ops.pointwise.spec import gradients_like, yields
from factorizer_kernels.shared.registry import kernel

# Elements of a block: on a CPU one MiB of float32, elsewhere only the intermediates' memory counts.
_CPU_BLOCK = 2**18
_DEVICE_BLOCK = 2**26


def _blocks(x: Tensor) -> Iterator[tuple]:
    """Indices that cut x (B, C, V) into blocks: one item's voxels, or several whole items."""
    batch, channels, voxels = x.shape
    length = max((_CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK) // channels, 1)
    if length < voxels:
        for item in range(batch):
            for start in range(0, voxels, length):
                yield slice(item, item + 1), slice(None), slice(start, start + length)
    else:
        items = length // max(voxels, 1)
        for start in range(0, batch, items):
            yield (slice(start, start + items),)


def _forward(chain: Callable[..., Tensor], maps: Sequence[Tensor], out: Tensor) -> Tensor:
    """chain(*blocks of the maps) -> a block of out, for all blocks."""
    maps, flat = [m.flatten(2) for m in maps], out.flatten(2)
    for at in _blocks(maps[-1]):
        flat[at] = chain(*(m[at] for m in maps))
    return out


def _backward(
    chain: Callable[..., tuple[Tensor | None, ...]],
    maps: Sequence[Tensor],
    outputs: list[Tensor],
    num_maps: int,
) -> tuple[Tensor, ...]:
    """chain(*blocks of the maps) -> a block of each map's gradient, and shares of the weights'."""
    maps = [m.flatten(2) for m in maps]
    dmaps = [d.flatten(2) for d in outputs[:num_maps]]
    dweights = [d.zero_() for d in outputs[num_maps:]]
    for at in _blocks(maps[-1]):
        grads = chain(*(m[at] for m in maps))
        for dmap, grad in zip(dmaps, grads, strict=False):
            if grad is not None:
                dmap[at] = grad
        for dweight, grad in zip(dweights, grads[num_maps:], strict=True):
            if grad is not None and dweight.numel() > 0:
                dweight.add_(grad)
    return tuple(outputs)


def _over_columns(gradient: Tensor) -> Tensor:
    return gradient.sum((0, 2))


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, weight_grads: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, W and b for y = W x + b of x (B, C, n)."""
    dy = dy.to(dtype)
    dx = weight.to(dtype).mT @ dy
    if not weight_grads:
        return dx, None, None
    dweight = (dy @ x.to(dtype).mT).sum(0, dtype=weight.dtype)
    return dx, dweight, dy.sum((0, 2), dtype=weight.dtype)


def _standardise_backward(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dy = dy.to(y.dtype)
    mean, product = dy.mean(1, keepdim=True), (dy * y).mean(1, keepdim=True)
    return (dy - mean).sub_(y * product).mul_(scale)


# --- norm_linear -----------------------------------------------------------------------------


@kernel("norm_linear", "torch", yields=yields)
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    def chain(x: Tensor) -> Tensor:
        return reference.norm_linear(x, norm_weight, norm_bias, weight, bias, eps, dtype)

    channels = x.shape[1] if weight is None else weight.shape[0]
    return _forward(chain, [x], x.new_empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype))


@kernel("norm_linear_backward", "torch")
def norm_linear_backward(
    dy: Tensor,
    addend: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    def chain(dy: Tensor, x: Tensor, *addend: Tensor) -> tuple[Tensor | None, ...]:
        scale = dscale = dshift = dweight = dbias = None
        normed = x
        if norm_weight is not None and norm_bias is not None:
            x, scale = standardise(x, eps)
            normed = x * norm_weight[:, None] + norm_bias[:, None]
        if weight is not None:
            dy, dweight, dbias = linear_backward(dy, normed, weight, dtype, weight_grads)
        if norm_weight is not None and scale is not None:
            if weight_grads:
                dscale, dshift = _over_columns(dy * x), _over_columns(dy)
            dy = _standardise_backward(dy * norm_weight[:, None], x, scale)
        return sum(addend, dy), dscale, dshift, dweight, dbias

    outputs = gradients_like([x], [norm_weight, norm_bias, weight, bias], weight_grads)
    maps = [dy, x] if addend is None else [dy, x, addend]
    return _backward(chain, maps, outputs, 1)


# --- linear_norm_mlp -------------------------------------------------------------------------


@kernel("linear_norm_mlp", "torch")
def linear_norm_mlp(y: Tensor, x: Tensor, *others) -> Tensor:
    def chain(y: Tensor, x: Tensor) -> Tensor:
        return reference.linear_norm_mlp(y, x, *others)

    return _forward(chain, [y, x], x.new_empty(x.shape))


@kernel("linear_norm_mlp_backward", "torch")
def linear_norm_mlp_backward(dout: Tensor, y: Tensor, x: Tensor, *others) -> tuple[Tensor, ...]:
    *weights, eps, dtype, weight_grads = others
    weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, _ = weights
    compute = weight.dtype

    def chain(dout: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        dout = dout.to(compute)
        normed, scale = standardise(x.to(compute) + linear(y, weight, bias, dtype), eps)
        scaled = normed * norm_weight[:, None] + norm_bias[:, None]
        hidden = linear(scaled, weight1, bias1, dtype).to(compute)
        dhidden, *grads2 = linear_backward(dout, F.gelu(hidden), weight2, dtype, weight_grads)
        dhidden = torch.ops.aten.gelu_backward(dhidden.to(compute), hidden)
        dscaled, *grads1 = linear_backward(dhidden, scaled, weight1, dtype, weight_grads)
        dscale = _over_columns(dscaled * normed) if weight_grads else None
        dshift = _over_columns(dscaled) if weight_grads else None
        dz = _standardise_backward(dscaled * norm_weight[:, None], normed, scale) + dout
        dy, *grads = linear_backward(dz, y, weight, dtype, weight_grads)
        return dy, dz, *grads, dscale, dshift, *grads1, *grads2

    return _backward(chain, [dout, y, x], gradients_like([y, x], weights, weight_grads), 2)


# --- join and patch_conv: torch's own convolutions, which keep no intermediate ---------------------


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool, weight_grads: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, of the weight and of the bias, for a stride that is the kernel."""
    kernel_size, zeros, ones = weight.shape[2:], [0] * (x.dim() - 2), [1] * (x.dim() - 2)
    return torch.ops.aten.convolution_backward(
        dy.to(dtype), x.to(dtype), weight.to(dtype), [dy.shape[1]], kernel_size, zeros, ones, transposed,
        zeros, 1, [True, weight_grads, weight_grads],
    )  # fmt: skip


def _outputs(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients as `gradients_like` has them, copied only where they are not; None: of no elements."""
    return tuple(
        x.new_empty((0,)) if gradient is None else gradient.to(x.dtype).contiguous()
        for x, gradient in zip(inputs, gradients, strict=True)
    )


@kernel("join", "torch")
def join(
    skip: Tensor, x: Tensor, weight_skip: Tensor, weight_x: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    return reference.join(skip, x, weight_skip, weight_x, bias, dtype).contiguous()


@kernel("join_backward", "torch")
def join_backward(
    dy: Tensor,
    skip: Tensor,
    x: Tensor,
    weight_skip: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    dskip, dweight_skip, dbias = linear_backward(
        dy.flatten(2), skip.flatten(2), weight_skip, dtype, weight_grads
    )
    dx, dweight_x, _ = _convolution_backward(dy, x, weight_x, dtype, True, weight_grads)
    gradients = dskip.view(skip.shape), dx, dweight_skip, dweight_x, dbias
    return _outputs((skip, x, weight_skip, weight_x, bias), gradients)


@kernel("patch_conv", "torch", yields=yields)
def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return reference.patch_conv(x, weight, bias, dtype).contiguous()


@kernel("patch_conv_backward", "torch")
def patch_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, weight_grads: bool
) -> tuple[Tensor, ...]:
    gradients = _convolution_backward(dy, x, weight, dtype, False, weight_grads)
    return _outputs((x, weight, bias), gradients)
