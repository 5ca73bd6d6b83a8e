"""Losses against the golden cases, the training loop's resume, and bad recipes."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import NARROW

from rvos_nb.core import Problem
from rvos_nb.stage import StageFailed
from rvos_nb.train import losses

GOLDEN = Path(__file__).parent / "golden"


def noise(seed, shape):
    return torch.from_numpy(
        np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32)
    )


def criterion_answers(arrays, classes):
    """Everything `matcher_criterion` records for one number of classes, under its names."""
    b, t, q, h, w = 2, 3, 5, 16, 24
    layers = []
    for layer in range(4):
        s = 100 * classes + 10 * layer
        boxes = torch.sigmoid(noise(s + 2, (b, t, q, 4)).double()).float()
        layers.append(
            {
                "pred_logits": noise(s + 1, (b, t, q, classes)),
                "pred_boxes": boxes,
                "pred_masks": 2 * noise(s + 3, (b, t, q, h, w)),
            }
        )
    for layer in layers:
        for x in layer.values():
            x.requires_grad_()
    target = {
        "labels": torch.from_numpy(arrays["in/labels"]),
        "boxes": torch.from_numpy(arrays["in/boxes"]),
        "valid": torch.from_numpy(arrays["in/valid"]).bool(),
        "masks": losses.pad_masks([torch.from_numpy(arrays[f"in/masks_{i}"]) for i in range(b)]),
    }
    total, parts, index = losses.Criterion()(layers[-1] | {"aux_outputs": layers[:-1]}, target)
    total.backward()
    yield f"classes{classes}/losses", torch.stack([parts[k] for k in sorted(parts)])
    yield f"classes{classes}/indices", index
    yield f"classes{classes}/total", total
    for i, layer in enumerate(layers):
        for k, x in layer.items():
            yield f"classes{classes}/grad/{i}/{k}", x.grad


def unit_answers(arrays):
    x, y = noise(33, (4, 60)), torch.from_numpy(arrays["in/unit/y"])
    boxes = torch.from_numpy(arrays["in/unit/boxes"])
    yield "unit/focal_loss", losses.focal(x, y).mean(1).sum() / 3
    yield "unit/dice_loss", (1 - losses.dice(x, y)).sum() / 3
    yield "unit/focal_coef", losses.focal(x[:, None], y).mean(-1)
    yield "unit/dice_coef", losses.dice(x[:, None], y)
    yield "unit/giou", losses.giou(boxes[:3, None], boxes[3:])


@pytest.mark.parametrize("part", ["classes1", "classes65", "unit"])
def test_matcher_criterion(part):
    arrays = np.load(GOLDEN / "referformer" / "matcher_criterion.npz", allow_pickle=False)
    meta = json.loads(str(arrays["meta"]))
    answers = dict(
        unit_answers(arrays) if part == "unit" else criterion_answers(arrays, int(part[7:]))
    )
    expected = {k[4:] for k in arrays.files if k.startswith(f"out/{part}/")}
    assert set(answers) == expected
    for name, got in answers.items():
        how = meta["outputs"].get(name, {})
        got = got.detach().numpy()[tuple(slice(None, None, s) for s in how.get("stride", []))]
        np.testing.assert_allclose(
            got,
            arrays[f"out/{name}"],
            how.get("rtol", 2e-3),
            how.get("atol", 2e-3 if "indices" not in name else 0),
            err_msg=name,
        )
        if part != "unit" and "losses" in name:
            np.testing.assert_allclose(got, arrays[f"out/{name}"], 1e-5)


def test_propagation_formulas():
    arrays = np.load(GOLDEN / "vos" / "train_loss_aotl.npz", allow_pickle=False)
    logits, labels = (
        torch.from_numpy(arrays["in/loss_logits"]),
        torch.from_numpy(arrays["in/loss_labels"]),
    )
    for step in (0, 25000, 50000, 90000):
        got = losses.bootstrapped_ce(logits, labels, losses.hard_share(step / 100000))
        np.testing.assert_allclose(got, arrays[f"out/ce_step{step}"], 1e-5, err_msg=str(step))
    np.testing.assert_allclose(
        losses.soft_jaccard(logits, labels), arrays["out/soft_jaccard"], 1e-5
    )
    for step in (0, 25000, 75000):  # the recorded total is made of the recorded frames
        each = arrays[f"out/step{step}/frame_losses"]
        total = losses.aux_weight(step / 100000) * each[0].mean() + each[1:].mean()
        np.testing.assert_allclose(total, arrays[f"out/step{step}/loss"], 1e-5)


PUBLISHED = {
    "pre mobilenet": ("train-aot-pre", {}),
    "main mobilenet": ("train-aot-ytb-dav", {}),
    "main other": ("train-aot-ytb-dav", {"tuning.final": 0.05}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_learning_rates(name):
    """Rates of encoder, transformer and identity bank as recorded at ten steps;
    a rate of 0 is a bank that gets no gradient."""
    from torch import nn

    from rvos_nb.train.recipe import read_recipe
    from rvos_nb.train.schedule import optimizer_for, set_rates

    meta = json.loads(
        str(np.load(GOLDEN / "vos" / "train_loss_aotl.npz", allow_pickle=False)["meta"])
    )
    recipe, given = PUBLISHED[name]
    r = read_recipe(recipe, given)
    tuning, loss = r.tuning, r.loss
    optimizer = optimizer_for(
        nn.ModuleDict({n: nn.Linear(1, 1, bias=False) for n in ("encoder", "LSTT")}), tuning
    )
    for step, (encoder, lstt, bank) in meta["learning_rates"][name].items():
        assert set_rates(optimizer, int(step), 100_000, tuning) == pytest.approx(
            lstt, rel=1e-6
        ) and bank in (0, pytest.approx(lstt))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([encoder, lstt], rel=1e-6)
        assert (bank == 0) == (
            loss.get("hold_identities", False) and int(step) / 100_000 >= loss["own"]
        )


def test_published_weight_decay():
    from rvos_nb.train.recipe import read_recipe
    from rvos_nb.train.schedule import optimizer_for
    from rvos_nb.vos.aot import AOT, AOT_VARIANTS

    wanted = json.loads(
        str(np.load(GOLDEN / "vos" / "train_loss_aotl.npz", allow_pickle=False)["meta"])
    )["weight_decay"]
    model = AOT(AOT_VARIANTS["r50_aotl"])
    optimizer = optimizer_for(model, read_recipe("train-aot-ytb-dav").tuning)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decay[id(model.get_parameter(n))] for n in wanted} == wanted


def test_drops_stand_where_published_epochs_end():
    "MUTR's recipe, 12 epochs with drops after 8 and 10, as torch's own scheduler sets rates."
    from torch import nn
    from torch.optim.lr_scheduler import MultiStepLR

    from rvos_nb.train.recipe import Tuning
    from rvos_nb.train.schedule import optimizer_for, set_rates

    model = nn.ModuleDict({n: nn.Linear(1, 1) for n in ("backbone", "text_encoder", "head")})
    groups = {"backbone": 0.06, "text_encoder": 0.1}
    tuning = Tuning(lr=1e-4, schedule="step", warmup=0.0, drops=[8 / 12, 10 / 12], groups=groups)
    ours = optimizer_for(model, tuning)
    theirs = optimizer_for(model, tuning)
    for group, rate in zip(theirs.param_groups, (6e-6, 6e-6, 1e-5, 1e-5, 1e-4, 1e-4)):
        group["lr"] = rate
    scheduler, steps = MultiStepLR(theirs, [8, 10]), 7  # in an epoch
    for step in range(12 * steps):
        set_rates(ours, step, 12 * steps, tuning)
        rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in (ours, theirs)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-9), step
        theirs.step()
        if step % steps == steps - 1:
            scheduler.step()


def test_frozen_parts_and_decaying_vectors():
    from torch import nn

    from rvos_nb.train.recipe import Tuning
    from rvos_nb.train.schedule import freeze_parts, optimizer_for, update_weights

    parts = ("backbone", "text_encoder", "bbox_embed")
    model = nn.ModuleDict({n: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for n in parts})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuning = Tuning(
        weight_decay=0.5, decay_vectors=True, no_decay=["backbone.1"], frozen=["text_encoder"]
    )
    freeze_parts(model, tuning.frozen)
    optimizer = optimizer_for(model, tuning)
    named = {id(p): n for n, p in model.named_parameters()}
    decays = {named[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == {n for n in before if "text_encoder" not in n}
    assert all(d == (0.0 if "backbone.1" in n else 0.5) for n, d in decays.items())
    x, loss = torch.randn(3, 2), 0
    for name in parts:
        loss = loss + model[name](x).square().sum()
    norm = update_weights(model, optimizer, loss, clip=0.1)
    assert norm > 0.1 and all(p.grad is None for p in model["text_encoder"].parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("text_encoder" in name), name
    with pytest.raises(Problem, match="frozen: found 'text_encodr'"):
        freeze_parts(model, ["text_encodr"])


def test_a_step_that_is_not_finite_changes_nothing():
    from torch import nn

    from rvos_nb.train.recipe import Tuning
    from rvos_nb.train.schedule import optimizer_for, update_weights

    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = optimizer_for(model, Tuning())
    with pytest.raises(Problem, match=r"here.*finite numbers"):
        update_weights(model, optimizer, model.weight.sum() * float("inf"), 1.0, "here")
    assert torch.equal(model.weight, before)


REFER = {
    "name": "toy",
    "family": "referformer",
    "model": NARROW | {"mask_dim": 8, "fpn_groups": 2},
    "tuning": {"ema": 0.5},
    "watch": {"every": 50, "clips": 8, "frames": 2, "size": [32, 48], "levels": ["medium"]},
    "stages": [
        {"steps": 3, "clips": 2, "sentences": 2, "size": [32, 48]},
        {"steps": 2, "frames": 2, "clips": 2, "size": [32, 48], "levels": {"medium": 1}},
    ],
}
AOT = {
    "name": "toy-aot",
    "family": "aot",
    "model": {
        "encoder": "conv_tiny_vos",
        "dim": 32,
        "heads": 2,
        "reach": 2,
        "max_objects": 5,
        "align_corners": False,
        "id_kernel": 16,
        "drop_path": 0.1,
    },
    "watch": {"every": 50, "clips": 8, "frames": 3, "size": [32, 48], "levels": ["easy"]},
    "stages": [{"steps": 4, "frames": 3, "clips": 2, "size": [32, 48], "levels": {"hard": 1}}],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_footage(root):
    "Pictures with masks, and films laid out like YouTube-VOS, all of RefShapes."
    from PIL import Image

    from rvos_nb.data import scenes
    from rvos_nb.data.masks import write_labels

    for i in range(3):
        scene = scenes.scene(i, "easy", frames=5, size=(48, 64))
        for t in range(5):
            frame, label = (
                root / f"films/JPEGImages/v{i}/{t:05d}.jpg",
                root / f"films/Annotations/v{i}/{t:05d}.png",
            )
            for path in (frame, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.frames[t]).save(frame)
            write_labels(label, scene.labels[t])
        (root / "pictures").mkdir(exist_ok=True)
        Image.fromarray(scene.frames[0]).save(root / f"pictures/{i}.jpg")
        write_labels(root / f"pictures/{i}.png", scene.labels[0])


SMALL = {
    "model": {
        "encoder": "conv_tiny_vos",
        "dim": 32,
        "heads": 2,
        "reach": 2,
        "align_corners": False,
        "id_kernel": 16,
        "train_gap": 2,
    },
    "stages.0.steps": 4,
    "stages.0.clips": 2,
    "stages.0.size": [32, 48],
    "watch": {"every": 50, "clips": 2},
}


@pytest.mark.parametrize(
    "recipe, data",
    [
        ("train-aot-pre", {"images": "pictures"}),
        ("train-aot-ytb-dav", {"youtube": "films", "davis": "films"}),
    ],
    ids=["pre", "ytb-dav"],
)
def test_published_trainings_run_and_resume(recipe, data, tmp_path):
    from rvos_nb.models import zoo
    from rvos_nb.train.loop import train

    write_footage(tmp_path)
    given = (
        SMALL
        | {k: str(tmp_path / v) for k, v in data.items()}
        | ({"stages.0.short": 48} if "ytb" in recipe else {})
    )
    train(recipe, tmp_path / "a", given=given).check()
    train(recipe, tmp_path / "b", minutes=0, given=given).check()
    (tmp_path / "moved").mkdir()
    for name in ("pictures", "films"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    train(
        recipe,
        tmp_path / "b",
        given=given | {k: str(tmp_path / "moved" / v) for k, v in data.items()},
    ).check()  # where data lie does not matter
    assert (tmp_path / "a" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model" / "model.safetensors"
    ).read_bytes()
    assert str(tmp_path) not in json.dumps(zoo.read_card(tmp_path / "a" / "model"))
    rows = (tmp_path / "a" / "validation.csv").read_text().split()
    assert "J sampled" in (tmp_path / "a" / "validation.csv").read_text() and len(rows) >= 2
    from rvos_nb.train.loop import Trainer
    from rvos_nb.train.recipe import read_recipe  # the second training goes on from the first

    moved = {k: str(tmp_path / "moved" / v) for k, v in data.items()}
    later = Trainer(read_recipe(recipe, given | moved | {"start": str(tmp_path / "a" / "model")}))
    first = zoo.load(tmp_path / "a" / "model").state_dict()
    assert all(torch.equal(t, first[n]) for n, t in later.task.model.state_dict().items())


def test_a_referring_model_begins_where_its_recipe_says(tmp_path):
    from rvos_nb.models import zoo
    from rvos_nb.train.loop import Trainer
    from rvos_nb.train.recipe import read_recipe

    net = Trainer(read_recipe("train-referformer-tiny", {"start": "referformer-tiny"})).task.model
    shipped = zoo.load("referformer-tiny").state_dict()
    assert all(torch.equal(t, shipped[n]) for n, t in net.state_dict().items())
    from torchvision.models import resnet50

    torch.save((file := resnet50()).state_dict(), tmp_path / "resnet50.pth")
    body = (
        Trainer(
            read_recipe(
                "train-referformer-tiny-pre",
                {"start": str(tmp_path / "resnet50.pth"), "model.backbone": "resnet50"},
            ),
        )
        .task.model.backbone[0]
        .body
    )
    assert torch.equal(body.layer3[5].conv2.weight, file.layer3[5].conv2.weight)
    with pytest.raises(Problem, match="missing"):
        torch.save({"fc.weight": torch.ones(2)}, tmp_path / "other.pth")
        Trainer(read_recipe("train-referformer-tiny-pre", {"start": str(tmp_path / "other.pth")}))


@pytest.mark.parametrize("seed", range(6))
def test_sequences_of_odd_footage(seed, tmp_path):
    """Pictures and films of any size, grey ones too, with void pixels and objects that come and go:
    batches keep their promises."""
    from PIL import Image

    from rvos_nb.data.masks import write_labels
    from rvos_nb.data.sequences import FilmStage, StillStage

    rng = np.random.default_rng(seed)
    for v in range(2):
        h, w, n = (int(x) for x in (*rng.integers(20, 90, 2), rng.integers(1, 7)))
        for t in range(n):
            labels = np.zeros((h, w), np.uint8)
            for k in rng.integers(1, 30, 4):
                y, x = (int(rng.integers(m)) for m in (h, w))
                labels[max(y - 12, 0) : y + 12, max(x - 12, 0) : x + 12] = k
            labels[:2] = 255
            for name in ("JPEGImages", "Annotations"):
                (tmp_path / name / str(v)).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).convert(
                "L" if v else "RGB"
            )
            picture.save(tmp_path / f"JPEGImages/{v}/{t}.jpg")
            write_labels(tmp_path / f"Annotations/{v}/{t}.png", labels)
    size, limit = [tuple(int(x) for x in rng.integers(33, 70, 2)), int(rng.integers(1, 6))]
    for stage in (
        StillStage(1, [str(tmp_path)], clips=3, size=size, objects=limit, look="v2"),
        FilmStage(
            1,
            [{"folder": str(tmp_path), "repeat": 1, "gap": 5}],
            clips=3,
            size=size,
            objects=limit,
            look="v2",
            paste=0.5,
            short=int(rng.integers(20, 90)),
        ),
    ):
        b = stage.batch(seed, 0)
        assert (
            b.frames.shape == (5, 3, *size, 3)
            and b.labels.shape == (5, 3, *size)
            and b.frames.dtype == b.labels.dtype == np.uint8
        )
        for i, n in enumerate(b.objects):
            assert (
                1 <= n <= limit
                and set(np.unique(b.labels[0, i])) - {255} <= set(range(n + 1))
                and set(range(1, n + 1)) <= set(np.unique(b.labels[0, i]))
            )
            assert set(np.unique(b.labels[1:, i])) <= {*range(n + 1), 255}
        again = stage.batch(seed, 0)
        assert np.array_equal(b.frames, again.frames) and np.array_equal(b.labels, again.labels)


def test_damaged_training_pictures_are_named(tmp_path):
    from rvos_nb.data.sequences import StillStage

    write_footage(tmp_path)
    broken = tmp_path / "pictures/1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    for name in ("0", "2"):
        for ext in ("jpg", "png"):
            (tmp_path / f"pictures/{name}.{ext}").unlink()
    with pytest.raises(Problem, match=r"1\.jpg"):
        StillStage(1, [str(tmp_path / "pictures")], size=(32, 48)).batch(0, 0)


def test_training_without_its_data_says_what_is_missing(tmp_path):
    from rvos_nb.train.loop import train

    for recipe, said in (
        ("train-aot-pre", "-p images FOLDER"),
        ("train-aot-ytb-dav", "-p youtube FOLDER"),
    ):
        assert said in next(iter(train(recipe, tmp_path / recipe, given=SMALL).failed.values()))


AS_PUBLISHED = REFER | {
    "tuning": {
        "schedule": "step",
        "warmup": 0.0,
        "drops": [0.6],
        "decay_vectors": True,
        "clip": 0.1,
        "groups": {"backbone.0": 0.5},
        "frozen": ["text_encoder"],
    }
}


@pytest.mark.parametrize(
    "recipe", [REFER, AS_PUBLISHED, AOT], ids=["referformer", "as published", "aot"]
)
def test_resume_equals_undisturbed(recipe, tmp_path):
    from rvos_nb.models import zoo
    from rvos_nb.train.loop import train

    train(recipe, tmp_path / "a").check()
    torch.rand(7)  # the state of the global generator must not matter
    assert train(recipe, tmp_path / "b", minutes=0).check().done
    assert zoo.read_card(tmp_path / "b" / "model")["card"]["steps"] == 1
    assert (
        train(recipe, tmp_path / "b").check().done and train(recipe, tmp_path / "b").check().skipped
    )
    assert (tmp_path / "a" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "a" / "run.json").read_bytes() == (tmp_path / "b" / "run.json").read_bytes()
    card = zoo.read_card(tmp_path / "a" / "model")["card"]
    assert card["steps"] == card["of_steps"] and card["hardware"] and card["quick_validation"]


def test_workers_change_nothing():
    from rvos_nb.data.clips import SceneStage, Stream
    from rvos_nb.train.loop import draw_batches

    stream = Stream(
        "refer",
        3,
        [SceneStage(3, clips=2, size=(32, 48)), SceneStage(2, frames=2, clips=1, size=(32, 48))],
    )
    here, there = list(draw_batches(stream, 1)), list(draw_batches(stream, 1, workers=1))
    assert len(here) == len(there) == 4
    for [(_, a)], [(_, b)] in zip(here, there):
        assert a.texts == b.texts and (a.frames == b.frames).all() and (a.masks == b.masks).all()


def test_damaged_or_foreign_checkpoint(tmp_path):
    from rvos_nb.train.loop import Trainer, train
    from rvos_nb.train.recipe import read_recipe

    train(AOT, tmp_path, minutes=0).check()
    other = Trainer(read_recipe(AOT | {"seed": 9}))
    with pytest.raises(Problem, match="another recipe"):
        other.load(tmp_path / "checkpoints" / "step-00000001.pt")
    with pytest.raises(Problem, match="other parameters"):
        train(AOT | {"seed": 9}, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    path.write_bytes(path.read_bytes()[:1000])
    report = train(AOT, tmp_path)
    assert "does not load" in report.failed["toy-aot"]
    assert train(AOT, tmp_path, resume=False).check().done


@pytest.mark.parametrize(
    "change, said",
    [
        ({"step": 10**6}, "step 1000000"),
        ({"step": -1}, "step -1"),
        ({"step": 1.5}, "no step"),
        ({"seconds": float("nan")}, "nan s"),
        ({"modules": []}, "no modules"),
        ({"modules": {}}, "RuntimeError"),
        ({"optimizer": {}}, "KeyError"),
        ({"recipe": None}, "no recipe"),
        (None, "no recipe"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_refused(change, said, tmp_path):
    from rvos_nb.train.loop import train

    train(AOT, tmp_path, minutes=0).check()
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    state = torch.load(path, weights_only=True)
    torch.save([] if change is None else state | change, path)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    report = train(AOT, tmp_path)
    assert said in report.failed["toy-aot"], report.failed
    assert str(path) in report.failed["toy-aot"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_with_a_nan_is_refused(tmp_path):
    from rvos_nb.train.loop import train

    train(AOT, tmp_path, minutes=0).check()
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    state = torch.load(path, weights_only=True)
    name = next(n for n, x in state["modules"].items() if x.is_floating_point())
    state["modules"][name].view(-1)[0] = float("nan")
    torch.save(state, path)
    assert f"{name} with 1 of" in train(AOT, tmp_path).failed["toy-aot"]


def test_a_checkpoint_whose_moments_are_not_finite_is_refused(tmp_path):
    from rvos_nb.train.loop import train

    train(AOT, tmp_path, minutes=0).check()
    path = tmp_path / "checkpoints/step-00000001.pt"
    state = torch.load(path, weights_only=True)
    first = next(iter(state["optimizer"]["state"].values()))
    first["exp_avg"].view(-1)[0] = float("inf")
    torch.save(state, path)
    assert "exp_avg with 1 of" in train(AOT, tmp_path).failed["toy-aot"]


KILLED = """
import os, signal, sys
import rvos_nb
from rvos_nb.cli import main
from rvos_nb.train import loop

