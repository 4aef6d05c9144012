"""The entries for CUDA, called wrongly: an exception comes before anything is launched or written."""

import pytest
import torch
from tests_support import NATIVE_OPERATORS, NativeCall

from factorizer_kernels.shared import native

OPERATORS = {name: value for name, value in NATIVE_OPERATORS.items() if not name.startswith("sw_")}
EACH_MEMORY = [(operator, name) for operator, (ins, outs) in OPERATORS.items() for name in (*ins, *outs)]


class CudaCall(NativeCall):
    """The same factorisation by the emulated kernels, with the scratch memory that they ask for."""

    def __init__(self, per_matrix=False):
        super().__init__(per_matrix)
        self.work = lambda address, size: (address, size)
        self.given = {operator: list(outs) for operator, (_, outs) in OPERATORS.items()}
        self.given["factors backward"] += ["du", "dv"]
        self.dx_dtype = 0
        # Their gradients of u0 and v0 are each matrix' share.
        self.tensors.update(du0=torch.full((16, 2, 4), 7.0), dv0=torch.full((16, 2, 6), 7.0))
        for name in ("du0", "dv0"):
            self.before[name] = self.tensors[name].clone()
            self.memory[name] = native.memory(self.tensors[name])

    def run(self, operator):
        module, problem = native.native, self.problem()
        given = {name: self.memory[name] for name in self.given[operator]}
        if "backward" not in operator:
            scratch = torch.empty(module.cuda_plan_forward(problem, operator == "factors"))
            work = self.work(*native.memory(scratch))
            module.cuda_swin_nmf_forward(problem, 0, 0, work, **given)
            return
        if operator == "backward":
            given["dy"] = self.volume("dy")
        elements, sums_dx = module.cuda_plan_backward(problem, 1)
        assert sums_dx  # two shifts
        scratch = torch.empty(elements)
        work = self.work(*native.memory(scratch))
        module.cuda_swin_nmf_backward(problem, 0, 0, work, 1, dx_dtype=self.dx_dtype, **given)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_right_call(operator, per_matrix):
    call = CudaCall(per_matrix)
    call.run(operator)
    assert call.written() == set(OPERATORS[operator][1])


@pytest.mark.parametrize(("operator", "name"), EACH_MEMORY)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_short_memory(operator, name, per_matrix, device):
    """One byte too few, or no address, of any argument: the error names it."""
    for short in (lambda address, size: (address, size - 1), lambda address, size: (0, size)):
        call = CudaCall(per_matrix)
        call.memory[name] = short(*call.memory[name])
        with pytest.raises(ValueError, match=f"^{name} needs "):
            call.run(operator)
        assert not call.written()
    assert not device.launches()


@pytest.mark.parametrize("operator", ["forward", "backward"])
@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda address, size: (address + 4, size - 4), "^work must lie on a multiple of 16 bytes"),
        (lambda address, size: (address, size - 4), "^work needs "),
        (lambda address, size: (0, size), "^work needs "),
    ],
)
def test_wrong_scratch_memory(operator, work, message):
    call = CudaCall()
    call.work = work
    with pytest.raises(ValueError, match=message):
        call.run(operator)
    assert not call.written()


@pytest.mark.parametrize(
    ("operator", "given", "message"),
    [
        ("forward", [], "either y, or u and v, must be given"),
        ("factors", ["u"], "u and v go together"),
        ("forward", ["y", "u", "v"], "either y, or u and v, must be given"),
        ("backward", ["dx", "du0"], "du0 and dv0 go together"),
        ("factors backward", ["dx", "du0", "dv0"], "either dy, or du and dv, must be given"),
    ],
)
def test_arguments_left_out(operator, given, message):
    call = CudaCall()
    call.given[operator] = given
    with pytest.raises(ValueError, match=message):
        call.run(operator)
    assert not call.written()


def test_gradient_of_another_dtype():
    call = CudaCall()
    call.dx_dtype = 2
    with pytest.raises(ValueError, match=r"^dx must be float32"):
        call.run("backward")
    assert not call.written()
