"""Compile the Triton kernels for a GPU that is not there, and print what they use.

    python compile_variants.py CAPABILITY [--slow] [--record] [--only CASE]

Runs the operators on CPU tensors with every launch replaced by a compilation for the given compute
capability, so that the variants are those of real calls. Prints a table as JSON: for each case and
kernel the largest number of registers, bytes of shared memory and bytes of stack (spills) of its cubins, and
of those that COUNTED names the instructions in the machine code, by class. With --record the table is written
to resources.json beside this file, as the bound for the tests.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The kernels, which a PyTorch without CUDA leaves out.
import factorizer_kernels.ops.depthwise.triton
import factorizer_kernels.ops.nmf.triton
import factorizer_kernels.ops.pointwise.triton
import factorizer_kernels.ops.swin_nmf.triton
import factorizer_kernels.ops.windows.triton  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))
from machine_code import instructions

OPERATORS = torch.ops.factorizer_kernels
RESOURCES = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
EPS = 1e-16


class AbsentDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def swin(solver, rank, shifts=(0, 0, 0, 4, 4, 4), dtype=torch.float32, side=8):
    """Forward and backward of swin_nmf in windows of 8 channels, by default the case of the benchmarks."""
    x = torch.rand(1, 32, 32, 32, 32, dtype=dtype)
    u0, v0 = torch.rand(8, rank), torch.rand(side**3, rank)
    windows = (8, [side] * 3, list(shifts))
    OPERATORS.swin_nmf(x, u0, v0, *windows, True, 5, solver, 5, EPS, "triton")
    OPERATORS.swin_nmf_backward(x, x, u0, v0, True, *windows, True, 5, solver, 5, EPS, "triton")


def whole_map(solver, rank):
    """The same with one window as large as the map: the Global Factorizer."""
    x = torch.rand(1, 16, 32, 64, 32)
    u0, v0 = torch.rand(8, rank), torch.rand(32 * 64 * 32, rank)
    windows = (8, [32, 64, 32], [0, 0, 0])
    OPERATORS.swin_nmf(x, u0, v0, *windows, True, 5, solver, 5, EPS, "triton")
    OPERATORS.swin_nmf_backward(x, x, u0, v0, True, *windows, True, 5, solver, 5, EPS, "triton")


def odd(solver, rank):
    """nmf and nmf_factors where no size is a power of two."""
    x, u0, v0 = torch.rand(3, 11, 50), torch.rand(11, rank), torch.rand(50, rank)
    OPERATORS.nmf(x, u0, v0, 5, solver, 5, EPS, "triton")
    OPERATORS.nmf_backward(x, x, u0, v0, True, 5, solver, 5, EPS, "triton")
    u, v = OPERATORS.nmf_factors(x, u0, v0, 5, solver, 5, EPS, "triton")
    OPERATORS.nmf_factors_backward(u, v, x, u0, v0, True, 5, solver, 5, EPS, "triton")


def large(solver, rank):
    """nmf at a rank above those that the kernels are specialised for."""
    x, u0, v0 = torch.rand(2, 40, 70), torch.rand(40, rank), torch.rand(70, rank)
    OPERATORS.nmf(x, u0, v0, 2, solver, 2, EPS, "triton")
    OPERATORS.nmf_backward(x, x, u0, v0, True, 2, solver, 2, EPS, "triton")


def windows():
    x = torch.rand(1, 32, 32, 32, 32)
    z = OPERATORS.sw_matricize(x, 8, [8, 8, 8], [0, 0, 0, 4, 4, 4], False, "triton")
    OPERATORS.sw_dematricize(z, x.shape, 8, [8, 8, 8], [0, 0, 0, 4, 4, 4], True, "triton")


def pointwise(dtype):
    """The chains of a block of 32 channels, and the step to and from the next level, forward and backward."""
    x = torch.rand(1, 32, 16, 16, 16, dtype=dtype)
    norm, square, tall = torch.rand(32), torch.rand(32, 32), torch.rand(64, 32)
    norm_linear = (x, norm, norm, square, norm, 1e-5, dtype)
    OPERATORS.norm_linear(*norm_linear, "triton")
    OPERATORS.norm_linear_backward(x, None, *norm_linear, True, "triton")
    weights = (square, norm, norm, norm, tall, torch.rand(64), tall.mT.contiguous(), norm)
    OPERATORS.linear_norm_mlp(x, x, *weights, 1e-5, dtype, "triton")
    OPERATORS.linear_norm_mlp_backward(x, x, x, *weights, 1e-5, dtype, True, "triton")
    coarse, blocks = torch.rand(1, 64, 8, 8, 8, dtype=dtype), torch.rand(64, 32, 2, 2, 2)
    join = (x, coarse, square, blocks, norm, dtype)
    OPERATORS.join(*join, "triton")
    OPERATORS.join_backward(x, *join, True, "triton")
    wide, norm = torch.rand(1, 128, 8, 8, 8, dtype=dtype), torch.rand(128)
    norm_alone = (wide, norm, norm, None, None, 1e-5, dtype)
    OPERATORS.norm_linear(*norm_alone, "triton")
    OPERATORS.norm_linear_backward(wide, None, *norm_alone, True, "triton")


def pointwise_64():
    """The chains of a block of 64 channels, the widest that a tile holds."""
    x, norm, square, tall = (
        torch.rand(1, 64, 16, 16, 16),
        torch.rand(64),
        torch.rand(64, 64),
        torch.rand(128, 64),
    )
    weights = (square, norm, norm, norm, tall, torch.rand(128), tall.mT.contiguous(), norm)
    OPERATORS.linear_norm_mlp(x, x, *weights, 1e-5, x.dtype, "triton")
    OPERATORS.linear_norm_mlp_backward(x, x, x, *weights, 1e-5, x.dtype, True, "triton")


def tf32(case):
    """A case where torch multiplies float32 by one product of TF32."""
    torch.set_float32_matmul_precision("high")
    case()
    torch.set_float32_matmul_precision("highest")


def depthwise(side):
    x, weight = torch.rand(1, 32, 32, 32, 32), torch.rand(32, side, side, side)
    OPERATORS.depthwise_conv(x, weight, torch.rand(32), "triton")
    OPERATORS.depthwise_conv_backward(x, x, weight, [True, True, True], "triton")


CASES = {
    "pointwise": lambda: pointwise(torch.float32),
    "pointwise tf32": lambda: tf32(lambda: pointwise(torch.float32)),
    "pointwise 64": pointwise_64,
    "pointwise 64 tf32": lambda: tf32(pointwise_64),
    "pointwise bfloat16": lambda: pointwise(torch.bfloat16),
    "depthwise 3": lambda: depthwise(3),
    "swin hals 1": lambda: swin("hals", 1),
    "swin hals 1 windows of 4": lambda: swin("hals", 1, (0, 0, 0, 2, 2, 2), side=4),
    "swin mu 1": lambda: swin("mu", 1),
    "swin hals 2": lambda: swin("hals", 2),
    "swin hals 1 one copy bfloat16": lambda: swin("hals", 1, (0, 0, 0), torch.bfloat16),
    "swin hals 12": lambda: swin("hals", 12),
    "whole map hals 1": lambda: whole_map("hals", 1),
    "whole map hals 2": lambda: whole_map("hals", 2),
    "large mu 64": lambda: large("mu", 64),
    "large mu 64 tf32": lambda: tf32(lambda: large("mu", 64)),
    "large hals 64": lambda: large("hals", 64),
    "windows": windows,
}
SLOW_CASES = {
    "swin hals 4": lambda: swin("hals", 4),
    "whole map hals 4": lambda: whole_map("hals", 4),
    "odd hals 3": lambda: odd("hals", 3),
    "odd mu 1": lambda: odd("mu", 1),
    "large mu 100": lambda: large("mu", 100),
}


# The cases that most calls are: their instructions are counted too.
COUNTED = ("swin hals 1", "swin hals 1 one copy bfloat16")


def instructions_of(cubin: bytes) -> dict[str, int]:
    """The instructions in a cubin, by class."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return instructions(listing)


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a cubin's one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def table(capability: int, cases: dict) -> dict[str, list]:
    """{capability / case / kernel: [registers, shared memory, stack]}, the largest of its variants.

    Of COUNTED cases a dictionary of ``machine_code.instructions`` is the fourth.
    """
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(AbsentDevice(capability))
    found: dict[str, list] = {}
    try:
        for case, call in cases.items():
            compiled.clear()
            call()
            for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
                key = f"sm_{capability} / {case} / {name}"
                registers, stack = registers_and_stack(kernel.asm["cubin"])
                used = (registers, kernel.metadata.shared, stack)
                before = found.get(key, used)
                found[key] = [max(a, b) for a, b in zip(before[:3], used, strict=True)]
                if case in COUNTED:
                    counts = instructions_of(kernel.asm["cubin"])
                    if len(before) > 3:
                        counts = {of: max(count, before[3][of]) for of, count in counts.items()}
                    found[key].append(counts)
    finally:
        JITFunction.run = run
    return found


def main() -> None:
    capability = sys.argv[1]
    cases = SLOW_CASES if "--slow" in sys.argv else CASES
    if "--only" in sys.argv:
        case = sys.argv[sys.argv.index("--only") + 1]
        cases = {case: cases[case]}
    result = table(int(capability), cases)
    if "--record" in sys.argv:
        recorded = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
        recorded.update(result)
        lines = [f'  "{variant}": {json.dumps(used)}' for variant, used in sorted(recorded.items())]
        temporary = RESOURCES.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(temporary, RESOURCES)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
