"""Networks exported to ONNX, and run by ONNX Runtime and by OpenVINO on the CPU.

The file holds standard operators: of the Factorizer the reference's. Both use as many threads as torch, in
float32. A network whose result is not torch's is refused.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # relative L2 distance; both sum in other orders than torch


def in_runtime(name: str, network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The network, exported for x's shape, as a function that the runtime computes.

    Args:
        name: "onnxruntime" or "openvino".

    Raises:
        pytest.skip.Exception: it is not installed, or onnxscript is not.
        pytest.fail.Exception: its result for x is not torch's.
    """
    for package in (name, "onnxscript"):
        pytest.importorskip(package, reason=f"pip install {package}")
    network = network.eval()
    with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = network(x)
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, (x,), path, dynamo=True, verbose=False)
        function = _LOADERS[name](path)
    error = ((function(x) - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        pytest.fail(
            f"wrong, so not timed: the result of {name} is {error:.1e} off torch's, "
            f"allowed is {TOLERANCE:.0e}"
        )
    return function


def _onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or the next contender would wait
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16 it is the default
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(path, "CPU", options)
    request = model.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[model.output(0)].copy())


_LOADERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
