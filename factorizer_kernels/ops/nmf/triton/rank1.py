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
        products = tl.where(m[None, :] == i, tl.sum(x * row(x, m, i)[None, :], axis=1)[:, None], products)
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
        w, e, _inverse = scaled(u, EPS)
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
    """(ā, b̄, Ḡ + Ḡᵀ, r̄) from ū of the last iteration; ā and b̄ belong to the first differentiated U step.

    a0, b0 start the iterations; grad_steps >= 1.
    """
    both_g = tl.zeros_like(g)
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
        both_g += grad_a[:, None] * w[None, :] + w[:, None] * grad_a[None, :]
        grad_u = scaled_backward(previous, w, e, inverse, grad_w, grad_e)
    if first > 0:
        w, e, inverse = scaled(row(history, t, first - 1), EPS)
        a, b = next_sums(g, r, w, e, N)
    else:
        a, b = a0, b0
    grad_a = grad_u / (b + EPS)
    return grad_a, -tl.sum(grad_a * row(history, t, first), axis=0), both_g, grad_r


@triton.jit
def column_of_v(x, w, e, n, N: tl.constexpr):
    """v = Xᵀw + e for the columns n of x, zero beyond column N."""
    return tl.where(n < N, tl.sum(x * w[:, None], axis=0) + e, 0.0)


@triton.jit
def sums(x, v0, m, M: tl.constexpr):
    """(a, b, G, r) of the columns in x, an (M, N) block."""
    return (
        tl.sum(x * v0[None, :], axis=1),
        tl.sum(v0 * v0, axis=0),
        gram_rows(x, m, M),
        tl.sum(x, axis=1),
    )


@triton.jit
def window(x, v0, m, n, t, num_iters, M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """(u, v) of a whole (M, N) block."""
    a, b, g, r = sums(x, v0, m, M)
    u, _history = solve(a, b, g, r, m, t, num_iters, M, N, EPS)
    w, e, _inverse = scaled(u, EPS)
    return u, column_of_v(x, w, e, n, N)


@triton.jit
def window_backward(
    x, v0, dy, m, n, t, num_iters, grad_steps, M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr
):
    """(x̄, v̄0) of a whole (M, N) block, v̄0 for the v that the first differentiated iteration starts from."""
    a, b, g, r = sums(x, v0, m, M)
    u, history = solve(a, b, g, r, m, t, num_iters, M, N, EPS)
    w, e, inverse = scaled(u, EPS)
    grad_u = tl.sum(dy * column_of_v(x, w, e, n, N)[None, :], axis=1)
    grad_v = tl.sum(dy * u[:, None], axis=0)
    grad_w = tl.sum(x * grad_v[None, :], axis=1)
    grad_u += scaled_backward(u, w, e, inverse, grad_w, tl.sum(grad_v, axis=0))
    grad_a, grad_b, both_g, grad_r = solve_backward(
        grad_u, a, b, g, r, history, t, num_iters, grad_steps, N, EPS
    )
    start = v0
    if num_iters > grad_steps:
        w_start, e_start, _inverse = scaled(row(history, t, num_iters - grad_steps - 1), EPS)
        start = column_of_v(x, w_start, e_start, n, N)
    grad_v0 = tl.sum(x * grad_a[:, None], axis=0) + 2.0 * grad_b * start
    return map_gradient(x, w, grad_v, grad_a, start, both_g, grad_r, m, M), grad_v0


@triton.jit
def map_gradient(x, w, grad_v, grad_a, start, both_g, grad_r, m, M: tl.constexpr):
    """x̄ of the columns in x: what v = Xᵀw + e, a = X v_start, G and r hand back."""
    grad_x = w[:, None] * grad_v[None, :] + grad_a[:, None] * start[None, :] + grad_r[:, None]
    for i in tl.static_range(M):
        grad_x += column(both_g, m, i)[:, None] * row(x, m, i)[None, :]
    return grad_x
