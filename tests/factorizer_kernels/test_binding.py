"""The compiled module, called wrongly: an exception comes, never a crash, and nothing is written."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from factorizer_kernels.shared import native as cpu

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"no compiled module: {cpu.missing}")

HUGE = 2**62
NONE = (0, 0)


class Call:
    """A right call on a 1 x 8 x 4 x 6 map in windows of 4 channels and 2 x 3 voxels, two shifts, rank 2."""

    def __init__(self, per_matrix=False):
        matrices = 2 * 2 * 4
        lead = (matrices,) if per_matrix else ()
        self.stride = {"u0": 8 if per_matrix else 0, "v0": 12 if per_matrix else 0}
        self.tensors = {
            "x": torch.rand(1, 8, 1, 4, 6), "dy": torch.rand(1, 8, 1, 4, 6),
            "u0": torch.rand(*lead, 2, 4), "v0": torch.rand(*lead, 2, 6),
            "du": torch.rand(matrices, 2, 4), "dv": torch.rand(matrices, 2, 6),
            "y": torch.full((192,), 7.0), "dx": torch.full((192,), 7.0), "z": torch.full((384,), 7.0),
            "u": torch.full((matrices, 2, 4), 7.0), "v": torch.full((matrices, 2, 6), 7.0),
            "du0": torch.full((*lead, 2, 4), 7.0), "dv0": torch.full((*lead, 2, 6), 7.0),
        }  # fmt: skip
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.windows = {
            "batch": 1, "heads": 2, "head_dim": 4, "size": [1, 4, 6], "patch": [1, 2, 3],
            "shifts": [0, 0, 0, 0, 1, 2],
        }  # fmt: skip
        self.memory = {name: cpu.memory(tensor) for name, tensor in self.tensors.items()}
        self.map_stride = {name: list(self.tensors[name].stride()) for name in ("x", "dy")}
        self.options = {"rank": 2, "num_iters": 2, "hals": True, "relu": True, "eps": 1e-16, "threads": 2}
        self.dtype, self.grad_steps = 0, 1

    def written(self):
        """The tensors that are no longer what they were."""
        return {name for name, tensor in self.tensors.items() if not torch.equal(tensor, self.before[name])}

    def run(self, operator):
        """The factors' operators are those of ``swin_nmf`` with u and v in place of y."""
        memory = self.memory
        windows = cpu.native.Windows(**self.windows)
        x = cpu.native.Volume(*memory["x"], self.map_stride["x"])
        u0, v0 = ((*memory[name], self.stride[name]) for name in ("u0", "v0"))
        common = {"dtype": self.dtype, "windows": windows, "x": x, "u0": u0, "v0": v0, **self.options}
        gradients = {name: memory[name] for name in ("dx", "du0", "dv0")} | {"grad_steps": self.grad_steps}
        if operator == "forward":
            cpu.native.swin_nmf_forward(**common, y=memory["y"])
        elif operator == "factors":
            cpu.native.swin_nmf_forward(**common, u=memory["u"], v=memory["v"])
        elif operator == "backward":
            dy = cpu.native.Volume(*memory["dy"], self.map_stride["dy"])
            cpu.native.swin_nmf_backward(**common, **gradients, dy=dy)
        elif operator == "factors backward":
            dy = cpu.native.Volume(*NONE, [0] * 5)
            cpu.native.swin_nmf_backward(**common, **gradients, dy=dy, du=memory["du"], dv=memory["dv"])
        else:
            run = getattr(cpu.native, operator)
            run(self.dtype, windows, x, memory["z"], 1.0, self.options["threads"])


# operator: what it reads, and what it writes
OPERATORS = {
    "forward": (["x", "u0", "v0"], ["y"]),
    "factors": (["x", "u0", "v0"], ["u", "v"]),
    "backward": (["x", "u0", "v0", "dy"], ["dx", "du0", "dv0"]),
    "factors backward": (["x", "u0", "v0", "du", "dv"], ["dx", "du0", "dv0"]),
    "sw_matricize": (["x"], ["z"]),
    "sw_dematricize": (["z"], ["x"]),
}
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
        if call.memory[name][0] == 0 and name in ("u", "v", "du", "dv", "du0", "dv0"):
            message = f"{name.strip('uv0')}.* go together"
        else:
            message = f"^{name} needs "
        with pytest.raises(ValueError, match=message):
            call.run(operator)
        assert not call.written()