one_step = loop.Trainer.one_step

def end_in_the_middle(self, batch):
    parts = one_step(self, batch)
    if self.step == 57:
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    return parts

loop.Trainer.one_step = end_in_the_middle
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
COMMAND = 'main(["train", sys.argv[2], "--out", sys.argv[3]])'
CALL = "loop.train(sys.argv[2], sys.argv[3])"


def run_killed(how, recipe, out, begin=COMMAND) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", KILLED + begin, how, str(recipe), str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def read_diary(out) -> list[dict]:
    with open(out / "train.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    measured = ("seconds", "clips_per_second", "memory_gb")  # of this run on this machine
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def test_the_diary_of_a_training_that_was_killed(tmp_path):
    "The same rows with the same means, after each way to end it."
    from rvos_nb.train.loop import train
    from rvos_nb.train.trainer import list_checkpoints

    recipe = copy.deepcopy(AOT)
    recipe["stages"] = [recipe["stages"][0] | {"steps": 60}]
    recipe |= {"watch": recipe.get("watch", {}) | {"every": 60, "clips": 1}, "save_minutes": 0.005}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train(path, tmp_path / "whole").check()
    expected = read_diary(tmp_path / "whole")
    assert [row["step"] for row in expected] == ["50", "60"]
    for how, code in (("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)):
        out = tmp_path / how
        done = run_killed(how, path, out)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        if code > 0:
            assert done.stderr.strip().splitlines()[-1].startswith("rvos: ended by ")
            assert "the same command goes on" in done.stderr
            newest = torch.load(list_checkpoints(out)[0], weights_only=True)
            assert newest["step"] == 57
        with open(out / "train.csv", "a") as f:
            f.write("60,1.0\n5")  # what a killed process had not finished
        train(path, out).check()
        assert read_diary(out) == expected
        assert (out / "model/model.safetensors").read_bytes() == (
            tmp_path / "whole/model/model.safetensors"
        ).read_bytes()


def test_a_script_that_trains_is_ended_as_a_command_is(tmp_path):
    from rvos_nb.train.trainer import list_checkpoints

    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(AOT | {"stages": [AOT["stages"][0] | {"steps": 60}]}))
    out = tmp_path / "out"
    done = run_killed("SIGTERM", path, out, CALL)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert torch.load(list_checkpoints(out)[0], weights_only=True)["step"] == 57


def test_loss_that_explodes_is_named(tmp_path):
    from rvos_nb.data.clips import Stream
    from rvos_nb.train.loop import Trainer, draw_batches
    from rvos_nb.train.recipe import read_recipe

    trainer = Trainer(read_recipe(AOT))
    with torch.no_grad():
        next(trainer.task.model.parameters()).fill_(float("nan"))
    with pytest.raises(Problem, match="finite"):
        trainer.one_step(next(draw_batches(Stream("sequence", 0, trainer.recipe.stages), 0)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"family": "dog"}, "family 'dog'"),
        ({"learning_rate": 1}, "learning_rate"),
        ({"tuning": {"momentum": 1}}, "momentum"),
        ({"loss": {"size": 1}}, "size"),
        ({"loss": {"mask_per": "dog"}}, "mask_per.*dog"),
        ({"model": {"width": 1}}, "width"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"clips": 1}]}, "steps"),
        ({"stages": [{"steps": 1, "source": "dog"}]}, "source 'dog'"),
        ({"stages": [{"steps": 1, "folders": ["x"], "look": "v3"}]}, "v3"),
        ({"tuning": {"schedule": "dog"}}, "dog"),
        ({"tuning": {"lr": float("nan")}}, "nan"),
        ({"tuning": {"clip": float("inf")}}, "inf"),
        ({"stages": [{"steps": 1, "size": [30, 48]}]}, "size"),
        ({"stages": [{"steps": 1, "levels": {"odd": 1}}]}, "levels"),
        ({"stages": [{"steps": 1, "kinds": ["smell"]}]}, "smell"),
        ({"watch": 3}, "watch"),
        ({"tuning": None}, "tuning"),
        ({"tuning": {"lr": "1e-3"}}, "with a dot"),
        ({"tuning": {"gamma": -1}}, "tuning, gamma"),
        ({"tuning": {"drops": [0.5]}}, "tuning, drops.*'step'"),
        ({"tuning": {"schedule": "step", "drops": [8]}}, "tuning, drops.*between 0 and 1"),
        ({"tuning": {"schedule": "step", "drops": [0.8, 0.5]}}, "tuning, drops.*rising"),
        ({"tuning": {"schedule": "step", "drops": 0.5}}, "tuning, drops.*in brackets"),
        ({"tuning": {"groups": {"backbone.0": "1e-1"}}}, "tuning, groups, backbone.0"),
        ({"tuning": {"groups": ["backbone.0"]}}, "tuning, groups"),
        ({"tuning": {"no_decay": "conv_out"}}, "tuning, no_decay.*in brackets"),
        ({"tuning": {"frozen": "text_encoder"}}, "tuning, frozen.*in brackets"),
        ({"tuning": {"frozen": ["text_encodr"]}}, "tuning, frozen.*text_encodr"),
        ({"tuning": {"decay_vectors": "no"}}, "tuning, decay_vectors"),
    ],
)
def test_bad_recipe(change, said, tmp_path):
    from rvos_nb.train.loop import train

    with pytest.raises((Problem, StageFailed), match=said) as e:
        train(REFER | change, tmp_path).check()
    assert all(word in str(e.value) for word in ("found", "expected"))


