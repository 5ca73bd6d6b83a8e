"""Around a step: precision, parts, checkpoints that fall back, bad steps, the best model."""

import csv
import math

import pytest
import torch

from rvos_nb.core import Problem
from rvos_nb.data.clips import Stream
from rvos_nb.models import zoo
from rvos_nb.stage import StageFailed
from rvos_nb.train import trainer as steps
from rvos_nb.train.loop import draw_batches, train
from rvos_nb.train.recipe import read_recipe
from rvos_nb.train.trainer import Trainer, list_checkpoints


def losses(given, count=4):
    trainer = Trainer(read_recipe("train-toy", given))
    recipe = trainer.recipe
    told = []
    for batches in draw_batches(Stream("refer", recipe.seed, recipe.stages), 0):
        told.append(float(trainer.one_step(batches)["loss"]))
        if len(told) == count:
            return told
    raise AssertionError("too few steps")


def test_forgotten_layers_change_no_bit():
    "With a Video-Swin, dropout included."
    given = {"model.backbone": "video_swin_t_p4w7", "stages.0.clips": 1, "stages.0.frames": 2}
    assert losses(given) == losses(given | {"recompute": True})


def test_sixteen_bits_train():
    plain, half = losses({}), losses({"precision": "bf16"})
    assert plain != half
    assert all(a == pytest.approx(b, rel=0.05) for a, b in zip(plain, half))


