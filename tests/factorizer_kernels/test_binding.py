"""The compiled module, called wrongly: an exception comes, never a crash, and nothing is written."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests_support import NATIVE_OPERATORS as OPERATORS
from tests_support import NativeCall as Call

from factorizer_kernels.shared import native

pytestmark = pytest.mark.skipif(native.native is None, reason=f"no compiled module: {native.missing}")

HUGE = 2**62
NONE = (0, 0)
EACH_MEMORY = [(operator, name) for operator, (ins, outs) in OPERATORS.items() for name in (*ins, *outs)]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_right_call(operator, per_matrix):
    call = Call(per_matrix)
    call.run(operator)
    assert call.written() == set(OPERATORS[operator][1])


@pytest.mark.parametrize(("operator", "name"), EACH_MEMORY)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_short_memory(operator, name, per_matrix):
    """One byte too few, or none, of any argument: the error names it."""
    for short in (lambda address, size: (address, size - 1), lambda address, size: (0, size)):
        call = Call(per_matrix)
        call.memory[name] = short(*call.memory[name])
        with pytest.raises(ValueError, match=f"^{name} needs "):
            call.run(operator)
        assert not call.written()


@pytest.mark.parametrize(
    ("operator", "missing", "message"),
    [
        ("forward", ["y"], "either y, or u and v, must be given"),
        ("factors", ["u"], "u and v go together"),
        ("factors", ["u", "v"], "either y, or u and v, must be given"),
        ("backward", ["du0"], "du0 and dv0 go together"),
        ("factors backward", ["dv"], "du and dv go together"),
        ("factors backward", ["du", "dv"], "either dy, or du and dv, must be given"),
    ],
)
def test_arguments_left_out(operator, missing, message):
    call = Call()
    call.memory.update(dict.fromkeys(missing))
    with pytest.raises(ValueError, match=message):
        call.run(operator)
    assert not call.written()


def test_outputs_of_two_kinds():
    call = Call()
    outputs = {name: call.memory[name] for name in ("y", "u", "v")}
    with pytest.raises(ValueError, match="either y, or u and v, must be given"):
        native.native.swin_nmf_forward(call.problem(), 1, **outputs)
    assert not call.written()


def test_gradients_of_the_first_factors_may_be_left_out():
    call = Call()
    call.memory.update(du0=None, dv0=None)
    call.run("backward")
    assert call.written() == {"dx"}


def test_windows_must_be_there():
    options = native.native.NMFOptions(rank=1, num_iters=1, solver="mu", grad_steps=1, relu=False, eps=1e-8)
    with pytest.raises(TypeError, match="incompatible"):
        native.native.NMFProblem(0, None, (0, 0, (1, 1, 1)), NONE, NONE, True, options)


def test_windows_outlive_their_name():
    """The problem keeps what it points to: the shifts are the windows'."""
    call, module = Call(), native.native
    problem = call.problem()
    others = [module.Windows(**{**call.windows, "shifts": [0, 1, 1] * 2}) for _ in range(100)]
    module.swin_nmf_forward(problem, 1, y=call.memory["y"])
    again = Call()
    for name in ("x", "u0", "v0"):
        again.tensors[name].copy_(call.tensors[name])
    again.run("forward")
    assert len(others) == 100
    assert torch.equal(call.tensors["y"], again.tensors["y"])


def test_columns_of_a_whole_volume():
    """One matrix of 2^40 columns is no reason to refuse a problem of rank 1: its factors are what counts."""
    call, columns = Call(), 2**40
    call.windows.update(heads=1, size=[1, 1, columns], patch=[1, 1, columns], shifts=[0, 0, 0])
    call.options.update(rank=1)
    call.map_stride.update(x=[0, 0, 0, 0, 0])
    call.memory["v0"] = (call.memory["v0"][0], 4 * columns)  # nothing runs, so nothing is read
    call.problem()
    call.options.update(rank=2**20)
    with pytest.raises(ValueError, match="rank or num_iters is too large for matrices of 4 x 1099511627776"):
        call.problem()


def _wrong(part, **change):
    return lambda call: getattr(call, part).update(change)


