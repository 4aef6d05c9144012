"""One update of one factor, forward and backward, for ranks up to 8: device functions.

A factor is a tuple of RANK columns (each a 1-D block, zero beyond its end), its Gram matrix a tuple of
RANK * RANK scalars, row-major. U and V take the same functions: for U (M, R) the projection is A = XV
and the Gram matrix VᵀV, for V (N, R) they are C = XᵀU and UᵀU. Names follow the mathematics:
``grad`` of a name is the gradient of the loss with respect to it.
"""
# Triton knows no unpacking inside a tuple, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(0, x), NaN kept as torch keeps it."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def replaced(values, INDEX: tl.constexpr, value):
    """A tuple with one entry replaced."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]


@triton.jit
def load_columns(pointer, offsets, stride, mask, RANK: tl.constexpr):
    """RANK columns from memory, the r-th at offsets + r * stride, zero where the mask is false."""
    columns = ()
    for r in tl.static_range(RANK):
        columns = columns + (tl.load(pointer + offsets + r * stride, mask=mask, other=0.0),)
    return columns


@triton.jit
def load_factor(factor, strides, at, grid_windows, index, mask, RANK: tl.constexpr):
    start = (at // grid_windows) * strides[0] + (at % grid_windows) * strides[1]
    return load_columns(factor, start + index.to(tl.int64) * strides[2], strides[3], mask, RANK)


@triton.jit
def converted(columns, like, RANK: tl.constexpr):
    """The columns in the dtype that the pointer ``like`` points to."""
    new = ()
    for r in tl.static_range(RANK):
        new = new + (columns[r].to(like.dtype.element_ty),)
    return new


@triton.jit
def store_columns(pointer, offsets, stride, columns, mask, RANK: tl.constexpr):
    for r in tl.static_range(RANK):
        tl.store(pointer + offsets + r * stride, columns[r], mask=mask)


@triton.jit
def gram(columns, RANK: tl.constexpr):
    """FᵀF; each of the equal halves is summed once."""
    products = ()
    for j in tl.static_range(RANK):
        for k in tl.static_range(RANK):
            if k < j:
                products = products + (products[k * RANK + j],)
            else:
                products = products + (tl.sum(columns[j] * columns[k], axis=0),)
    return products


@triton.jit
def times_columns(x, v, RANK: tl.constexpr):
    """XV: (M, N) block times RANK columns over N."""
    products = ()
    for r in tl.static_range(RANK):
        products = products + (tl.sum(x * v[r][None, :], axis=1),)
    return products


@triton.jit
def times_rows(x, u, RANK: tl.constexpr):
    """XᵀU: (M, N) block, transposed, times RANK columns over M."""
    products = ()
    for r in tl.static_range(RANK):
        products = products + (tl.sum(x * u[r][:, None], axis=0),)
    return products


@triton.jit
def outer(u, v, RANK: tl.constexpr):
    """UVᵀ as an (M, N) block."""
    product = u[0][:, None] * v[0][None, :]
    for r in tl.static_range(1, RANK):
        product += u[r][:, None] * v[r][None, :]
    return product


@triton.jit
def add(first, second, RANK: tl.constexpr):
    total = ()
    for r in tl.static_range(RANK):
        total = total + (first[r] + second[r],)
    return total


@triton.jit
def add_symmetric(grad, columns, grad_gram, RANK: tl.constexpr):
    """grad + F (B̄ + B̄ᵀ): what the Gram matrix FᵀF hands back to F."""
    total = ()
    for r in tl.static_range(RANK):
        column = grad[r]
        for j in tl.static_range(RANK):
            column += columns[j] * (grad_gram[j * RANK + r] + grad_gram[r * RANK + j])
        total = total + (column,)
    return total


@triton.jit
def update(factor, projection, gram, mask, HALS: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr):
    """The factor after one MU or HALS update; zero where the mask is false."""
    new = factor
    for r in tl.static_range(RANK):
        if HALS:
            numerator = projection[r] + EPS
            for j in tl.static_range(RANK):
                if j != r:
                    numerator -= new[j] * gram[j * RANK + r]
            column = relu(numerator / (gram[r * RANK + r] + EPS))
        else:
            column = factor[r] * projection[r] / _denominator(factor, gram, r, EPS, RANK)
        new = replaced(new, r, tl.where(mask, column, 0.0))
    return new


@triton.jit
def _denominator(factor, gram, r: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr):
    denominator = factor[0] * gram[r]
    for j in tl.static_range(1, RANK):
        denominator += factor[j] * gram[j * RANK + r]
    return denominator + EPS


@triton.jit
def update_backward(
    old, new, projection, gram, grad_new, HALS: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr
):
    """The gradients of the old factor, the projection and the Gram matrix, from that of the new factor."""
    zero = tl.zeros_like(grad_new[0])
    grad_projection = (zero,) * RANK
    grad_gram = (0.0,) * (RANK * RANK)  # every entry is replaced below
    if HALS:
        grad = grad_new
        for r in tl.static_range(RANK - 1, -1, -1):
            step = tl.where(new[r] > 0, grad[r], 0.0) / (gram[r * RANK + r] + EPS)
            grad_projection = replaced(grad_projection, r, step)
            # The old column r was not used: its update depends on the others only.
            grad = replaced(grad, r, zero)
            for j in tl.static_range(RANK):
                # The other columns as they stood when r was updated; its own, after the division.
                seen = old[j] if j > r else new[j]
                grad_gram = replaced(grad_gram, j * RANK + r, -tl.sum(seen * step, axis=0))
                if j != r:
                    grad = replaced(grad, j, grad[j] - step * gram[j * RANK + r])
    else:
        grad = (zero,) * RANK
        for r in tl.static_range(RANK):
            step = grad_new[r] / _denominator(old, gram, r, EPS, RANK)
            grad_denominator = -step * new[r]
            grad_projection = replaced(grad_projection, r, step * old[r])
            grad = replaced(grad, r, grad[r] + step * projection[r])
            for j in tl.static_range(RANK):
                grad_sum = tl.sum(old[j] * grad_denominator, axis=0)
                grad_gram = replaced(grad_gram, j * RANK + r, grad_sum)
                grad = replaced(grad, j, grad[j] + grad_denominator * gram[j * RANK + r])
    return grad, grad_projection, grad_gram
