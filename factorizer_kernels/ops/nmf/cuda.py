"""NMF: the calls of the CUDA kernels, which are those of ``swin_nmf``, as on the CPU."""

from math import prod

from torch import Tensor

from factorizer_kernels.shared import cuda, registry


def _call(x: Tensor, u0, v0, num_iters, solver, grad_steps, eps) -> cuda.Call:
    *batch, rows, columns = x.shape
    one_window = [1, 1, columns]
    windows = cuda.native.Windows(prod(batch), 1, rows, one_window, one_window, [0, 0, 0])
    return cuda.Call(_as_map(x), windows, u0, v0, batch, num_iters, grad_steps, solver == "hals", False, eps)


def _as_map(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-2]), *x.shape[-2:])


def nmf(x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, eps) -> Tensor:
    y = x.new_empty(x.shape)
    _call(x, u0, v0, num_iters, solver, num_iters, eps).forward(y=y)
    return y


def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, grad_steps, eps, factor_grads
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(x, u0, v0, num_iters, solver, grad_steps, eps)
    dx, du0, dv0 = call.backward(factor_grads, _as_map(dy))
    return dx.view(x.shape), du0, dv0


def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, eps) -> tuple[Tensor, Tensor]:
    call = _call(x, u0, v0, num_iters, solver, num_iters, eps)
    u, v = call.factor_rows()
    call.forward(u=u, v=v)
    return u.mT.to(x.dtype).contiguous(), v.mT.to(x.dtype).contiguous()


def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor,
    num_iters, solver, grad_steps, eps, factor_grads,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(x, u0, v0, num_iters, solver, grad_steps, eps)
    du, dv = (grad.mT.to(u0.dtype).contiguous() for grad in (du, dv))
    dx, du0, dv0 = call.backward(factor_grads, du=du, dv=dv)
    return dx.view(x.shape), du0, dv0


if cuda.native is not None:
    for _function in (nmf, nmf_backward, nmf_factors, nmf_factors_backward):
        registry.kernel(_function.__name__, "cuda", cuda.limit)(_function)
