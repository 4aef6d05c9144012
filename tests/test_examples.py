"""The programs in examples/ do what the documentation says of them."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_classifier_with_an_nmf_block():
    example = load("nmf_classifier")
    # 0.96 in 150 steps; a third of them are enough to be far above chance, 0.33 with a standard
    # deviation of 0.03 over 300 images.
    assert example.main(steps=75) > 0.6
    network = example.Classifier(3)
    assert {"features.3.u0", "features.3.v0"} <= set(network.state_dict())
