"""factorizer doctor: right, wrong and broken backends."""

import torch
from factorizer_support import run_command

import factorizer_kernels as fk
from factorizer.commands import doctor


def test_doctor(monkeypatch):
    monkeypatch.setattr("factorizer.commands.doctor.ROUNDS", 1)
    printed = run_command("doctor")
    assert "All usable backends are right." in printed
    tried = printed.split("Right, and how fast")[1]
    assert all(backend.name in tried for backend in fk.backends() if backend.name in ("cpu", "torch"))
    monkeypatch.setattr("factorizer.commands.doctor.TOLERANCE", 0.0)
    assert "WRONG" in run_command("doctor", code=1)

    monkeypatch.setattr("factorizer.commands.doctor.TOLERANCE", 1e-4)
    monkeypatch.setattr("factorizer.commands.doctor._errors", lambda *_: (0.0, float("nan")))
    assert "nan WRONG" in run_command("doctor", code=1)

    def broken(backend, device):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("factorizer.commands.doctor._errors", broken)
    assert "FAILS" in run_command("doctor", code=1)


def test_what_a_card_is_tried_with(monkeypatch):
    """Each backend with an operator that it has; whether the card runs it is not for here."""
    names = [backend.name for backend in fk.backends()]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        devices = {name: doctor._device_of(name) for name in names}
    assert devices == {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "torch": "cuda", "reference": "cpu"}
    for name in ("torch", "reference"):
        assert max(doctor._errors(name, "cpu")) < doctor.TOLERANCE