@pytest.mark.parametrize("limit", [{"steps": 0}, {"minutes": -1}, {"workers": -1}], ids=str)
def test_limits_that_mean_nothing(limit, tmp_path):
    from rvos_nb.train.loop import train

    with pytest.raises(Problem, match=f"{next(iter(limit))}: found"):
        train("train-toy", tmp_path / "out", **limit)
    assert not (tmp_path / "out").exists()


def test_bad_recipe_file(tmp_path):
    from rvos_nb.train.recipe import read_recipe

    (tmp_path / "x.yaml").write_text("name: [")
    for recipe, said in (
        (tmp_path / "x.yaml", "not YAML"),
        (tmp_path / "none.yaml", "no such recipe"),
        ("nothing", "no such recipe"),
    ):
        with pytest.raises(Problem, match=said):
            read_recipe(recipe)


@pytest.mark.parametrize(
    "name, given",
    [
        ("train-referformer-tiny-pre", {}),
        ("train-referformer-tiny", {"start": "referformer-tiny"}),  # in place of the first training
        ("train-referformer-video-swin-tiny-pre", {}),
        ("train-referformer-video-swin-tiny", {"start": "referformer-video-swin-tiny"}),
        ("train-soc-tiny-pre", {}),
        ("train-soc-tiny", {"start": "soc-tiny"}),
        ("train-mutr-tiny-pre", {}),
        ("train-mutr-tiny", {"start": "mutr-tiny"}),
        ("train-wavecl-tiny-pre", {"trunk": "soc-tiny"}),
        ("train-wavecl-tiny", {"start": "wavecl-tiny"}),
        ("train-uninext-tiny", {"trunk": "referformer-tiny"}),
        ("train-aot-tiny", {}),
        ("train-deaot-tiny", {}),
    ],
)
def test_shipped_recipes_build(name, given):
    from rvos_nb.train.loop import Trainer
    from rvos_nb.train.recipe import read_recipe

    trainer = Trainer(read_recipe(name, given))
    assert 3e5 < sum(p.numel() for p in trainer.task.model.parameters()) < 2.5e6