WRONG = {
    "stride beyond the memory": _wrong("map_stride", x=[192, 24, 24, 6, 2], dy=[192, 24, 24, 6, 2]),
    "stride that overflows": _wrong("map_stride", x=[192, HUGE, 24, 6, 1], dy=[192, HUGE, 24, 6, 1]),
    "sum of strides that overflows": _wrong("map_stride", x=[1, HUGE // 8, 1, HUGE // 2, HUGE // 3]),
    "stride missing for an axis": _wrong("map_stride", x=[192, 24, 1], dy=[192, 24, 1]),
    "two strides": _wrong("map_stride", x=[192, 24], dy=[192, 24]),
    "six strides": _wrong("map_stride", x=[192, 24, 24, 24, 6, 1]),
    "negative stride": _wrong("map_stride", x=[192, 24, 24, 6, -1]),
    "more channels than there are": _wrong("windows", heads=3),
    "more shifts than there are": _wrong("windows", shifts=[0, 0, 0] * 3),
    "map that overflows": _wrong("windows", batch=HUGE, heads=HUGE),
    "empty map that overflows": _wrong("windows", batch=0, heads=HUGE, head_dim=HUGE),
    "empty map of windows that overflow": _wrong("windows", size=[0, 0, 0], patch=[HUGE, HUGE, HUGE]),
    "patch that does not divide": _wrong("windows", patch=[1, 3, 3]),
    "no patch": _wrong("windows", patch=[1, 0, 3]),
    "shift beyond the map": _wrong("windows", shifts=[0, 4, 0]),
    "negative shift": _wrong("windows", shifts=[0, -1, 0]),
    "no shift": _wrong("windows", shifts=[]),
    "dtype unknown": lambda call: setattr(call, "dtype", 4),
    "dtype larger than the memory's": lambda call: setattr(call, "dtype", 1),
    "no thread": lambda call: setattr(call, "threads", 0),
    "more threads than a system has": lambda call: setattr(call, "threads", 2**31 - 1),
}
WRONG_SOLVE = {
    "no rank": _wrong("options", rank=0),
    "larger rank": _wrong("options", rank=3),
    "rank that overflows": _wrong("options", rank=HUGE),
    "negative iterations": _wrong("options", num_iters=-1),
    "iterations that overflow": _wrong("options", num_iters=HUGE),
    "iterations that overflow on many threads": lambda call: (
        call.options.update(num_iters=2**40),
        setattr(call, "threads", 2**16),
    ),
    "no solver": _wrong("options", solver="als"),
    "negative gradient steps": _wrong("options", grad_steps=-1),
    "gradient steps beyond the iterations": _wrong("options", grad_steps=3),
}


@pytest.mark.parametrize(
    ("operator", "wrong"),
    [(o, w) for o in OPERATORS for w in (WRONG if o.startswith("sw") else {**WRONG, **WRONG_SOLVE})],
)
def test_wrong_call(operator, wrong):
    call = Call(per_matrix=True)
    ({**WRONG, **WRONG_SOLVE})[wrong](call)
    with pytest.raises(ValueError, match=r"."):
        call.run(operator)
    assert not call.written()


def test_axes_of_one_element_have_any_stride():
    call = Call()
    call.run("forward")
    expected = call.tensors["y"].clone()
    call.map_stride["x"][0] = HUGE
    call.map_stride["x"][2] = -HUGE
    call.run("forward")
    assert torch.equal(call.tensors["y"], expected)
    del call.map_stride["x"][2]  # a map of two spatial axes
    call.run("forward")
    assert torch.equal(call.tensors["y"], expected)


NUMBERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([-HUGE, -(2**63), HUGE, 2**63 - 1, 2**63, 2**31, 24, 192, 1.5, None])
)
TRIPLES = st.lists(NUMBERS, min_size=3, max_size=3)


@st.composite
def changes(draw):
    """Up to three arguments of a call changed to anything; iterations stay few, for time alone."""
    kind = st.sampled_from(["windows", "memory", "stride", "options", "dtype", "threads", "shared"])
    result = []
    for part in draw(st.lists(kind, min_size=1, max_size=3)):
        if part == "windows":
            name = draw(st.sampled_from(["batch", "heads", "head_dim", "size", "patch", "shifts"]))
            value = draw(NUMBERS if name in ("batch", "heads", "head_dim") else TRIPLES)
        elif part == "memory":
            name = draw(st.sampled_from(sorted(Call().memory)))
            value = draw(
                st.one_of(st.just(NONE), st.none(), st.integers(-HUGE, 0), st.integers(1, 8))
            )  # bytes
        elif part == "stride":
            name = draw(st.sampled_from(["x", "dy"]))
            value = draw(st.lists(NUMBERS, min_size=2, max_size=6))
        elif part == "options":
            name = draw(st.sampled_from(["rank", "num_iters", "grad_steps", "eps", "solver"]))
            few = NUMBERS.filter(lambda n: n != 2**31)
            solvers = st.sampled_from(["mu", "hals", "als", "", None, 1])
            value = draw({"num_iters": few, "solver": solvers}.get(name, NUMBERS))
        else:
            name, value = part, draw(NUMBERS)
        result.append((part, name, value))
    return result


def fuzz(operator, per_matrix, changed):
    call = Call(per_matrix)
    for part, name, value in changed:
        if part == "memory":
            address, size = call.memory[name] or NONE
            if value not in (None, NONE):  # fewer bytes
                value = (address, size + value if value <= 0 else value)
            call.memory[name] = value
        elif part == "stride":
            call.map_stride[name] = value
        elif part in ("windows", "options"):
            getattr(call, part)[name] = value
        else:
            setattr(call, part, value)
    try:
        call.run(operator)
    except (ValueError, TypeError):  # pybind11 raises TypeError where an argument is no 64-bit integer
        assert not call.written()


@given(st.sampled_from(sorted(OPERATORS)), st.booleans(), changes())
@example("forward", True, [("windows", "batch", 2**63 - 1), ("windows", "size", [0, 0, 0])])
@example(
    "backward", False, [("options", "solver", "mu"), ("options", "rank", 1), ("options", "grad_steps", 0)]
)
def test_fuzz(operator, per_matrix, changed):
    fuzz(operator, per_matrix, changed)


# --- Depthwise convolution -----------------------------------------------------------------------


class ConvCall:
    """A right call on a 2 x 3 x 4 x 5 x 6 map with filters of 1 x 3 x 5."""

    def __init__(self):
        size = (2, 3, 4, 5, 6)
        self.tensors = {
            "x": torch.rand(size), "dy": torch.rand(size), "weight": torch.rand(3, 15), "bias": torch.rand(3),
            **{name: torch.full(size, 7.0) for name in ("y", "dx")},
            "dweight": torch.full((3, 15), 7.0), "dbias": torch.full((3,), 7.0),
        }  # fmt: skip
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.memory = {name: native.memory(tensor) for name, tensor in self.tensors.items()}
        self.stride = {name: list(self.tensors[name].stride()) for name in ("x", "dy")}
        self.options = {"dtype": 0, "size": list(size), "kernel": [1, 3, 5], "threads": 2}

    written = Call.written

    def run(self, operator):
        memory = self.memory
        x, dy = ((*memory[name], self.stride[name]) for name in ("x", "dy"))
        if operator == "forward":
            others = {name: memory[name] for name in ("weight", "bias", "y")}
            native.native.depthwise_conv_forward(**self.options, x=x, **others)
        else:
            others = {name: memory[name] for name in ("weight", "dx", "dweight", "dbias")}
            native.native.depthwise_conv_backward(**self.options, x=x, dy=dy, **others)


CONV_OPERATORS = {
    "forward": (["x", "weight", "bias"], ["y"]),
    "backward": (["x", "dy", "weight"], ["dx", "dweight", "dbias"]),
}
CONV_MEMORY = [(operator, name) for operator, (ins, outs) in CONV_OPERATORS.items() for name in (*ins, *outs)]


@pytest.mark.parametrize("operator", CONV_OPERATORS)
def test_right_conv(operator):
    call = ConvCall()
    call.run(operator)
    assert call.written() == set(CONV_OPERATORS[operator][1])


@pytest.mark.parametrize(("operator", "name"), CONV_MEMORY)
def test_short_memory_of_conv(operator, name):
    """One byte too few, or no address, of any argument: the error names it."""
    call = ConvCall()
    call.memory[name] = (call.memory[name][0], call.memory[name][1] - 1)
    with pytest.raises(ValueError, match=f"^{name} needs "):
        call.run(operator)
    assert not call.written()

    call = ConvCall()
    call.memory[name] = (0, call.memory[name][1])
    with pytest.raises(ValueError, match=f"^{name} needs "):
        call.run(operator)
    assert not call.written()


@pytest.mark.parametrize(
    ("operator", "name"),
    [("forward", "bias"), ("backward", "dx"), ("backward", "dweight"), ("backward", "dbias")],
)
def test_what_a_conv_may_do_without(operator, name):
    call = ConvCall()
    call.memory[name] = None
    call.run(operator)
    assert call.written() == set(CONV_OPERATORS[operator][1]) - {name}


def _wrong_conv(**change):
    return lambda call: call.options.update(change)


WRONG_CONV = {
    "stride beyond the memory": lambda call: call.stride["x"].__setitem__(4, 2),
    "stride that overflows": lambda call: call.stride["x"].__setitem__(1, HUGE),
    "negative stride": lambda call: call.stride["x"].__setitem__(3, -6),
    "larger map": _wrong_conv(size=[2, 3, 4, 5, 7]),
    "negative size": _wrong_conv(size=[2, 3, 4, 5, -6]),
    "map that overflows": _wrong_conv(size=[HUGE, HUGE, 4, 5, 6]),
    "empty map that overflows": _wrong_conv(size=[0, HUGE, HUGE, 5, 6]),
    "even kernel": _wrong_conv(kernel=[1, 2, 5]),
    "large kernel": _wrong_conv(kernel=[1, 3, 9]),
    "no kernel": _wrong_conv(kernel=[0, 3, 5]),
    "negative kernel": _wrong_conv(kernel=[1, -3, 5]),
    "dtype unknown": _wrong_conv(dtype=4),
    "dtype larger than the memory's": _wrong_conv(dtype=1),
    "no thread": _wrong_conv(threads=0),
    "more threads than a system has": _wrong_conv(threads=2**31 - 1),
}


@pytest.mark.parametrize("operator", CONV_OPERATORS)
@pytest.mark.parametrize("wrong", WRONG_CONV)
def test_wrong_conv(operator, wrong):
    call = ConvCall()
    WRONG_CONV[wrong](call)
    with pytest.raises(ValueError, match=r"."):
        call.run(operator)
    assert not call.written()


@st.composite
def conv_changes(draw):
    """Up to three arguments of a call changed to anything."""
    result = []
    for part in draw(st.lists(st.sampled_from(["memory", "stride", "options"]), min_size=1, max_size=3)):
        if part == "memory":
            name = draw(st.sampled_from(sorted(ConvCall().memory)))
            value = draw(st.one_of(st.just(NONE), st.none(), st.integers(-HUGE, 0)))  # bytes less
        elif part == "stride":
            name, value = draw(st.sampled_from(["x", "dy"])), draw(st.lists(NUMBERS, min_size=5, max_size=5))
        else:
            name = draw(st.sampled_from(["dtype", "size", "kernel", "threads"]))
            length = {"size": 5, "kernel": 3}.get(name)
            value = draw(st.lists(NUMBERS, min_size=length, max_size=length) if length else NUMBERS)
        result.append((part, name, value))
    return result


@given(st.sampled_from(sorted(CONV_OPERATORS)), conv_changes())
def test_fuzz_conv(operator, changed):
    call = ConvCall()
    for part, name, value in changed:
        if part == "memory":
            address, size = call.memory[name] or NONE
            call.memory[name] = value if value in (None, NONE) else (address, size + value)
        else:
            getattr(call, part)[name] = value
    try:
        call.run(operator)
    except (ValueError, TypeError):  # pybind11 raises TypeError where an argument is no 64-bit integer
        assert not call.written()


class Product:
    """Right calls of the products: W (4, 3), x (2, 3, 9), y (2, 4, 9), and the sum of y xᵀ (4, 3)."""

    def __init__(self):
        shapes = {"w": (4, 3), "x": (2, 3, 9), "y": (2, 4, 9), "out": (4, 3)}
        self.tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.memory = {name: native.memory(tensor) for name, tensor in self.tensors.items()}
        self.sizes, self.x_strides, self.threads = (2, 4, 3, 9), (27, 9), 1

    def run(self, name):
        memory, x, y = self.memory, (self.memory["x"], self.x_strides), (self.memory["y"], (36, 9))
        if name == "multiply":
            native.native.multiply(0, self.sizes, memory["w"], (3, 1), *x, *y, self.threads)
        else:
            native.native.multiply_by_transpose(0, self.sizes, *y, *x, memory["out"], self.threads)

    def refused(self, name, match):
        with pytest.raises(ValueError, match=match):
            self.run(name)
        assert all(torch.equal(self.tensors[key], self.before[key]) for key in self.tensors)


@pytest.mark.parametrize(
    ("name", "short", "argument"),
    [
        ("multiply", "w", "w"),
        ("multiply", "x", "x"),
        ("multiply", "y", "y"),
        ("multiply_by_transpose", "y", "a"),
        ("multiply_by_transpose", "x", "b"),
        ("multiply_by_transpose", "out", "out"),
    ],
)
def test_products_with_short_memory(name, short, argument):
    call = Product()
    call.run(name)
    call = Product()
    call.memory[short] = (call.memory[short][0], call.memory[short][1] - 1)
    call.refused(name, f"^{argument} needs")


@pytest.mark.parametrize("name", ["multiply", "multiply_by_transpose"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sizes": (2, 4, -3, 9)}, "sizes"),
        ({"sizes": (2**40, 2**20, 3, 9)}, "too large"),
        ({"x_strides": (27, -9)}, "negative stride"),
        ({"threads": 0}, "threads"),
    ],
)
def test_products_with_wrong_numbers(name, change, match):
    call = Product()
    vars(call).update(change)
    call.refused(name, match)


# --- Pointwise chains ------------------------------------------------------------------------------

B, V, C, D, H = 2, 8, 3, 4, 5  # batch, voxels, channels of x, of the other map or of y, hidden
GRID = {"size": [1, 2, 4], "scale": [1, 2, 1]}
SHAPES = {
    "norm_linear": (
        {"voxels": V, "channels": C, "out_channels": D, "eps": 1e-5},
        {"x": (C, V)}, {"y": (D, V)},
        {"norm_weight": C, "norm_bias": C, "weight": D * C, "bias": D},
    ),
    "linear_norm_mlp": (
        {"voxels": V, "in_channels": D, "channels": C, "hidden": H, "eps": 1e-5},
        {"y": (D, V), "x": (C, V)}, {"out": (C, V)},
        {
            "weight": C * D, "bias": C, "norm_weight": C, "norm_bias": C, "weight1": H * C, "bias1": H,
            "weight2": C * H, "bias2": C,
        },
    ),
    "join": (
        {"skip_channels": C, "channels": D, "out_channels": H, **GRID},
        {"skip": (C, 2 * V), "x": (D, V)}, {"y": (H, 2 * V)},
        {"weight_skip": H * C, "weight_x": D * H * 2, "bias": H},
    ),
    "patch_conv": (
        {"channels": C, "out_channels": D, **GRID},
        {"x": (C, 2 * V)}, {"y": (D, V)},
        {"weight": D * C * 2, "bias": D},
    ),
}  # fmt: skip
CHAINS = [
    "norm_linear_forward", "norm_linear_backward", "linear_norm_mlp_forward", "linear_norm_mlp_backward",
    "join_forward", "join_backward", "patch_conv_forward", "patch_conv_backward",
]  # fmt: skip
OPTIONAL = {"bias", "bias1", "bias2"}


class ChainCall:
    """A right call of an entry of ``CHAINS``."""

    def __init__(self, entry):
        self.entry = entry
        name, way = entry.rsplit("_", 1)
        options, ins, outs, self.weights = SHAPES[name]
        self.options = {"compute": 0, "batch": B, "threads": 2, **copy.deepcopy(options)}
        self.gradients = [f"d{weight}" for weight in self.weights] if way == "backward" else []
        if way == "backward":
            ins, outs = {f"d{k}": v for k, v in outs.items()} | ins, {f"d{k}": v for k, v in ins.items()}
        if entry == "norm_linear_backward":
            ins["addend"] = ins["x"]
        self.ins, self.outs = list(ins), list(outs)
        self.tensors = {map_: torch.rand(B, *shape) for map_, shape in ins.items()}
        self.tensors |= {weight: torch.rand(n) for weight, n in self.weights.items()}
        self.tensors |= {map_: torch.full((B, *shape), 7.0) for map_, shape in outs.items()}
        self.tensors |= {f"d{w}": torch.full((n,), 7.0) for w, n in self.weights.items() if self.gradients}
        self.before = {key: tensor.clone() for key, tensor in self.tensors.items()}
        self.memory = {key: native.memory(tensor) for key, tensor in self.tensors.items()}
        self.stride = {map_: list(self.tensors[map_].stride()[:2]) for map_ in ins}
        self.dtype = 0

    written = Call.written

    def run(self):
        maps = {name: (self.dtype, *(self.memory[name] or NONE), *self.stride[name]) for name in self.ins}
        maps |= {name: (self.dtype, *(self.memory[name] or NONE)) for name in self.outs}
        weights = [self.memory[name] for name in self.weights]
        gradients = {}
        if self.entry.endswith("backward"):
            gradients["gradients"] = [self.memory[name] for name in self.gradients]
        getattr(native.native, self.entry)(**self.options, weights=weights, **maps, **gradients)


@pytest.mark.parametrize("entry", CHAINS)
def test_right_chain(entry):
    call = ChainCall(entry)
    call.run()
    assert call.written() == {*call.outs, *call.gradients}
    if call.gradients:
        call = ChainCall(entry)
        call.gradients.clear()
        call.run()
        assert call.written() <= set(call.outs)


@pytest.mark.parametrize(("entry", "name"), [(e, name) for e in CHAINS for name in ChainCall(e).memory])
def test_short_memory_of_chain(entry, name):
    """One byte too few, no address, or nothing, of any argument: the error names it."""
    for short in (lambda address, size: (address, size - 1), lambda _, size: (0, size)):
        call = ChainCall(entry)
        call.memory[name] = short(*call.memory[name])
        with pytest.raises(ValueError, match=f"^{name} needs "):
            call.run()
        assert not call.written()
    if name not in OPTIONAL:
        call = ChainCall(entry)
        call.memory[name] = None
        with pytest.raises(ValueError, match=r" needs | must be given| go together|out_channels must be"):
            call.run()
        assert not call.written()


WRONG_CHAIN = {
    "stride beyond the memory": lambda call: call.stride["x"].__setitem__(1, 100),
    "stride that overflows": lambda call: call.stride["x"].__setitem__(0, HUGE),
    "negative stride": lambda call: call.stride["x"].__setitem__(0, -6),
    "larger batch": lambda call: call.options.update(batch=3),
    "negative batch": lambda call: call.options.update(batch=-1),
    "batch that overflows": lambda call: call.options.update(batch=HUGE),
    "no channels": lambda call: call.options.update(channels=0),
    "channels that overflow": lambda call: call.options.update(channels=HUGE),
    "more channels": lambda call: call.options.update(channels=5),
    "compute unknown": lambda call: call.options.update(compute=4),
    "half compute": lambda call: call.options.update(compute=2),
    "double compute of single maps": lambda call: call.options.update(compute=1),
    "dtype unknown": lambda call: setattr(call, "dtype", 4),
    "dtype larger than the memory's": lambda call: setattr(call, "dtype", 1),
    "no thread": lambda call: call.options.update(threads=0),
    "more threads than a system has": lambda call: call.options.update(threads=2**31 - 1),
    "a weight less": lambda call: setattr(call, "weights", list(call.weights)[1:]),
}


@pytest.mark.parametrize("entry", CHAINS)
@pytest.mark.parametrize("wrong", WRONG_CHAIN)
def test_wrong_chain(entry, wrong):
    call = ChainCall(entry)
    WRONG_CHAIN[wrong](call)
    with pytest.raises(ValueError, match=r"."):
        call.run()
    assert not call.written()


@pytest.mark.parametrize("entry", [entry for entry in CHAINS if entry.startswith(("join", "patch"))])
@pytest.mark.parametrize("change", [
    {"size": [1, 2, 5]}, {"size": [1, -2, 4]}, {"size": [0, HUGE, HUGE]}, {"scale": [1, 3, 1]},
    {"scale": [1, 0, 1]}, {"scale": [1, HUGE, 1]},
], ids=str)  # fmt: skip
def test_wrong_blocks(entry, change):
    call = ChainCall(entry)
    call.options.update(change)
    with pytest.raises(ValueError, match=r"."):
        call.run()
    assert not call.written()


@given(st.data())
def test_fuzz_chain(data):
    call = ChainCall(data.draw(st.sampled_from(CHAINS)))
    for part in data.draw(st.lists(st.sampled_from(["memory", "stride", "options"]), min_size=1, max_size=3)):
        if part == "memory":
            name = data.draw(st.sampled_from(sorted(call.memory)))
            less = data.draw(st.one_of(st.none(), st.integers(-HUGE, 0)))  # bytes
            address, size = call.memory[name] or NONE
            call.memory[name] = None if less is None else (address, size + less)
        elif part == "stride":
            name = data.draw(st.sampled_from(call.ins))
            call.stride[name] = data.draw(st.lists(NUMBERS, min_size=2, max_size=2))
        else:
            name = data.draw(st.sampled_from(sorted(call.options)))
            call.options[name] = data.draw(TRIPLES if name in GRID else NUMBERS)
    try:
        call.run()
    except (ValueError, TypeError):  # pybind11 raises TypeError where an argument is no 64-bit integer
        assert not call.written()
