"""factorizer doctor: right, wrong and broken backends."""

from factorizer_support import run_command


def test_doctor(monkeypatch):
    monkeypatch.setattr("factorizer.commands.doctor.ROUNDS", 1)
    printed = run_command("doctor")
    assert "All usable backends are right." in printed
    monkeypatch.setattr("factorizer.commands.doctor.TOLERANCE", 0.0)
    assert "WRONG" in run_command("doctor", code=1)

    def broken(backend, device):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("factorizer.commands.doctor._errors", broken)
    assert "FAILS" in run_command("doctor", code=1)
