"""factorizer speed: the table and the plot."""

import csv
from dataclasses import replace

from factorizer_support import checkpoint_for, four_modalities, plan_for, run_command
from matplotlib.image import imread

from factorizer.commands.speed import Result, Setting, _draw
from factorizer.models.build import build_network


def test_dollars_in_names_are_no_mathematics(tmp_path):
    plan = plan_for(labels={0: "background", 1: "$_{WT$"}, network={"rank": 1, "num_iters": 3})
    setting = Setting("rank", 3, 1, build_network(plan.network, 0))
    trained = {"num_iters": 3, "rank": 1}
    _draw(tmp_path / "speed.png", [Result(setting, 0.5, {"$_{WT$": 0.5}, 1.0)], trained, "$_{task$")
    assert imread(tmp_path / "speed.png").std() > 0.05


def test_speed(synthetic, tmp_path):
    plan = plan_for(held_out=("synthetic_002",), network={"rank": 1, "num_iters": 3})
    checkpoint = checkpoint_for(plan, tmp_path / "checkpoint.pt")
    options = ["speed", "--checkpoint", checkpoint, "--output", tmp_path, "--input"]
    printed = run_command(*options, synthetic / "dataset.json", "--num-iters", "0,5", "--ranks", "1,2")
    assert "task: 1 case " in printed
    assert "warning" not in printed
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = [(int(row["num_iters"]), int(row["rank"])) for row in rows]
    assert settings == [(0, 1), (5, 1), (3, 1), (3, 2)]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert imread(tmp_path / "speed.png").std() > 0.05
    (tmp_path / "both").mkdir()
    seen = checkpoint_for(replace(plan, held_out=(), training=("synthetic_001",)), tmp_path / "seen.pt")
    two = ["--checkpoint", seen, "--checkpoint", checkpoint]
    run_command("models", "export", *two, "--output", tmp_path / "two.pt")
    options[2] = tmp_path / "two.pt"
    printed = run_command(*options, synthetic / "dataset.json", "--ranks", 1, "--num-iters", 1, "--cases", 1)
    assert "of the 2 networks of" in printed
    assert "trained on cases of these names: synthetic_001" in printed
    assert "'--ranks': got 'x'" in run_command(*options, synthetic / "dataset.json", "--ranks", "x", code=2)
    assert "ranks: got 0; it must be" in run_command(
        *options, synthetic / "dataset.json", "--ranks", "2,0", code=2
    )
    four_modalities(tmp_path / "in", "case")
    assert "no case has a label" in run_command(*options, tmp_path / "in", code=2)


def test_files_of_others_stay(synthetic, tmp_path):
    plan = plan_for(network={"rank": 1, "num_iters": 1})
    checkpoint = checkpoint_for(plan, tmp_path / "checkpoint.pt")
    out = tmp_path / "out"
    out.mkdir()
    options = ["speed", "--checkpoint", checkpoint, "--output", out, "--input", synthetic / "dataset.json"]
    options += ["--num-iters", 1, "--ranks", 1, "--cases", 1]
    for name, what in (("speed.csv", "table"), ("speed.png", "picture")):
        (out / name).write_text("my,own,table\n")
        assert f"{name} is there, and is no {what} of speed" in run_command(*options, code=2)
        assert [path.read_text() for path in out.iterdir()] == ["my,own,table\n"]
        (out / name).unlink()
    for _ in range(2):  # its own are written anew
        run_command(*options)
        assert imread(out / "speed.png").std() > 0.05
