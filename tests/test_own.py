"""One's own videos: what becomes of them and of mistakes in them, and a trained model that goes on
with them, with all its weights or with adapters."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data import refshapes, scenes
from rvos_nb.data.check import check_dataset
from rvos_nb.data.clips import draw_refer_batch
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_labels, write_labels, write_mask
from rvos_nb.data.prepare import prepare
from rvos_nb.data.video import open_clip, read_video
from rvos_nb.models import zoo
from rvos_nb.models.mutr import tiny_mutr
from rvos_nb.models.soc import tiny_soc
from rvos_nb.models.text import make_tokenizer
from rvos_nb.models.uninext import tiny_uninext
from rvos_nb.models.wavecl import tiny_wavecl
from rvos_nb.predict import predict
from rvos_nb.stage import StageFailed
from rvos_nb.train.loop import train
from rvos_nb.train.recipe import Lora, list_recipes, read_recipe, recipe_identity
from rvos_nb.train.trainer import Trainer
from rvos_nb.workflow import list_workflows

SIZE = (64, 96)
VIDEOS = [f"easy-{i:05d}" for i in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Four films as a user brings them."
    root = tmp_path_factory.mktemp("made")
    refshapes.write_own(root, 4, "easy", seed=2, frames=5, size=SIZE)
    return root


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture(scope="module")
def data(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "own"
    assert prepare("own", made, out)[1] == []
    return out


def write_rows(source, *rows, header="video,object,sentence,split"):
    (source / "sentences.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def add_rows(source, *rows):
    with open(source / "sentences.csv", "a", encoding="utf-8") as f:
        f.write("\n".join(rows) + "\n")


# A data set


def test_films_become_a_data_set(made, data):
    assert not check_dataset(data).faults
    counts = {split: len(open_dataset(data, split).videos) for split in ("train", "valid")}
    assert counts == {"train": 3, "valid": 1}
    split = open_dataset(data, "train")
    video = next(iter(split.videos.values()))
    film = open_clip(made / f"videos/{video.id}.mp4")
    assert video.frames == film.frames
    pairs = zip(read_video(video), read_video(film))
    assert max(np.abs(a.astype(int) - b).mean() for a, b in pairs) < 4  # JPEG
    for name in video.frames:
        drawn = read_labels(made / f"masks/{video.id}/{name}.png")
        kept = read_labels(data / f"train/Annotations/{video.id}/{name}.png")
        assert (drawn == kept).all()
    table = (made / "sentences.csv").read_text().splitlines()
    for e in split:
        row = table[int(e.id.removeprefix("row-")) - 1]
        assert row == f"{e.video},{e.object_id},{e.text}"


def test_frames_of_folders_are_upright_and_those_with_masks(tmp_path):
    "White on black is object 1; a frame that was taken upright is listed upright."
    frames, masks = tmp_path / "videos/walk", tmp_path / "masks/walk"
    frames.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 255
    for name in ("img_2", "img_10", "img_30"):
        Image.fromarray(picture).save(frames / f"{name}.jpg", quality=95, exif=exif)
    mask = np.zeros((60, 40), bool)
    mask[30:] = True
    for name in ("img_10", "img_2"):
        write_mask(masks / f"{name}.png", mask)
    write_rows(tmp_path, "walk;the lower half", header="Video;Sentence")
    written, faults = prepare("own", tmp_path, tmp_path / "out")
    assert len(written) == 1 and len(faults) == 1 and "no usable video in valid" in faults[0]
    split = open_dataset(tmp_path / "out", "train")
    assert split.videos["walk"].frames == ("img_2", "img_10")
    (e,) = split
    assert (e.text, e.object_id) == ("the lower half", "1")
    frame = next(read_video(split.videos["walk"]))
    assert frame.shape[:2] == (60, 40) and (split.masks(e)[0] == mask).all()
    assert frame[mask].mean() > 250 and frame[~mask].mean() < 5


def test_numbers_of_masks_need_no_zeros_and_the_table_may_choose(source):
    folder = source / "masks" / VIDEOS[0]
    for path in sorted(folder.glob("*.png")):
        path.rename(folder / f"{int(path.stem)}.png")
    (folder / "3.png").unlink()
    write_rows(
        source, f"{VIDEOS[0]}.mp4,1,one,", f"{VIDEOS[1]},1,two,train", f"{VIDEOS[0]},1,a,valid"
    )
    assert prepare("own", source, source.parent / "out")[1] == []
    split = open_dataset(source.parent / "out", "valid")
    assert split.videos[VIDEOS[0]].frames == ("00000", "00001", "00002", "00004")


def test_a_second_run_replaces_the_first(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    add_rows(source, f"{VIDEOS[0]},99,nobody")
    assert len(prepare("own", source, out)[1]) == 1
    before = sorted(out.rglob("*"))
    monkeypatch.setattr("rvos_nb.data.prepare_own.write_lists", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare("own", source, out)
    assert sorted(out.rglob("*")) == before and len([*tmp_path.iterdir()]) == 2
    monkeypatch.undo()
    write_rows(source, *[f"{v},1,it," for v in VIDEOS])
    assert prepare("own", source, out)[1] == []
    assert len(open_dataset(out, "train")) == 3


# Mistakes


def spoil_film(source):
    path = source / f"videos/{VIDEOS[1]}.mp4"
    path.write_bytes(path.read_bytes()[:100])


def spoil_size(source):
    write_labels(source / f"masks/{VIDEOS[1]}/00002.png", np.ones((10, 10), np.uint8))


def spoil_mask(source):
    (source / f"masks/{VIDEOS[1]}/00002.png").write_bytes(b"no picture")


def spoil_name(source):
    folder = source / f"masks/{VIDEOS[1]}"
    (folder / "00004.png").rename(folder / "00005.png")


def spoil_twice(source):
    shutil.copy(source / f"masks/{VIDEOS[1]}/00002.png", source / f"masks/{VIDEOS[1]}/2.png")


def remove_masks(source):
    shutil.rmtree(source / f"masks/{VIDEOS[1]}")


def empty_masks(source):
    for path in (source / f"masks/{VIDEOS[1]}").glob("*.png"):
        write_labels(path, np.zeros(SIZE, np.uint8))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (spoil_film, f"{VIDEOS[1]}.mp4"),
        (spoil_size, "00002.png: found 10x10 pixels; expected 64x96"),
        (spoil_mask, "00002.png: found a picture that cannot be read"),
        (spoil_name, "00005.png: found a mask of no frame; expected one of 00000 … 00004"),
        (spoil_twice, "a second mask of frame 00002"),
        (remove_masks, f"masks/{VIDEOS[1]}: found no masks"),
        (empty_masks, f"found no sentence about an object of {VIDEOS[1]}"),
    ],
)
def test_a_bad_video_costs_itself(spoil, says, source, tmp_path, capsys):
    spoil(source)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["data", "prepare", "own", str(source), "--out", str(out)])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and says in printed, printed
    names = {v for split in ("train", "valid") for v in open_dataset(out, split).videos}
    assert names == {*VIDEOS} - {VIDEOS[1]}
    assert not [p for p in out.rglob("*") if VIDEOS[1] in p.name or ".tmp" in p.name]
    assert not check_dataset(out).faults


ROWS = {
    "wolf,1,a wolf,": "the video 'wolf'; expected one of the 4 in",
    f"{VIDEOS[0]}x,1,a,": f"did you mean {VIDEOS[0]!r}?",
    "../x,1,a,": "'../x'",
    f"{VIDEOS[0]},1, ,": "an empty sentence",
    f"{VIDEOS[0]},x,a,": "object 'x'",
    f"{VIDEOS[0]},255,a,": "object '255'; expected a whole number from 1 to 254",
    f"{VIDEOS[0]},77,a,": f"object 77 of {VIDEOS[0]}; expected an id in its masks: 1, 2",
    f"{VIDEOS[0]},1,a,test": "split 'test'",
    f"{VIDEOS[0]},1,a,valid": "one split for all rows",
    f"{VIDEOS[0]},1,a,,b,c": "2 columns too many",
}


@pytest.mark.parametrize("row, says", ROWS.items(), ids=str)
def test_a_bad_row_costs_itself(row, says, source, tmp_path):
    write_rows(source, *[f"{v},1,it,train" for v in VIDEOS], row)
    _, faults = prepare("own", source, tmp_path / "out", share=0)
    assert len(faults) == 1 and "sentences.csv, row 6: " in faults[0], faults
    assert says in faults[0], faults
    assert len(open_dataset(tmp_path / "out", "train")) == 4


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "sentences.csv: found No such file"),
        ("", "row 1: found the columns ''"),
        ("video,sentense\n", "sentense"),
        ("video,object\na,1\n", "expected video and sentence"),
        ("video,sentence\n", "nothing to train on"),
        ("video,sentence\nwolf,a wolf\n", "the video 'wolf'"),
        (f"video,sentence\n{VIDEOS[0]},{'x' * 200_000}\n", "row 2: found what is no row"),
    ],
)
def test_without_a_table_nothing_is_written(text, says, source, tmp_path):
    (source / "sentences.csv").unlink()
    if text is not None:
        (source / "sentences.csv").write_text(text)
    with pytest.raises(Problem) as e:
        prepare("own", source, tmp_path / "out")
    assert says in str(e.value), e.value
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_other_folders_are_left_alone(source, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.txt").touch()
    for name, out, share in (
        ("own", tmp_path / "photos", 0.2),
        ("own", source, 0.2),
        ("own", "", 0.2),
        ("refcoco", tmp_path / "new", 0.2),
        ("own", tmp_path / "new", 1.0),
    ):
        with pytest.raises(Problem):
            prepare(name, source, out, share)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "source"]


def test_two_files_of_one_name_are_told_apart(source, tmp_path):
    (source / f"videos/{VIDEOS[0]}.srt").touch()
    write_rows(source, f"{VIDEOS[0]},1,a,", f"{VIDEOS[0]}.mp4,1,a,", f"{VIDEOS[1]},1,a,")
    _, faults = prepare("own", source, tmp_path / "out")
    assert len(faults) == 1 and f"{VIDEOS[0]}.mp4 and {VIDEOS[0]}.srt" in faults[0]


# Training


def settings(data, **more):
    small = {"stages.0.sizes": [64], "stages.0.frames": 2, "stages.0.clips": 2}
    watched = {"watch.clips": 2, "watch.every": 2, "save_minutes": 60}
    return {"data": str(data), "start": "referformer-tiny"} | small | watched | more


def read_weights(folder):
    return (folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("lora", [{"rank": 0}, {"rank": 2, "also": ["class_embed"]}], ids=str)
def test_goes_on_from_a_start_and_resumes(lora, data, tmp_path):
    given = settings(data, lora=lora)
    train("finetune-own", tmp_path / "a", steps=4, given=given).check()
    train("finetune-own", tmp_path / "b", steps=4, minutes=0, given=given).check()
    train("finetune-own", tmp_path / "b", steps=4, given=given).check()
    assert read_weights(tmp_path / "a") == read_weights(tmp_path / "b")
    start, trained = (zoo.load(m) for m in ("referformer-tiny", tmp_path / "a/model"))
    assert [*start.state_dict()] == [*trained.state_dict()]
    moved = {n for n, p in start.state_dict().items() if (p != trained.state_dict()[n]).any()}
    if lora["rank"]:
        layers = (
            "text_encoder.encoder.layer.0.attention.self.query.weight",
            "class_embed.0.weight",
        )
        assert {*layers} <= moved and not any("backbone" in n or "norm" in n for n in moved)
    else:
        assert any("backbone" in n for n in moved) and not any("text_enc" in n for n in moved)
    rows = (tmp_path / "a/validation.csv").read_text().splitlines()
    assert "J&F valid" in rows[0] and len(rows) == 3


def test_the_result_needs_no_peft(data, tmp_path, monkeypatch):
    given = settings(data, **{"lora.rank": 2})
    train("finetune-own", tmp_path / "run", steps=2, given=given).check()
    monkeypatch.setitem(sys.modules, "peft", None)
    zoo.load(tmp_path / "run/model", family="referformer")
    predict(data, tmp_path / "masks", tmp_path / "run/model", device="cpu").check()
    with pytest.raises(StageFailed) as e:
        train("finetune-own", tmp_path / "again", steps=2, given=given).check()
    assert "pip install -e '.[peft]'" in str(e.value)


OWN_MODELS = {
    "referformer": None,
    "soc": tiny_soc,
    "mutr": tiny_mutr,
    "wavecl": tiny_wavecl,
    "uninext": tiny_uninext,
}


UNUSED = {"mutr": "text_encoder.pooler."}  # layers that no answer of a family goes through


@pytest.mark.parametrize("family", OWN_MODELS)
def test_steps_reach_every_adapter_and_merging_keeps_the_answer(family):
    "After two steps each of the adapters' numbers has moved, and nothing else has."
    make = OWN_MODELS[family]
    words = len(make_tokenizer(scenes.WORDS))
    recipe = {
        "name": "adapted",
        "family": family,
        "model": dataclasses.asdict(make(words)) if make else {},
        "start": "" if make else "referformer-tiny",
        "stages": [{"steps": 3, "frames": 2, "clips": 2, "size": [64, 96]}],
        "loss": {"pixel": 0.0},
        "tuning": {"lr": 1.0e-2, "warmup": 0.0, "weight_decay": 0.0},
        "lora": {"rank": 2},
    }
    trainer = Trainer(read_recipe(recipe))
    model = trainer.model
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # of a trained model these are not zero
                p += 0.02 * torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0], augment=False)
    with torch.no_grad():
        first = trainer.task.answer(batch, aux=False)
    for _ in range(3):
        trainer.one_step([(0, batch)])
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    unused = {name for name in adapters if name.startswith(UNUSED.get(family, "-"))}
    assert still == {*before} - adapters | unused, sorted(still & adapters)
    names = [n.replace(".base_layer", "") for n in model.state_dict() if "lora_" not in n]
    model.eval()
    with torch.no_grad():
        adapted = trainer.task.answer(batch, aux=False)
        trainer.task.model = trainer.plain_model().eval()
        merged = trainer.task.answer(batch, aux=False)
    assert [*trainer.task.model.state_dict()] == names
    assert (adapted["pred_masks"] - first["pred_masks"]).abs().max() > 1e-3
    for name in {"pred_logits", "pred_masks", "pred_boxes"} & {*adapted}:
        scale = adapted[name].abs().max().clamp(min=1)
        assert (adapted[name] - merged[name]).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize(
    "given, says",
    [
        ({"start": ""}, "no start"),
        ({"start": "resnet50.pth"}, "the start 'resnet50.pth'"),
        ({"start": "nowhere"}, "no such checkpoint"),
        ({"start": "aot-tiny"}, "aot"),
        ({"family": "soc"}, "a soc, as the recipe trains"),
        ({"data": ""}, "no folder"),
        ({"data": "nowhere"}, "nowhere"),
        ({"lora": {"rnk": 8}}, "'rank'"),
        ({"lora": {"rank": "8"}}, "rank"),
        ({"lora": {"rank": -8}}, "a number from 0 on"),
        ({"lora": {"rank": 8, "parts": ["decoder_of_words"]}}, "decoder_of_words"),
    ],
    ids=str,
)
def test_a_training_that_cannot_begin_says_why(given, says, data, tmp_path):
    with pytest.raises((Problem, StageFailed)) as e:
        train("finetune-own", tmp_path, steps=2, given=settings(data) | given).check()
    assert says in str(e.value), e.value


def test_a_recipe_without_adapters_is_the_one_it_was():
    "What a run remembers does not change by a setting that is off."
    recipe = read_recipe("train-toy")
    assert recipe.lora == Lora() and "lora" not in recipe_identity(recipe)
    assert recipe_identity(dataclasses.replace(recipe, lora=Lora(4)))["lora"]["rank"] == 4
    assert json.dumps(recipe_identity(recipe))


def test_the_recipe_is_listed_where_trainings_are():
    assert "finetune-own" in list_recipes() and "finetune-own" not in list_workflows()