@pytest.mark.parametrize("precision", ["fp16", "float16", "bfloat16"])
def test_precision_that_is_not_there(precision, tmp_path):
    with pytest.raises(Problem, match="precision"):
        train("train-toy", tmp_path / "out", device="cpu", given={"precision": precision})
    assert not (tmp_path / "out" / "model").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys):
    given = {"save_minutes": 0}
    train("train-toy", tmp_path / "whole", given=given).check()
    train("train-toy", tmp_path / "out", given=given, minutes=0).check()
    train("train-toy", tmp_path / "out", given=given, minutes=0).check()
    newest, before = list_checkpoints(tmp_path / "out")
    assert (newest.name, before.name) == ("step-00000002.pt", "step-00000001.pt")
    newest.write_bytes(newest.read_bytes()[:2000])
    capsys.readouterr()
    train("train-toy", tmp_path / "out", given=given).check()
    said = capsys.readouterr().out
    assert str(newest) in said and "going on from the one before" in said
    whole, out = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()
    assert len(list_checkpoints(tmp_path / "out")) == 2


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    train("train-toy", tmp_path, minutes=0).check()
    (kept,) = list_checkpoints(tmp_path)
    whole = kept.read_bytes()

    def fill(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(steps.torch, "save", fill)
        failed = train("train-toy", tmp_path, minutes=0).failed
    assert "space" in next(iter(failed.values()))
    assert list_checkpoints(tmp_path) == [kept] and kept.read_bytes() == whole
    assert train("train-toy", tmp_path).check().done


def poison(monkeypatch, at):
    "The loss of some steps is not a number."
    before = steps.BatchLoss.forward

    def forward(self, batch, progress, count):
        total, parts = before(self, batch, progress, count)
        return (total * math.nan if round(10 * progress) in at else total), parts

    monkeypatch.setattr(steps.BatchLoss, "forward", forward)


def test_bad_steps_end_the_run_or_are_left_out(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 5})
    failed = train("train-toy", tmp_path / "a").failed
    assert "training step 3" in failed["train-toy"] and "scene 3/0" in failed["train-toy"]
    assert "--skip-bad-steps" in failed["train-toy"]
    failed = train("train-toy", tmp_path / "b", skip_bad=1).failed
    assert "training step 5" in failed["train-toy"]
    train("train-toy", tmp_path / "c", skip_bad=2).check()
    with open(tmp_path / "c" / "bad_steps.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["3", "5"] and "scene 5/1" in rows[1]["clips"]
    assert "left out: training step 3" in capsys.readouterr().out
    weights = zoo.read_tensors(tmp_path / "c" / "model" / "model.safetensors")
    assert all(torch.isfinite(x).all() for x in weights.values() if x.is_floating_point())


def test_what_a_run_leaves_behind(tmp_path):
    train("train-toy", tmp_path, given={"watch.every": 5, "keep": 3, "save_minutes": 0}).check()
    assert len(list_checkpoints(tmp_path)) == 3
    assert list(tmp_path.glob("train-toy/events.*")), "TensorBoard's file"
    best = zoo.read_card(tmp_path / "best")["card"]
    with open(tmp_path / "validation.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    top = max(rows, key=lambda row: float(row["J&F easy"]))
    assert best["quick_validation"]["J&F easy"] == pytest.approx(float(top["J&F easy"]), abs=1e-4)
    with open(tmp_path / "train.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert {"lr", "loss", "norm", "clips_per_second", "memory_gb"} <= set(row)


@pytest.mark.parametrize(
    "limits, said",
    [
        ({"trackers": ["tensorbord"]}, "tensorbord"),
        ({"skip_bad": -1}, "skip_bad"),
        ({"tracker": "x"}, "the option tracker"),
    ],
)
def test_limits_that_are_wrong(limits, said, tmp_path):
    with pytest.raises(Problem, match=said):
        train("train-toy", tmp_path / "out", **limits)
    assert not (tmp_path / "out").exists()


def test_more_data_is_another_schedule(tmp_path):
    "A checkpoint of as many steps as the data gave then."
    trainer = Trainer(read_recipe("train-toy"))
    trainer.save(tmp_path / "step.pt")
    state = torch.load(tmp_path / "step.pt", weights_only=True)
    torch.save(state | {"total": 12}, tmp_path / "step.pt")
    with pytest.raises(Problem, match="12 steps"):
        trainer.load(tmp_path / "step.pt")


def test_the_newest_checkpoint_is_never_removed(tmp_path):
    "A damaged one with a higher number goes instead."
    given = {"keep": 1}
    train("train-toy", tmp_path, given=given, minutes=0).check()
    damaged = tmp_path / "checkpoints" / "step-00000009.pt"
    damaged.write_bytes(b"cut short")
    train("train-toy", tmp_path, given=given, minutes=0).check()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002.pt"]
    assert train("train-toy", tmp_path, given=given).check().done


def test_a_writer_that_fails_for_want_of_room_says_so(tmp_path, monkeypatch):
    from types import SimpleNamespace

    def fail(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672]")

    trainer = Trainer(read_recipe("train-toy"))
    monkeypatch.setattr(steps.torch, "save", fail)
    monkeypatch.setattr(steps.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(Problem, match="no space left"):
        trainer.save(tmp_path / "step.pt")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("stages.0.size", [32], "size"),
        ("stages.0.size", 32, "size"),
        ("stages.0.levels", {"easy": 0}, "levels"),
        ("stages.0.levels", {"easy": "x"}, "levels"),
        ("stages.0.levels", {"easy": -1, "hard": 1}, "levels"),
        ("watch.levels", [], "levels"),
        ("watch.levels", ["foo"], "levels"),
        ("tuning.frozen", ["nosuchpart"], "nosuchpart"),
    ],
)
def test_settings_are_refused_before_a_step(name, value, said, tmp_path):
    out = tmp_path / "out"
    with pytest.raises((Problem, StageFailed), match=said):
        train("train-toy", out, given={name: value}).check()
    assert not (out / "checkpoints").exists()
    train("train-toy", out, minutes=0).check()  # the folder is not claimed


def test_a_tracker_that_is_not_installed(tmp_path):
    with pytest.raises(Problem, match="pip install wandb"):
        train("train-toy", tmp_path / "out", trackers=["wandb"])


def test_another_recipe_in_the_folder_is_told_by_what_differs(tmp_path):
    given = {"tuning.lr": 8e-4, "stages.0.size": [32, 64]}
    train("train-toy", tmp_path, minutes=0, given=given).check()
    with pytest.raises(Problem) as e:
        train("train-toy", tmp_path, given={"tuning.lr": 1e-3})
    said = str(e.value)
    assert "tuning.lr: 0.0008 there, 0.001 asked" in said
    assert "stages.0.size: [32, 64] there, [32, 48] asked" in said
    assert said.count(" there, ") == 2 and len(said) < 300 + len(str(tmp_path))
    assert "--no-resume" in said and "force" not in said
    train("train-toy", tmp_path, given={"tuning.lr": 1e-3}, resume=False).check()


def gather_beside(step):
    "What several processes gather, of which another one stands at this step."
    return lambda own: torch.cat([own.new_tensor([step]), own])


def test_machines_without_a_shared_folder_are_refused(tmp_path, monkeypatch):
    "Of two machines the first finds the checkpoint that it wrote, the second an empty folder."
    train("train-toy", tmp_path / "first", minutes=0).check()
    (tmp_path / "second").mkdir()
    for folder, here, elsewhere in (("first", 1, 0), ("second", 0, 1)):
        trainer = Trainer(read_recipe("train-toy"))
        monkeypatch.setattr(trainer.accelerator, "gather", gather_beside(elsewhere))
        with pytest.raises(Problem, match="let all machines write to one shared folder") as e:
            steps.load_newest(trainer, tmp_path / folder)
        assert f"step {here} here, another elsewhere" in str(e.value)


def test_machines_with_a_shared_folder_go_on(tmp_path, monkeypatch):
    train("train-toy", tmp_path, minutes=0).check()
    trainer = Trainer(read_recipe("train-toy"))
    monkeypatch.setattr(trainer.accelerator, "gather", gather_beside(1))
    steps.load_newest(trainer, tmp_path)
    assert trainer.step == 1