def test_the_command_passes_parameters_on(tmp_path, monkeypatch, capsys):
    from rvos_nb.cli import main
    from rvos_nb.models import zoo

    write_footage(tmp_path)
    monkeypatch.chdir(tmp_path)

    def train(*more):
        with pytest.raises(SystemExit) as e:
            main(
                [
                    "train",
                    "train-aot-pre",
                    "--steps",
                    "2",
                    "--out",
                    "out",
                    "-p",
                    "stages.0.clips",
                    "2",
                    "-p",
                    "stages.0.size=[48, 64]",
                    "-p",
                    "stages.0.objects",
                    "5",
                    "-p",
                    "model",
                    "{variant: deaot-tiny}",
                    "-p",
                    "family",
                    "deaot",
                    "-p",
                    "watch.clips",
                    "2",
                    *more,
                ]
            )
        return e.value.code, capsys.readouterr()

    code, said = train("-p", "images", "pictures")
    assert (
        not code
        and "results in" in said.out
        and zoo.read_card(tmp_path / "out" / "model")["family"] == "deaot"
    )
    for more, what in (
        (("-p", "images", "pictures", "-p", "stages.0.size", "[50, 64]"), "multiples of 8"),
        (("-p", "pictures", "3"), "pictures"),
    ):
        code, said = train(*more, "--out", "other")
        assert (
            code == 1
            and what in said.err
            and said.err.startswith("rvos: ")
            and "Traceback" not in said.err
        )