def _wrong_stride(call):
    call.stride["u0"] = 7


def _one_shared_factor(call):
    call.stride["v0"] = 0


def _wrong(part, **change):
    return lambda call: getattr(call, part).update(change)


WRONG = {
    "stride beyond the memory": _wrong("map_stride", x=[192, 24, 24, 6, 2], dy=[192, 24, 24, 6, 2]),
    "stride that overflows": _wrong("map_stride", x=[192, HUGE, 24, 6, 1], dy=[192, HUGE, 24, 6, 1]),
    "sum of strides that overflows": _wrong("map_stride", x=[1, HUGE // 8, 1, HUGE // 2, HUGE // 3]),
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
    "no thread": _wrong("options", threads=0),
    "more threads than a system has": _wrong("options", threads=2**31 - 1),
}
WRONG_SOLVE = {
    "stride of u0": _wrong_stride,
    "one factor shared": _one_shared_factor,
    "no rank": _wrong("options", rank=0),
    "larger rank": _wrong("options", rank=3),
    "rank that overflows": _wrong("options", rank=HUGE),
    "negative iterations": _wrong("options", num_iters=-1),
    "iterations that overflow": _wrong("options", num_iters=HUGE),
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


def test_gradient_steps_beyond_the_iterations():
    call = Call()
    call.grad_steps = 3
    with pytest.raises(ValueError, match="grad_steps"):
        call.run("backward")


def test_axes_of_one_element_have_any_stride():
    call = Call()
    call.run("forward")
    expected = call.tensors["y"].clone()
    call.map_stride["x"][0] = HUGE
    call.map_stride["x"][2] = -HUGE
    call.run("forward")
    assert torch.equal(call.tensors["y"], expected)


NUMBERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([-HUGE, -(2**63), HUGE, 2**63 - 1, 2**63, 2**31, 24, 192, 1.5, None])
)
TRIPLES = st.lists(NUMBERS, min_size=3, max_size=3)


@st.composite
def changes(draw):
    """Up to three arguments of a call changed to anything; iterations stay few, for time alone."""
    kind = st.sampled_from(["windows", "memory", "stride", "options", "dtype", "grad_steps"])
    result = []
    for part in draw(st.lists(kind, min_size=1, max_size=3)):
        if part == "windows":
            name = draw(st.sampled_from(["batch", "heads", "head_dim", "size", "patch", "shifts"]))
            value = draw(NUMBERS if name in ("batch", "heads", "head_dim") else TRIPLES)
        elif part == "memory":
            name = draw(st.sampled_from(sorted(Call().memory)))
            value = draw(st.one_of(st.just(NONE), st.integers(-HUGE, 0), st.integers(1, 8)))  # bytes less
        elif part == "stride":
            name = draw(st.sampled_from(["x", "dy", "u0", "v0"]))
            value = draw(st.lists(NUMBERS, min_size=5, max_size=5) if name in ("x", "dy") else NUMBERS)
        elif part == "options":
            name = draw(st.sampled_from(["rank", "num_iters", "eps", "threads", "hals"]))
            value = draw(NUMBERS if name != "num_iters" else NUMBERS.filter(lambda n: n != 2**31))
        else:
            name, value = part, draw(NUMBERS)
        result.append((part, name, value))
    return result


def fuzz(operator, per_matrix, changed):
    call = Call(per_matrix)
    for part, name, value in changed:
        if part == "memory":
            address, size = call.memory[name]
            call.memory[name] = value if value == NONE else (address, size + value if value <= 0 else value)
        elif part == "stride":
            (call.map_stride if name in ("x", "dy") else call.stride)[name] = value
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
@example("backward", False, [("options", "hals", False), ("options", "rank", 1), ("grad_steps", "", 0)])
def test_fuzz(operator, per_matrix, changed):
    fuzz(operator, per_matrix, changed)
