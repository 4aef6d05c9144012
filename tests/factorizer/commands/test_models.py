"""factorizer models, and predict with a model's name."""

import re
from dataclasses import replace

import numpy as np
import pytest
from factorizer_support import MODALITIES, four_modalities, run_command

import factorizer
from factorizer.segmentation.trained import load_model, save_model


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


def test_export_keeps_what_the_models_say(tumour, tmp_path):
    one, two, card = tmp_path / "one.pt", tmp_path / "two.pt", tmp_path / "card.md"
    model = replace(load_model(tumour), mirror=True, largest_component=("TC", "WT"), card="# One\n")
    save_model(model, one)
    save_model(replace(model, largest_component=("WT",)), two)
    card.write_text("# Two\n")
    out = tmp_path / "out.pt"

    def exported(*options):
        run_command("models", "export", "--output", out, *options)
        found = load_model(out)
        out.unlink()
        return len(found.members), found.mirror, found.largest_component, found.card

    assert exported("--checkpoint", one) == (1, True, ("TC", "WT"), "# One\n")
    assert exported("--checkpoint", one, "--no-mirror", "--card", card) == (1, False, ("TC", "WT"), "# Two\n")
    assert exported("--checkpoint", one, "--checkpoint", two) == (2, True, ("WT",), "")
    assert exported("--checkpoint", one, "--checkpoint", tumour) == (2, False, (), "")


def test_a_broken_model_does_not_hide_the_others(tumour, tmp_path):
    run_command("models", "import", tumour, "--name", "v1.0")
    (tmp_path / "models" / ".part-half.pt").write_bytes(b"half")
    (tmp_path / "models" / "broken.pt").write_bytes(b"half")
    printed = run_command("models")
    assert "v1.0" in printed
    assert "hippocampus" in printed
    assert re.search(r"broken .* cannot be", printed)
    assert "part-half" not in printed
    voxels = np.random.default_rng(0).gamma(2, 100, (12, 12, 12, 4))
    assert factorizer.segment(voxels, "v1.0", spacing=(1, 1, 1)).shape == (12, 12, 12)


def test_export_errors(tumour, tmp_path):
    own = ["models", "export", "--checkpoint", tumour, "--output", tumour]
    before = tumour.read_bytes()
    assert "is there already" in run_command(*own, code=2)
    assert tumour.read_bytes() == before
    card = tmp_path / "card.md"
    card.write_bytes("Größe".encode("latin-1"))
    to_card = ["models", "export", "--checkpoint", tumour, "--card", card, "--output"]
    assert "is there already" in run_command(*to_card, card, code=2)
    assert card.read_bytes() == "Größe".encode("latin-1")
    assert "card: " in run_command(*to_card, tmp_path / "mine.pt", code=2)
    options = ["models", "export", "--output", tmp_path / "mine.pt"]
    printed = run_command(*options, "--checkpoint", tmp_path / "absent.pt", code=2)
    assert "absent.pt" in printed
    printed = run_command(*options, "--checkpoint", tumour, "--card", tmp_path / "absent.md", code=2)
    assert "absent.md" in printed
    assert not (tmp_path / "mine.pt").exists()
    assert MODALITIES[0] in run_command("models", "import", tumour) + run_command("models")
    assert "has no card" in run_command("models", "card", tumour.stem, code=2)
