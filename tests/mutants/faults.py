"""Faults to plant in a copy of the sources, one at a time: a wrong sign, a wrong index, a missing term."""

from typing import NamedTuple

# What has to see them: quick tests of values and gradients, the first that fails ends the run.
KERNELS = (
    "tests/factorizer_kernels/test_windows.py",
    "tests/factorizer_kernels/test_swin_nmf.py",
    "tests/factorizer_kernels/test_nmf.py",
)
NMF = ("tests/factorizer_kernels/test_nmf.py",)
PRODUCT = ("tests/factorizer_kernels/test_product.py",)
DEPTHWISE = ("tests/factorizer_kernels/test_depthwise.py",)
POINTWISE = ("tests/factorizer_kernels/test_pointwise.py",)
SETTINGS = ("tests/factorizer_kernels/test_torch.py", "tests/factorizer_kernels/test_arguments.py")
BINDING = ("tests/factorizer_kernels/test_binding.py", "tests/factorizer_kernels/test_processes.py")
TRITON = ("tests/factorizer_kernels/triton/interpreted",)


class Fault(NamedTuple):
    """``right`` stands once in ``file`` and is replaced by ``wrong``; ``tests`` are to fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = KERNELS


_MATH = "csrc/math/"
_TRITON = "factorizer_kernels/ops/nmf/triton/"
_PRODUCT = "csrc/cpu/common/product.h"
_NMF = "csrc/cpu/nmf/"
_DEPTHWISE = "csrc/cpu/depthwise/"
_POINTWISE = "csrc/cpu/pointwise/"

FAULTS = (
    # The solvers' arithmetic, shared by the native backends.
    Fault(
        "HALS: a component is added instead of taken away", _MATH + "factor_update.h",
        "numerator -= f.get(j) * gram[j * rank + r];", "numerator += f.get(j) * gram[j * rank + r];",
    ),
    Fault(
        "HALS backward: the projection's mask is missing", _MATH + "factor_update.h",
        "dn = f_new.get(r) > decltype(dn){} ? dn : decltype(dn){};", "",
    ),
    Fault(
        "MU: the Gram matrix is indexed by its row twice", _MATH + "factor_update.h",
        "for (i64 j = 1; j < rank; ++j) q += f.get(j) * gram[j * rank + r];\n    out.set",
        "for (i64 j = 1; j < rank; ++j) q += f.get(j) * gram[j * rank + j];\n    out.set",
    ),
    Fault(
        "MU backward: the denominator's gradient has the wrong sign", _MATH + "factor_update.h",
        "dq.set(r, -dp * f_new.get(r));", "dq.set(r, dp * f_new.get(r));",
    ),
    Fault(
        "rank 1: the gradient through u's norm is missing", _MATH + "rank_one.h",
        "out = du[m] + k * h[m] - 2.0 * k * dv_v * u[m];", "out = du[m] + k * h[m];",
    ),
    Fault(
        "rank 1: eps is left out of the next a", _MATH + "rank_one.h",
        "out += e_k * (da[m] + 2.0 * db * (k * u[m]));", "out += e_k * da[m];",
    ),
    Fault(
        "rank 1: eps is neglected where it matters", _MATH + "rank_one.h",
        "least <= smaller ? x.applies[0] : Real{};", "x.applies[0];",
    ),
    Fault(
        "rank 1: dX lacks what comes through the columns' sums", _NMF + "rank_one.h",
        "dx, length, {false, bias});", "dx, length);",
    ),
    Fault(
        "rank 1 side by side: every matrix has the first one's numbers", _NMF + "solve.h",
        "(count * lanes_) + i, lanes_}; }};", "(count * lanes_), lanes_}; }};",
    ),
    # The products, and the iterations on them.
    Fault(
        "product: a block of the depth begins anew", _PRODUCT,
        "const bool accumulate = start.accumulate || block > 0;", "const bool accumulate = start.accumulate;",
        PRODUCT,
    ),
    Fault(
        "product: where a packed panel begins", _PRODUCT,
        "first_row * block_depth, 1, height", "first_row * depth, 1, height", PRODUCT,
    ),
    Fault(
        "product: the columns after the last whole step", _PRODUCT,
        "if (whole < length) columns(whole, length - whole, std::integral_constant<int, 1>{});", "", PRODUCT,
    ),
    Fault(
        "product with a transpose: lanes of few sums", _PRODUCT,
        "i / left : i * (width / N)]", "i / left : i]", PRODUCT,
    ),
    Fault(
        "product with a transpose: a block of columns begins anew", _PRODUCT,
        "{accumulate || n > 0});", "{accumulate});", NMF,
    ),
    Fault(
        "product with a transpose: the last section's share", "csrc/cpu/product/product.cpp",
        "sums.add(sections.count, row", "sums.add(sections.count > 1 ? sections.count - 1 : 1, row", PRODUCT,
    ),
    Fault(
        "product: where a packed block of the depth begins", "csrc/cpu/product/product.cpp",
        "first * p.depth + k * rows);", "first * p.depth + k * (rows - 1));", PRODUCT,
    ),
    Fault(
        "product: every thread writes to the first rows", "csrc/cpu/product/product.cpp",
        "const Columns y = rows_from<S>(p.y, first);", "const Columns y = rows_from<S>(p.y, 0);", PRODUCT,
    ),
    Fault(
        "product: what lies past the columns is not zero", "csrc/cpu/product/product.cpp",
        "clear_padding(rows, buffer, valid, length);", "", PRODUCT,
    ),
    Fault(
        "iterations: a section's second tile begins its sums anew", _NMF + "iterations.h",
        "return tile > tiles_.sections.begin(section);", "return tile > tiles_.sections.begin(section) + 1;",
        NMF,
    ),
    Fault(
        "iterations: the gradient of V lacks the Gram matrix' part", _NMF + "iterations.h",
        "add_gram_gradient({db_, gram_stride_}, v_at(t, tile), dv(tile), length);", "", NMF,
    ),
    Fault(
        "iterations: every part of U takes the first one's sums", _NMF + "iterations.h",
        "sums_.add(tiles_.sections.count, part * u_part * gram_stride_, valid",
        "sums_.add(tiles_.sections.count, 0, valid", NMF,
    ),
    Fault(
        "iterations: the gradient of x lacks the last iterations' V", _NMF + "iterations.h",
        "multiply<T>(u, tile_row(tile, kept_ + 1), dx, length, {true});", "", NMF,
    ),
    Fault(
        "iterations: all steps keep U's denominator in one place", _NMF + "iterations.h",
        "{u_work_ + step(t) * rank_ * rows_, rows_}", "{u_work_, rows_}", NMF,
    ),
    Fault(
        "iterations: all steps keep V's denominator in one place", _NMF + "iterations.h",
        "2 * (kept_ + 1) + step(t))", "2 * (kept_ + 1))", NMF,
    ),
    Fault(
        "iterations: the second step's old factors have no gradient", _NMF + "iterations.h",
        "reaches_old = t > first_ + 1 ||", "reaches_old = t > first_ + 2 ||", NMF,
    ),
    Fault(
        "HALS in blocks: the components after the block", _NMF + "updates.h",
        "multiply_components<T>(gram, first, count, first + count, rank, f, work, length, true);", "", NMF,
    ),
    Fault(
        "HALS in blocks, backward: the old components' gradient", _NMF + "updates.h",
        "load(df[first + r] + n) - load(work[r] + n)", "load(df[first + r] + n) + load(work[r] + n)", NMF,
    ),
    Fault(
        "MU at large ranks, backward: the denominator's gradient", _NMF + "updates.h",
        "store(work[r] + n, -dp * load(f_new[r] + n));", "store(work[r] + n, dp * load(f_new[r] + n));", NMF,
    ),
    Fault(
        "updates: the Gram matrix' gradient is not made symmetric", _NMF + "updates.h",
        "-dgram[j][r] : dgram[j][r] + dgram[r][j];", "-dgram[j][r] : 2 * dgram[j][r];", NMF,
    ),
    Fault(
        "updates: the old components stand for the new ones", _NMF + "updates.h",
        "multiply_by_transpose<T>(rank, dc, rank, f_new,", "multiply_by_transpose<T>(rank, dc, rank, f,", NMF,
    ),
    Fault(
        "long matrices: where a tile of a long line begins", _NMF + "tiles.h",
        "* line + tile % tiles_per_line * voxels;", "* line + tile * voxels;",
    ),
    Fault(
        "tiles: zeros of x keep their gradient under a ReLU", _NMF + "tiles.h",
        "x[m][n] <= T(0) ? T(0) : dx[m][n]", "x[m][n] < T(0) ? T(0) : dx[m][n]",
    ),
    Fault(
        "dematricize: a shift in the wrong direction", "csrc/cpu/windows/windows.cpp",
        "q1 = (i1 + by[0]) % w.size[0]", "q1 = (i1 + w.size[0] - by[0]) % w.size[0]",
    ),
    Fault(
        "depthwise: where the ring of planes begins is forgotten", _DEPTHWISE + "depthwise.cpp",
        "add((first + a) % k[0], 0, c)", "add(a, 0, c)", DEPTHWISE,
    ),
    Fault(
        "depthwise: another tile's voxels stay around this one", _DEPTHWISE + "depthwise.cpp",
        "if (!plan_.whole_planes()) clear(slot);", "", DEPTHWISE,
    ),
    Fault(
        "depthwise: dx by weights that are not mirrored", _DEPTHWISE + "depthwise.cpp",
        "take_weights(tile.channel, true)", "take_weights(tile.channel, false)", DEPTHWISE,
    ),
    Fault(
        "depthwise: the last block of rows begins where the one before it ends", _DEPTHWISE + "filter.h",
        "if (rows >= 8) return f(rows - 8, i64{8});", "if (rows >= 8) return f(row, i64{8});", DEPTHWISE,
    ),
    Fault(
        "depthwise: the last tile's share of the weights' gradients", _DEPTHWISE + "depthwise.cpp",
        "add_in_order(shares + channel * tiles * size, tiles,",
        "add_in_order(shares + channel * tiles * size, tiles > 1 ? tiles - 1 : 1,", DEPTHWISE,
    ),
    Fault(
        "depthwise: planes before the map are those of its end", _DEPTHWISE + "depthwise.cpp",
        "first = std::max<i64>(0, reach - z), last", "first = 0, last", DEPTHWISE,
    ),
    Fault(
        "depthwise: the bias' gradient lacks a row's last columns", _DEPTHWISE + "maps.h",
        "for (i64 n = whole; n < count; ++n) row[n - whole] += from[n];", "", DEPTHWISE,
    ),
    Fault(
        "depthwise: the weights' gradients are those of the last plane", _DEPTHWISE + "filter.h",
        "store(totals, load(totals) + sums[d][k])", "store(totals, sums[d][k])", DEPTHWISE,
    ),
    Fault(
        "depthwise: a group of tiles lacks its last", _DEPTHWISE + "depthwise.cpp",
        "std::min(tiles, (task + 1) * group)", "std::min(tiles, (task + 1) * group - (group > 1))", DEPTHWISE,
    ),
    # The binding.
    Fault(
        "binding: the last element is not counted", "csrc/bindings/memory.h",
        "empty ? 0 : sum(last, 1)", "empty ? 0 : last", BINDING,
    ),
    Fault(
        "binding: the interpreter's lock is kept", "csrc/bindings/nmf.cpp",
        "py::gil_scoped_release release;\n        cpu_kernels().swin_nmf_forward(p);",
        "cpu_kernels().swin_nmf_forward(p);", BINDING,
    ),
    # The pointwise chains.
    Fault(
        "linear_norm_mlp: the sum's own gradient is missing", _POINTWISE + "linear_norm_mlp.cpp",
        "standardise_backward<T>(p.channels, dn, z, scales, length, d, true);",
        "standardise_backward<T>(p.channels, dn, z, scales, length, d, false);", POINTWISE,
    ),
    Fault(
        "linear_norm_mlp: the last bias once for each piece of the hidden layer",
        _POINTWISE + "linear_norm_mlp.cpp",
        "i == 0 ? typed<T>(p.bias2) : nullptr", "typed<T>(p.bias2)", POINTWISE,
    ),
    Fault(
        "linear_norm_mlp: the gradient of W1 in the first piece's rows", _POINTWISE + "linear_norm_mlp.cpp",
        "from_row(shares.of(dweight1, group), begin)", "from_row(shares.of(dweight1, group), 0)", POINTWISE,
    ),
    Fault(
        "norm: the mean of the gradient is left in it", _POINTWISE + "norm.h",
        "(load(dy[c] + at) - means[v] - load(y[c] + at) * products[v])",
        "(load(dy[c] + at) - load(y[c] + at) * products[v])", POINTWISE,
    ),
    Fault(
        "norm_linear: the gradient of W without the norm's shift", _POINTWISE + "weights.h",
        "dw[at] = dw[at] * scale[k] + db[r] * shift[k];", "dw[at] = dw[at] * scale[k];", POINTWISE,
    ),
    Fault(
        "pointwise: the first group's share of the sums is missing", _POINTWISE + "sums.h",
        "for (i64 group = 0; group < groups(); ++group) {",
        "for (i64 group = 1; group < groups(); ++group) {", POINTWISE,
    ),
    Fault(
        "pointwise: past the caches, what is left of a row after whole lines is not written",
        _POINTWISE + "columns.h",
        "if (i < length) convert_back(from + i, to + i, length - i);",
        "if (i == 0) convert_back(from, to, length);", POINTWISE,
    ),
    Fault(
        "GELU: the sign stays where the magnitude is meant", "csrc/cpu/common/simd.h",
        "(Lanes)v & std::numeric_limits<Lane>::max()", "(Lanes)v & Lane(-1)", POINTWISE,
    ),
    Fault(
        "pointwise: every item of a tile is the first", _POINTWISE + "columns.h",
        "      voxel = 0;\n      ++item;", "      voxel = 0;", POINTWISE,
    ),
    Fault(
        "join and patch_conv: a block's lines change places", _POINTWISE + "blocks.h",
        "const i64 k0 = line / p_.scale[1], k1 = line % p_.scale[1];",
        "const i64 k0 = line % p_.scale[0], k1 = line / p_.scale[0];", POINTWISE,
    ),
    Fault(
        "join: the weights' gradient is begun anew with every line", _POINTWISE + "join.cpp",
        "const bool add_line = add || line > 0;", "const bool add_line = add;", POINTWISE,
    ),
    Fault(
        "pointwise autograd: the weights' gradients are wanted only together",
        "factorizer_kernels/ops/pointwise/autograd.py",
        "any(wanted[num_maps:])", "all(wanted[num_maps:])", POINTWISE,
    ),
    Fault(
        "norm_linear: another gradient of x is written over", _POINTWISE + "norm_linear.cpp",
        "standardise_backward<T>(p.channels, dn, n, scales, tile.length, total, adds);",
        "standardise_backward<T>(p.channels, dn, n, scales, tile.length, total, false);", POINTWISE,
    ),
    Fault(
        "patch_conv: the gradient of the bias is of a group's last tile alone", _POINTWISE + "join.cpp",
        "add_rows<T>(p.out_channels, dy, tile.length, shares.of(dbias, group)[0], add);",
        "add_rows<T>(p.out_channels, dy, tile.length, shares.of(dbias, group)[0], false);", POINTWISE,
    ),
    Fault(
        "norm_linear_swin_nmf: the residual's gradient is missing",
        "factorizer_kernels/ops/swin_nmf/autograd.py", "between, dx, *tensors,", "between, None, *tensors,",
    ),
    Fault(
        "norm_linear_swin_nmf: v0's gradient is wanted only with u0's",
        "factorizer_kernels/ops/swin_nmf/autograd.py", "any(wanted[8:10])", "any(wanted[8:9])",
    ),
    # The autograd Functions, the operators under vmap, the reference.
    Fault(
        "autograd: u0's and v0's gradients are wanted only together",
        "factorizer_kernels/ops/nmf/autograd.py",
        "needs_input_grad[1] or ctx.needs_input_grad[2]", "needs_input_grad[1] and ctx.needs_input_grad[2]",
    ),
    Fault(
        "autograd: the adjoint lacks the mean over the shifts", "factorizer_kernels/ops/windows/autograd.py",
        'return call_function("sw_dematricize", SWMatricize, dx, *ctx.options)',
        'return call_function("sw_dematricize", SWMatricize, dx, ctx.options[0], False, ctx.options[2])',
    ),
    Fault(
        "depthwise: a term of the second derivative", "factorizer_kernels/ops/depthwise/autograd.py",
        "terms.append(call_function(NAME, DepthwiseConv, x, ddweight, None, ctx.backend))",
        "terms.append(x * 0)", DEPTHWISE,
    ),
    Fault(
        "vmap: copies and mapped dimension change places", "factorizer_kernels/ops/windows/spec.py",
        "z.unflatten(1, (num_shifts, -1)).transpose(0, 1).flatten(0, 2)", "z.flatten(0, 1)", SETTINGS,
    ),
    Fault(
        "reference: eps above MU's fraction line too", "factorizer_kernels/ops/nmf/reference.py",
        "return factor * projection / (factor @ gram + eps)",
        "return (factor * projection + eps) / (factor @ gram + eps)",
        (*KERNELS, "tests/factorizer_kernels/test_special_values.py"),
    ),
    # The Triton kernels, interpreted.
    Fault(
        "Triton: a shift in the wrong direction", "factorizer_kernels/ops/windows/address.py",
        "start = cell * PATCH - shift\n    return tl.where(start < 0, start + size, start)",
        "start = cell * PATCH + shift\n    return tl.where(start >= size, start - size, start)", TRITON,
    ),
    Fault(
        "Triton HALS: the gradient of the other columns is missing", _TRITON + "updates.py",
        "grad = replaced(grad, j, grad[j] - step * gram[j * RANK + r])", "grad = grad", TRITON,
    ),
    Fault(
        "Triton rank 1: half of G's gradient", _TRITON + "rank1.py",
        "+ (p[i] * q[j] + q[i] * p[j]),)", "+ p[i] * q[j],)", TRITON,
    ),
    Fault(
        "Triton: dy's mean over the copies is missing", _TRITON + "resident_rank1.py",
        "1.0 / len(SHIFTS), u, rank1.column_of_v", "1.0, u, rank1.column_of_v", TRITON,
    ),
    Fault(
        "Triton: runs of voxels that a shift parts", "factorizer_kernels/ops/swin_nmf/triton.py",
        "cut = gcd(problem.patch[-1], *(shift[-1] for shift in problem.shifts))", "cut = problem.patch[-1]",
        TRITON,
    ),
    Fault(
        "Triton, long matrices: the last column of V is not written", _TRITON + "streaming.py",
        "store_columns(new_v, at * (RANK * N) + n, N, v_columns, n < N, RANK)",
        "store_columns(new_v, at * (RANK * N) + n, N, v_columns, n < N - 1, RANK)", TRITON,
    ),
    Fault(
        "Triton sweep: the upper triangle without its diagonal", _TRITON + "sweep.py",
        "column = tl.load(pair + (j + tl.where(j <= r, RANK, 0))",
        "column = tl.load(pair + (j + tl.where(j < r, RANK, 0))", TRITON,
    ),
)  # fmt: skip
