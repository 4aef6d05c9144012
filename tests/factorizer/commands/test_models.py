"""factorizer models, and predict with a model's name."""

import pytest
from factorizer_support import MODALITIES, four_modalities, run_command


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORIZER_MODELS", str(tmp_path / "models"))


def test_export_import_list_predict(tumour, tmp_path):
    (tmp_path / "card.md").write_text("# Tumours\n\n## Not for\n\nPatients [any].\n")
    export = ["models", "export", "--checkpoint", tumour, "--output", tmp_path / "mine.pt"]
    run_command(*export, "--card", tmp_path / "card.md", "--mirror")
    printed = run_command("models", "import", tmp_path / "mine.pt", "--name", "tumours")
    assert "predict --model tumours" in printed
    assert "tumours" in run_command("models")
    assert "# Tumours ## Not for Patients [any]." in run_command("models", "card", "tumours")
    four_modalities(tmp_path / "in", "case")
    cases = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    run_command("predict", "--model", "tumours", *cases)
    assert (tmp_path / "out" / "case.nii.gz").is_file()
    printed = run_command("predict", "--model", "tumours", *cases, "--no-mirror", code=2)
    assert "made with other settings (mirror)" in printed  # which the file asked for


@pytest.mark.parametrize("command", ["predict", "explain", "speed"])
def test_one_of_checkpoint_and_model(command, tumour, tmp_path):
    options = [command, "--input", tmp_path, "--output", tmp_path / "out"]
    assert "checkpoint, model: give one of them" in run_command(*options, code=2)
    both = ["--checkpoint", tumour, "--model", "tumours"]
    assert "checkpoint, model: give one of them" in run_command(*options, *both, code=2)
    assert "model: got 'absent'" in run_command(*options, "--model", "absent", code=2)


def test_export_errors(tumour, tmp_path):
    options = ["models", "export", "--output", tmp_path / "mine.pt"]
    printed = run_command(*options, "--checkpoint", tmp_path / "absent.pt", code=2)
    assert "absent.pt" in printed
    printed = run_command(*options, "--checkpoint", tumour, "--card", tmp_path / "absent.md", code=2)
    assert "absent.md" in printed
    assert not (tmp_path / "mine.pt").exists()
    assert MODALITIES[0] in run_command("models", "import", tumour) + run_command("models")
    assert "has no card" in run_command("models", "card", tumour.stem, code=2)
