"""The rank-1 identity for HALS on X >= 0 with v0 >= 0: device functions.

The projections never act, and V enters the next U only through a = Xv and b = vᵀv. With G = XXᵀ and
r = X1 both follow from u alone, ε included, so that the iterations never look at X again:

    u = (a + ε) / (b + ε),  d = uᵀu,  w = u / (d + ε),  e = ε / (d + ε),  v = Xᵀw + e,
    a' = Gw + e r,          b' = wᵀa' + e (rᵀw + e N).

(w and e are taken before the products, so that d² never appears: it would underflow for small X.)

W matrices go side by side. X, dy and their gradients are tuples of M rows, (W, N) blocks; u, w, a and r are
tuples of M numbers, (W, 1) blocks, and G is one of M * M, row-major. So every sum over a window is one over
a row or over the product of two, nothing is picked out of a block, and of G's equal halves one is summed.
``history`` is a tuple of M (W, T) blocks: column t of the i-th is u_i of iteration t.
"""
# Triton knows no unpacking inside a tuple, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from factorizer_kernels.ops.nmf.triton.updates import load_columns, relu
from factorizer_kernels.ops.windows.address import channel_stride, first_row_offsets


@triton.jit
def load_rows(pointer, strides, window, sizes, n, mask, like, M: tl.constexpr, PATCH: tl.constexpr):
    """The rows of X = relu(x), zero where the mask is false, in the dtype that ``like`` points to."""
    offsets = first_row_offsets(n, window, sizes, strides, PATCH)
    loaded = load_columns(pointer, offsets, channel_stride(strides), mask, M)
    rows = ()
    for i in tl.static_range(M):
        rows = rows + (relu(loaded[i].to(like.dtype.element_ty)),)
    return rows


@triton.jit
def total(block):
    """The sum of each row of a block, as a column."""
    return tl.sum(block, axis=1, keep_dims=True)


@triton.jit
def totals(rows, M: tl.constexpr):
    """The sum of each of M rows."""
    sums = ()
    for i in tl.static_range(M):
        sums = sums + (total(rows[i]),)
    return sums


@triton.jit
def times(rows, row, M: tl.constexpr):
    """The inner product of each of M rows with one more."""
    sums = ()
    for i in tl.static_range(M):
        sums = sums + (total(rows[i] * row),)
    return sums


@triton.jit
def gram(rows, M: tl.constexpr):
    """XXᵀ."""
    triangle = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            triangle = triangle + (total(rows[i] * rows[j]),)
    return square(triangle, M)


