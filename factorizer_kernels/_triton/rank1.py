"""The rank-1 identity for HALS on X >= 0 with v0 >= 0: device functions.

The projections never act, and V enters the next U only through a = Xv and b = vᵀv. With G = XXᵀ and
r = X1 both follow from u alone, ε included, so that the iterations never look at X again:

    u = (a + ε) / (b + ε),  d = uᵀu,  w = u / (d + ε),  e = ε / (d + ε),  v = Xᵀw + e,
    a' = Gw + e r,          b' = wᵀa' + e (rᵀw + e N).

(w and e are taken before the products, so that d² never appears: it would underflow for small X.)
Vectors are (M,) blocks, zero beyond row M; G is an (M, M) block; ``history`` is a (T, M) block, row t the
u of iteration t.
"""

import triton
import triton.language as tl

from factorizer_kernels._triton.updates import relu


@triton.jit
def row(block, index, i):
    """Row i of a block; ``index`` counts its rows."""
    return tl.sum(tl.where(index[:, None] == i, block, 0.0), axis=0)


@triton.jit
def column(block, index, i):
    """Column i of a block; ``index`` counts its columns."""
    return tl.sum(tl.where(index[None, :] == i, block, 0.0), axis=1)


@triton.jit
def gram_rows(x, m, M: tl.constexpr):
    """XXᵀ of an (M, N) block, as an (M, M) block."""
    products = tl.zeros([m.shape[0], m.shape[0]], x.dtype)
    for i in range(M):
        products = tl.where(
            m[None, :] == i, tl.sum(x * row(x, m, i)[None, :], axis=1)[:, None], products
        )
    return products


@triton.jit
def step_u(a, b, m, M: tl.constexpr, EPS: tl.constexpr):
    return tl.where(m < M, (a + EPS) / (b + EPS), 0.0)


@triton.jit
def scaled(u, EPS: tl.constexpr):
    """(w, e, 1 / (d + ε)) of u."""
    inverse = 1.0 / (tl.sum(u * u, axis=0) + EPS)
    return u * inverse, EPS * inverse, inverse


@triton.jit
def next_sums(g, r, w, e, N: tl.constexpr):
    """(a, b) of the next U step."""
    a = tl.sum(g * w[None, :], axis=1) + e * r
    return a, tl.sum(w * (a + e * r), axis=0) + e * e * N


@triton.jit
def solve(a, b, g, r, m, t, num_iters, M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """(u, history) after num_iters >= 1 iterations from a = X v0, b = v0ᵀv0."""
    u = step_u(a, b, m, M, EPS)
    history = tl.where(t[:, None] == 0, u[None, :], 0.0)
    for i in range(1, num_iters):
        w, e, inverse = scaled(u, EPS)
        a, b = next_sums(g, r, w, e, N)
        u = step_u(a, b, m, M, EPS)
        history = tl.where(t[:, None] == i, u[None, :], history)
    return u, history


@triton.jit
def scaled_backward(u, w, e, inverse, grad_w, grad_e):
    """The gradient of u from those of w and e."""
    # d enters through 1 / (d + ε); its gradient is -(wᵀw̄ + e ē) / (d + ε).
    grad_d = -(tl.sum(w * grad_w, axis=0) + e * grad_e) * inverse
    return grad_w * inverse + 2.0 * grad_d * u


@triton.jit
def solve_backward(
    grad_u, a0, b0, g, r, history, t, num_iters, grad_steps, N: tl.constexpr, EPS: tl.constexpr
):
    """(ā, b̄, Ḡ, r̄) from ū of the last iteration; ā and b̄ belong to the first differentiated U step.

    a0, b0 start the iterations; grad_steps >= 1.
    """
    grad_g = tl.zeros_like(g)
    grad_r = tl.zeros_like(r)
    first = num_iters - grad_steps
    for k in range(grad_steps - 1):
        i = num_iters - 1 - k
        u = row(history, t, i)
        previous = row(history, t, i - 1)
        w, e, inverse = scaled(previous, EPS)
        a, b = next_sums(g, r, w, e, N)
        grad_a = grad_u / (b + EPS)
        grad_b = -tl.sum(grad_a * u, axis=0)
        grad_w = grad_b * (a + e * r)
        grad_e = grad_b * (tl.sum(r * w, axis=0) + 2.0 * e * N)
        grad_r += grad_b * e * w
        grad_a += grad_b * w
        grad_w += tl.sum(g * grad_a[:, None], axis=0)
        grad_e += tl.sum(r * grad_a, axis=0)
        grad_r += e * grad_a
        grad_g += grad_a[:, None] * w[None, :]
        grad_u = scaled_backward(previous, w, e, inverse, grad_w, grad_e)
    if first > 0:
        w, e, inverse = scaled(row(history, t, first - 1), EPS)
        a, b = next_sums(g, r, w, e, N)
    else:
        a, b = a0, b0
    grad_a = grad_u / (b + EPS)
    return grad_a, -tl.sum(grad_a * row(history, t, first), axis=0), grad_g, grad_r