@triton.jit
def square(triangle, M: tl.constexpr):
    """All M * M entries of a symmetric matrix from its upper triangle, which goes row by row."""
    entries = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            if j < i:
                entries = entries + (entries[j * M + i],)
            else:
                entries = entries + (triangle[i * M - i * (i + 1) // 2 + j],)
    return entries


@triton.jit
def combine(values, weights, M: tl.constexpr):
    """Σ_i weights_i values_i, of M numbers or of M rows."""
    combination = values[0] * weights[0]
    for i in tl.static_range(1, M):
        combination += values[i] * weights[i]
    return combination


@triton.jit
def scale(values, factor, M: tl.constexpr):
    """factor * values."""
    scaled_values = ()
    for i in tl.static_range(M):
        scaled_values = scaled_values + (values[i] * factor,)
    return scaled_values


@triton.jit
def add_scaled(values, others, factor, M: tl.constexpr):
    """values + factor * others."""
    sums = ()
    for i in tl.static_range(M):
        sums = sums + (values[i] + others[i] * factor,)
    return sums


@triton.jit
def multiply_add(g, w, values, factor, M: tl.constexpr):
    """Gw + factor * values."""
    sums = ()
    for i in tl.static_range(M):
        entry = values[i] * factor
        for j in tl.static_range(M):
            entry += g[i * M + j] * w[j]
        sums = sums + (entry,)
    return sums


@triton.jit
def add_symmetric_product(triangle, p, q, M: tl.constexpr):
    """The upper triangle of S + pqᵀ + qpᵀ from that of S."""
    entries = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            entries = entries + (triangle[i * M - i * (i + 1) // 2 + j] + (p[i] * q[j] + q[i] * p[j]),)
    return entries


@triton.jit
def side_by_side(numbers, m, M: tl.constexpr):
    """M numbers as the columns m of one block."""
    block = tl.where(m == 0, numbers[0], 0.0)
    for i in tl.static_range(1, M):
        block = tl.where(m == i, numbers[i], block)
    return block


@triton.jit
def recall(history, t, step, M: tl.constexpr):
    """The u of one iteration."""
    u = ()
    for i in tl.static_range(M):
        u = u + (total(tl.where(t == step, history[i], 0.0)),)
    return u


@triton.jit
def sums(x, v0, M: tl.constexpr):
    """(a, b, G, r) of the columns in x."""
    return times(x, v0, M), total(v0 * v0), gram(x, M), totals(x, M)


@triton.jit
def step_u(a, b, M: tl.constexpr, EPS: tl.constexpr):
    u = ()
    for i in tl.static_range(M):
        u = u + ((a[i] + EPS) / (b + EPS),)
    return u


@triton.jit
def scaled(u, M: tl.constexpr, EPS: tl.constexpr):
    """(w, e, 1 / (d + ε)) of u."""
    inverse = 1.0 / (combine(u, u, M) + EPS)
    return scale(u, inverse, M), EPS * inverse, inverse


@triton.jit
def next_sums(g, r, w, e, M: tl.constexpr, N: tl.constexpr):
    """(a, b, a + e r) of the next U step."""
    a = multiply_add(g, w, r, e, M)
    a_and_r = add_scaled(a, r, e, M)
    return a, combine(w, a_and_r, M) + e * e * N, a_and_r


@triton.jit
def solve(a, b, g, r, t, num_iters, M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """(u, history) after num_iters >= 1 iterations from a = X v0, b = v0ᵀv0."""
    u = step_u(a, b, M, EPS)
    history = ()
    for i in tl.static_range(M):
        history = history + (tl.where(t == 0, u[i], 0.0),)
    for step in range(1, num_iters):
        w, e, _inverse = scaled(u, M, EPS)
        a, b, _a_and_r = next_sums(g, r, w, e, M, N)
        u = step_u(a, b, M, EPS)
        longer = ()
        for i in tl.static_range(M):
            longer = longer + (tl.where(t == step, u[i], history[i]),)
        history = longer
    return u, history


@triton.jit
def column_of_v(x, w, e, mask, M: tl.constexpr):
    """v = Xᵀw + e for the columns of x, zero where the mask is false."""
    return tl.where(mask, combine(x, w, M) + e, 0.0)


@triton.jit
def scaled_backward(u, w, e, inverse, grad_w, grad_e, M: tl.constexpr):
    """The gradient of u from those of w and e."""
    # d enters through 1 / (d + ε); its gradient is -(wᵀw̄ + e ē) / (d + ε).
    grad_d = -(combine(w, grad_w, M) + e * grad_e) * inverse
    return add_scaled(scale(grad_w, inverse, M), u, 2.0 * grad_d, M)


@triton.jit
def solve_backward(
    grad_u, u, b0, g, r, history, t, num_iters, grad_steps,
    M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """(ā, b̄, Ḡ + Ḡᵀ, r̄) from u and ū of the last iteration; ā, b̄ are the first differentiated U step's.

    b0 is that of the first iteration; grad_steps >= 1.
    """
    zero = tl.zeros_like(b0)
    both_g = (zero,) * (M * (M + 1) // 2)
    grad_r = (zero,) * M
    first = num_iters - grad_steps
    for k in range(grad_steps - 1):
        previous = recall(history, t, num_iters - 2 - k, M)
        w, e, inverse = scaled(previous, M, EPS)
        _a, b, a_and_r = next_sums(g, r, w, e, M, N)
        grad_a = scale(grad_u, 1.0 / (b + EPS), M)
        grad_b = -combine(grad_a, u, M)
        grad_a = add_scaled(grad_a, w, grad_b, M)
        grad_w = multiply_add(g, grad_a, a_and_r, grad_b, M)
        grad_e = grad_b * (combine(r, w, M) + 2.0 * e * N) + combine(r, grad_a, M)
        grad_r = add_scaled(add_scaled(grad_r, w, grad_b * e, M), grad_a, e, M)
        both_g = add_symmetric_product(both_g, grad_a, w, M)
        grad_u = scaled_backward(previous, w, e, inverse, grad_w, grad_e, M)
        u = previous
    b = b0
    if first > 0:
        w, e, _inverse = scaled(recall(history, t, first - 1, M), M, EPS)
        _a, b, _a_and_r = next_sums(g, r, w, e, M, N)
    grad_a = scale(grad_u, 1.0 / (b + EPS), M)
    return grad_a, -combine(grad_a, u, M), square(both_g, M), grad_r


@triton.jit
def product_backward(dy, offsets, stride, mask, mean, u, v, M: tl.constexpr):
    """(ū, v̄) of y = uvᵀ from dy times ``mean``, whose rows are read one by one."""
    grad_u, grad_v = (), tl.zeros_like(v)
    for i in tl.static_range(M):
        row = tl.load(dy + offsets + i * stride, mask=mask, other=0.0).to(v.dtype) * mean
        grad_u = grad_u + (total(row * v),)
        grad_v += row * u[i]
    return grad_u, grad_v


@triton.jit
def gradient_row(x, INDEX: tl.constexpr, w, grad_v, grad_a, start, both_g, grad_r, M: tl.constexpr):
    """One row of x̄, after x's ReLU: what v = Xᵀw + e, a = X v_start, G and r hand back."""
    grad = w[INDEX] * grad_v + grad_a[INDEX] * start + grad_r[INDEX]
    for i in tl.static_range(M):
        grad += both_g[INDEX * M + i] * x[i]
    return tl.where(x[INDEX] <= 0, 0.0, grad)  # NaN keeps its gradient, as in torch
