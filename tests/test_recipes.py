"""The published trainings as recipes: their numbers against the authors' own steps and tables, and
each of them run, stopped and resumed on a narrow model."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NARROW, TEXT

from rvos_nb.core import Problem, find_shipped
from rvos_nb.data import refshapes
from rvos_nb.models import zoo
from rvos_nb.train.recipe import place_drops, read_recipe
from rvos_nb.verify import propagators, training

GOLDEN = Path(__file__).parent / "golden" / "training"
CLIPS = sorted(
    path.stem
    for path in find_shipped("recipes").glob("train-*.yaml")
    if "source: clips" in path.read_text(encoding="utf-8")
)

# Numbers: the groups, rates and weights of the authors' program


CASES = {  # case -> the recipe of the same program, and what its case has otherwise
    "referformer_resnet50_finetune": ("train-referformer-ytvos", {}),
    "referformer_video_swin_t_pretrain": ("train-referformer-refcoco", {}),
    "referformer_video_swin_t_a2d": ("train-referformer-a2d", {}),
    "mutr_video_swin_t_joint": ("train-mutr-joint", {}),
    "soc_video_swin_t_a2d": ("train-soc-a2d-scratch", {"tuning.lr": 5e-5}),  # as configured
    "soc_video_swin_t_finetune": ("train-soc-ytvos", {}),
    "wavecl_video_swin_t_a2d": ("train-wavecl-a2d-scratch", {}),
    "aott_warmup": ("train-aot-ytb-dav", {}),
    "r50_aotl_own_predictions": ("train-aot-ytb-dav", {"tuning.final": 0.05}),
    "r50_deaotl_own_predictions": ("train-aot-ytb-dav", {"tuning.final": 0.05}),
}


def read_meta(case):
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return json.loads(str(arrays["meta"]))


def test_every_case_has_its_recipe():
    assert set(CASES) == {path.stem for path in GOLDEN.glob("*.npz")}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_learns_as_the_authors_program_does(case):
    name, given = CASES[case]
    ours, meta = place_drops(read_recipe(name, given)), read_meta(case)
    if "recipe" in meta:
        published = training.read_tuning(meta)
    else:
        published = propagators.tune_as_published(meta["config"])
    for setting in ("lr", "weight_decay", "warmup", "final", "gamma", "clip", "ema"):
        if setting != "final" or published.schedule == "poly":
            assert np.isclose(getattr(ours, setting), getattr(published, setting)), setting
    for setting in ("schedule", "decay_vectors"):
        assert getattr(ours, setting) == getattr(published, setting), setting
    for setting in ("frozen", "no_decay"):
        assert list(getattr(ours, setting)) == list(getattr(published, setting)), setting
    slowed = [{k: v for k, v in t.groups.items() if v != 1} for t in (ours, published)]
    assert list(slowed[0]) == list(slowed[1])  # the first that fits a name counts
    assert np.allclose(*(list(groups.values()) for groups in slowed))


@pytest.mark.parametrize("case", [case for case in CASES if "aot" not in case])
def test_a_recipe_weighs_losses_as_the_authors_program_does(case):
    recipe, meta = read_recipe(CASES[case][0]), read_meta(case)
    published = meta["recipe"]["weights"]
    ours = recipe.loss["weights"]
    assert {f"loss_{k}": v for k, v in ours.items()} == {
        k: v for k, v in published.items() if not k[-1].isdigit()
    }
    assert all(published[k] == ours[k.split("_", 1)[1][:-2]] for k in published if k[-1].isdigit())
    assert recipe.loss["pixel"] == 0
    (stage,) = recipe.stages
    assert stage.pad_to == meta["recipe"]["size_divisibility"]
    assert stage.frames == meta["recipe"].get("num_frames", stage.frames)


TABLE = {  # epochs, drops, clips of a batch, of a GPU, T, classes, lr, backbone, text (0: frozen)
    "train-referformer-refcoco": (12, [8, 10], 64, 2, 1, 1, 1e-4, 5e-5, 1e-5),
    "train-referformer-ytvos": (6, [3, 5], 8, 1, 5, 1, 1e-4, 5e-5, 0),
    "train-referformer-ytvos-scratch": (10, [6, 8], 8, 1, 5, 1, 1e-4, 5e-5, 0),
    "train-referformer-joint": (12, [8, 10], 32, 1, 5, 1, 1e-4, 5e-5, 0),
    "train-referformer-a2d": (6, [3, 5], 16, 2, 5, 1, 1e-4, 5e-5, 0),
    "train-referformer-a2d-scratch": (12, [8, 10], 8, 1, 6, 1, 1e-4, 5e-5, 0),
    "train-referformer-lsvos2023": (6, [3, 5], 8, 1, 5, 1, 5e-6, 1e-6, 1e-6),
    "train-soc-ytvos-scratch": (30, [20], 8, 1, 8, 65, 1e-4, 1e-5, 0),
    "train-soc-refcoco": (30, [15, 20], 64, 8, 1, 1, 1e-4, 1e-5, 5e-6),
    "train-soc-ytvos": (25, [10], 8, 1, 8, 1, 1e-4, 1e-5, 5e-6),
    "train-soc-joint": (30, [20], 8, 1, 8, 1, 1e-4, 1e-5, 0),
    "train-soc-a2d": (20, [], 8, 1, 8, 1, 3e-5, 3e-6, 0),
    "train-soc-a2d-scratch": (40, [15], 4, 2, 8, 1, 5e-4, 5e-5, 0),
    "train-mutr-joint": (12, [8, 10], 16, 2, 5, 1, 1e-4, 6e-6, 1e-5),
    "train-wavecl-a2d-scratch": (40, [15], 4, 2, 8, 1, 5e-5, 5e-6, 0),
    "train-wavecl-ytvos-scratch": (30, [20], 8, 1, 8, 65, 1e-4, 1e-5, 0),
    "train-wavecl-refcoco": (30, [15, 20], 64, 8, 1, 1, 1e-4, 1e-5, 5e-6),
    "train-wavecl-ytvos": (25, [10], 8, 1, 8, 1, 1e-4, 1e-5, 5e-6),
    "train-wavecl-a2d": (20, [], 8, 1, 8, 1, 3e-5, 3e-6, 0),
    "train-wavecl-joint": (30, [20], 8, 1, 8, 1, 1e-4, 1e-5, 5e-6),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_its_row_of_the_published_tables(name):
    recipe = read_recipe(name)
    (stage,), tuning = recipe.stages, recipe.tuning
    epochs, drops, clips, micro, frames, classes, lr, backbone, text = TABLE[name]
    assert (stage.epochs, list(tuning.drop_epochs)) == (epochs, drops)
    assert (stage.clips, stage.micro, stage.frames) == (clips, micro, frames)
    assert recipe.model.get("num_classes", 1) == classes
    assert stage.categories == ("youtube-vos" if classes == 65 else "")
    assert tuning.lr == lr and tuning.decay_vectors and tuning.warmup == 0
    assert np.isclose(tuning.groups.get("backbone", tuning.groups.get("backbone.0")) * lr, backbone)
    assert list(tuning.frozen) == ([] if text else ["text_encoder"])
    assert not text or np.isclose(tuning.groups["text_encoder"] * lr, text)
    goes_on = "scratch" not in name and "joint" not in name and "refcoco" not in name
    assert list(recipe.fresh) == (["class_embed"] if goes_on else [])


def test_every_recipe_of_clips_has_a_row():
    assert set(CLIPS) == {*TABLE, "train-uninext-ytvos"}


# Runs: two steps and a resume on a narrow model


QUERY = {"mask_dim": 8, "fpn_groups": 2}
VIDEO = {"video_enc_layers": 1, "video_dec_layers": 1}
OWN = {  # of the models of a family
    "referformer": QUERY,
    "mutr": QUERY | VIDEO,
    "soc": QUERY | VIDEO | {"fpn_groups": 1},
    "wavecl": QUERY | VIDEO | {"fpn_groups": 1},
    "uninext": {
        "backbone_options": {"time_strides": []},
        "num_queries": 12,
        "fusion_dim": 16,
        "embed_layers": 0,
        "text": TEXT | {"model_type": "bert"},
    },
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "RefShapes in the layouts that the recipes read; categories are those of RefShapes."
    base, size = tmp_path_factory.mktemp("trees"), (48, 64)
    for part in ("refcoco_train", "refcoco+_train", "refcocog_train", "refcoco_val"):
        refshapes.write(base / "refcoco", part, "easy", 3, 1, 1, size, "refcoco")
    refshapes.write(base / "ytvos", "train", "easy", 2, 1, 9, size)
    for split in ("train", "test"):
        refshapes.write(base / "a2d", split, "easy", 3, 1, 9, size, "a2d-sentences")
    return base


def make_small(name, trees) -> dict:  # settings to give
    "A recipe's own stage, tuning and losses on little pictures and a narrow model."
    recipe = read_recipe(name)
    (stage,) = recipe.stages
    given = {name: str(trees / name) for name in recipe.data}
    given |= {"model": recipe.model | NARROW | OWN[recipe.family], "text": "", "fresh": []}
    given |= {"stages.0.sizes": [48], "stages.0.long": 80, "stages.0.steps": 2}
    given |= {"stages.0.clips": 2, "stages.0.micro": min(stage.micro, 2)}
    if stage.categories:
        meta = json.loads((trees / "ytvos/train/meta.json").read_text())
        objects = [o for v in meta["videos"].values() for o in v["objects"].values()]
        given["stages.0.categories"] = sorted({o["category"] for o in objects})
    return given | {"watch.clips": 1}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CLIPS)
def test_a_published_training_runs_and_resumes(name, trees, tmp_path, one_thread):
    from rvos_nb.train.loop import train

    given, plain = make_small(name, trees), {"trackers": ()}
    train(name, tmp_path / "a", given=given, device="cpu", **plain).check()
    train(name, tmp_path / "b", given=given, device="cpu", minutes=0, **plain).check()
    assert zoo.read_card(tmp_path / "b/model")["card"]["steps"] == 1
    train(name, tmp_path / "b", given=given, device="cpu", **plain).check()
    weights = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_a_fine_tuning_without_a_start_says_so(trees):
    from rvos_nb.train.trainer import Trainer

    given = make_small("train-soc-a2d", trees) | {"fresh": ["class_embed"]}
    with pytest.raises(Problem, match=r"recipe, start.*-p start FOLDER"):
        Trainer(read_recipe("train-soc-a2d", given))


def test_a_fine_tuning_goes_on_from_its_start_but_for_the_class_heads(trees, tmp_path, one_thread):
    from rvos_nb.train.trainer import Trainer

    with torch.random.fork_rng():
        first = Trainer(read_recipe("train-soc-refcoco", make_small("train-soc-refcoco", trees)))
        zoo.save(first.model, tmp_path / "start", {})
        given = make_small("train-soc-a2d", trees) | {"model": {}, "start": str(tmp_path / "start")}
        later = Trainer(read_recipe("train-soc-a2d", given | {"fresh": ["class_embed"], "seed": 1}))
    ours, given = later.model.state_dict(), first.model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], given[name])}
    assert changed and all("class_embed" in name for name in changed)


# The plan of a recipe


SEEN = {"stages.0.frames": 2, "stages.0.sizes": [64], "stages.0.long": 96, "watch.clips": 1}


@pytest.mark.parametrize(
    "name",
    ["train-referformer-ytvos", "train-soc-a2d", "train-mutr-joint", "train-wavecl-ytvos"],
)
def test_a_plan_leaves_nothing_behind_and_tells_what_a_step_holds(name, one_thread):
    "With Video-Swin, whose tables are remembered; a real step after the plan holds as much."
    from contextlib import nullcontext
    from functools import partial

    from rvos_nb.models.family import find_family
    from rvos_nb.train import plan

    family = read_recipe(name).family
    model = NARROW | OWN[family] | {"backbone": "video_swin_t_p4w7", "text": TEXT}
    recipe = read_recipe(name, SEEN | {"model": model, "text": "", "fresh": []})
    told = plan.measure_peak(recipe, 1, 2, (64, 96))
    settings = plan.sketch_settings(recipe)
    with torch.random.fork_rng():
        real = find_family(family).model(find_family(family).config(**settings)).train()
        for part in recipe.tuning.frozen:
            getattr(real, part).requires_grad_(False)
        run = partial(plan.rehearse_sentences, clips=1, frames=2, size=(64, 96))
        true = plan.rehearse_step(real, run, nullcontext())
    assert told == pytest.approx(true, rel=0.03)
    assert all(p.grad.isfinite().all() for p in real.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "name", ["train-referformer-joint", "train-aot-pre", "train-uninext-ytvos"]
)
def test_a_plan_needs_neither_data_nor_weights(name, monkeypatch):
    from rvos_nb.train import plan

    memory = plan.MemoryEstimate(1, 2, 3, 4, 5)
    monkeypatch.setattr(plan, "estimate_memory", lambda recipe: memory)
    recipe = read_recipe(name)
    made = plan.make_plan(recipe)
    assert all(
        f"-p {source.name.split(',')[0]} FOLDER" in source.missing for source in made.sources
    )
    assert any("no start" in remark for remark in made.remarks)
    trained = [group for group in made.groups if group.name != "frozen"]
    assert {g.rate for g in trained} == {
        recipe.tuning.lr * factor
        for factor in {1.0, *recipe.tuning.groups.values()}
        if factor == 1 or any(g.rate == recipe.tuning.lr * factor for g in trained)
    }
    assert "MISSING" in str(made) and f"{memory.total / 1e6:.1f} MB" in str(made)


@pytest.mark.parametrize(
    "recipe, given, said",
    [
        ("train-toy", {"start": "aot-tiny"}, "aot-tiny: found a aot"),
        ("train-toy", {"trunk": "aot-tiny"}, "reads no sentences"),
        ("train-toy", {"trunk": "aot-tiny", "start": "referformer-tiny"}, "one of the two"),
    ],
    ids=str,
)
def test_a_plan_refuses_what_it_could_not_begin_at(recipe, given, said):
    from rvos_nb.train.plan import make_plan

    with pytest.raises(Problem, match=said):
        make_plan(read_recipe(recipe, given))


def test_a_plan_names_the_file_that_a_backbone_begins_at():
    from rvos_nb.train.plan import list_remarks

    (remark,) = list_remarks(read_recipe("train-toy", {"start": "swin.pth"}))
    assert "swin.pth, which must lie here" in remark


def test_a_plan_counts_data_that_are_there(trees):
    from rvos_nb.train.plan import describe_stage, list_sources
    from rvos_nb.train.recipe import place_stages

    recipe = read_recipe("train-soc-joint", {n: str(trees / n) for n in ("refcoco", "ytvos")})
    (stage,) = place_stages(recipe)
    sources = list(list_sources(recipe, recipe.stages[0]))
    assert len(sources) == 4 and not any(source.missing for source in sources)
    samples = sum(int(source.counts.split(", ")[2].split()[0]) for source in sources)
    assert stage.count_steps() == 30 * -(-samples // 8)
    assert f"30 epochs, {stage.count_steps()} steps" in describe_stage(stage)


def test_the_command_says_what_would_be_done(tmp_path, monkeypatch, capsys):
    from rvos_nb.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["train", "--dry", "train-toy", "-p", "seed", "7", "--steps", "20"])
    said, told = capsys.readouterr()
    assert not e.value.code and "seed 7; nothing is trained" in said and "12 steps" in said
    assert not list(tmp_path.iterdir())
    told = told.splitlines()
    first = ["reading the recipe", "looking for the data", "building the model, without weights"]
    assert told[:3] == [f"{line} ..." for line in first]
    assert told[3] == "rehearsing a step, as it stands ..." and len(told) > 4


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_plan_that_is_ended_says_that_nothing_was_made(number, code, monkeypatch, capsys):
    from rvos_nb.cli import main
    from rvos_nb.train import plan

    monkeypatch.setattr(plan, "list_ways", lambda *_: signal.raise_signal(number))
    with pytest.raises(SystemExit) as e:
        main(["train", "--dry", "train-toy"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == code and last.startswith("rvos: ended by ")
    assert last.endswith("; nothing was made")


def test_a_group_that_matches_nothing_is_seen_in_the_plan():
    from rvos_nb.train import plan

    groups = {"backbon.0": 0.5, "transformer": 0.5}
    given = {"tuning.groups": groups, "tuning.no_decay": ["norm", "layernrm"]}
    recipe = read_recipe("train-toy", given)
    rows = plan.list_groups(plan.sketch_modules(recipe), recipe.tuning)
    empty = {row.name: row.describe() for row in rows if not row.tensors}
    assert empty == dict.fromkeys(["backbon.0", "layernrm (no_decay)"], "matches nothing")
    memory = plan.MemoryEstimate(1, 1, 1, 1, 1)
    lines = [*plan.Plan(recipe, [], [], rows, [plan.Way("", memory)], []).list_lines()]
    (line,) = (line for line in lines if "backbon.0" in line)
    assert " 0 tensors" in line and line.endswith("matches nothing")
    published = read_recipe("train-uninext-ytvos")
    assert [g.name for g in plan.list_unmatched(plan.sketch_modules(published), published.tuning)]


def test_a_batch_too_large_says_what_fits(tmp_path, monkeypatch):
    from rvos_nb.train.loop import train
    from rvos_nb.train.trainer import Trainer

    def run_out(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "one_step", run_out)
    (said,) = train("train-toy", tmp_path / "out", device="cpu").failed.values()
    assert "training step 0: found out of memory" in said
    for setting in ("stages.0.micro 1", "recompute true"):
        assert f"-p {setting}" in said


# What is wrong with a recipe, its data or its start


@pytest.mark.parametrize(
    "given, said",
    [
        ({"recompte": True}, "recompte .did you mean 'recompute'"),
        ({"tuning.drop_epoch": [3]}, "drop_epoch .did you mean 'drop_epochs'"),
        ({"stages.0.epoch": 3}, "epoch .did you mean 'epochs'"),
        ({"ytvo": "x"}, "ytvo"),
        ({"loss.wieghts": {}}, "wieghts"),
        ({"stages.0.micro": 3}, "micro"),
        ({"tuning.drop_epochs": [30]}, "drop_epochs"),
        ({"start": "referformer-tiny"}, "a referformer.*expected a soc"),
        ({"start": "aot-tiny"}, "a aot.*expected a soc"),
        ({"start": "runs/nowhere"}, "nowhere"),
        ({"ytvos": ""}, "-p NAME FOLDER"),
        ({"ytvos": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_before_the_first_step(given, said, trees, tmp_path):
    from rvos_nb.train.loop import train

    whole = make_small("train-soc-ytvos", trees)
    if "ytvos" in given:
        del whole["stages.0.steps"]
    with pytest.raises(Exception, match=rf"(?s){said}") as e:
        train("train-soc-ytvos", tmp_path / "out", given=whole | given, device="cpu").check()
    assert all(word in str(e.value) for word in ("found", "expected"))


@pytest.mark.parametrize(
    "recipe, given, meant",
    [
        ("train-toy", {"loss.pixl": 0.0}, "pixel"),
        ("train-toy", {"loss.weights": {"ce": 2, "bbx": 5}}, "bbox"),
        ("train-toy", {"model.hiden_dim": 32}, "hidden_dim"),
        ("train-toy", {"model.text.hidden_sze": 32}, "hidden_size"),
        ("train-toy", {"model.backbone": "conv_tny"}, "conv_tiny"),
        ("train-toy", {"model.backbone_options": {"widht": [8]}}, "widths"),
        ("train-toy", {"tuning.warm_up": 0.1}, "warmup"),
        ("train-toy", {"lora.rnk": 4}, "rank"),
        ("train-toy", {"watch.evry": 5}, "every"),
        ("train-toy", {"stages.0.stps": 5}, "steps"),
        ("train-toy", {"stages.0.source": "refshape"}, "refshapes"),
        ("train-toy", {"family": "referformr"}, "referformer"),
        ("train-toy", {"modl.hidden_dim": 32}, "model"),
        ("train-toy", {"stages.0.levels": {"eazy": 1}}, "easy"),
        ("train-toy", {"stages.0.kinds": {"motions": 1}}, "motion"),
        ("train-toy", {"precision": "bf61"}, "bf16"),
        ("train-tyo", {}, "train-toy"),
        ("train-soc-ytvos", {"data.ytvo": "x"}, "ytvos"),
        ("train-soc-ytvos", {"ytvo": "x"}, "ytvos"),
        ("train-soc-ytvos", {"stages.0.sources": [{"folder": "ytvos", "spilt": "x"}]}, "split"),
        ("train-soc-ytvos", {"loss.weights": {"clss": 2}}, "cls"),
        ("train-aot-pre", {"loss.hold_identitys": True}, "hold_identities"),
        ("train-aot-pre", {"model.drop_pth": 0.0}, "drop_path"),
        ("train-aot-pre", {"model.variant": "aott-x"}, "aott"),
        ("train-aot-pre", {"imags": "x"}, "images"),
    ],
    ids=str,
)
def test_a_misspelt_name_is_refused_before_a_folder_is_made(recipe, given, meant, tmp_path):
    from rvos_nb.train.loop import train

    with pytest.raises(Problem, match=rf"did you mean '{meant}'\?"):
        train(recipe, tmp_path / "out", given=given, device="cpu")
    assert not (tmp_path / "out").exists()


CLIP_STAGE = {"source": "clips", "sources": [{"folder": "x"}]}
STILL = {"stages.0.frames": 1, "stages.1.frames": 1}


@pytest.mark.parametrize(
    "recipe, given, said",
    [
        ("train-toy", {"loss.motion": 1.0} | STILL, "loss, motion.*one frame.*set it to 0"),
        ("train-toy", {"loss.motion": 1.0, "stages": [CLIP_STAGE]}, "loss, motion.*clips of data"),
        ("finetune-own", {"loss.motion": 1.0, "start": "referformer-tiny"}, "loss, motion"),
        ("train-toy", {"watch.data": "x"}, "watch, data.*leave it out"),
        ("train-toy", {"watch.size": [33, 48]}, "watch, size.*divisible by 8"),
        ("train-toy", {"tuning.warmup": 200}, "tuning, warmup.*from 0 to 1"),
        ("train-toy", {"tuning.ema": 1.5}, "tuning, ema.*from 0 to 1"),
        ("train-toy", {"tuning.schedule": "step", "tuning.drop_epochs": [1]}, "use drops"),
        ("train-toy", {"name": "../x"}, "train-toy, name.*one plain path component"),
        ("train-toy", {"stages.0.span": "long"}, "span: found 'long'; expected a whole number"),
        ("train-toy", {"stages.0.resize": 64}, "resize: found 64; expected height and width"),
        ("train-toy", {"stages.0.size": [64, 96], "stages.0.resize": [64, 64]}, "resize.*64, 96"),
        ("train-toy", {"stages.0.kinds": {"motion": 1}}, "no scene of .'easy'. offers.*appearance"),
        ("train-toy", {"stages.0.kinds": {"appearance": True}}, "kinds"),
        ("train-toy", {"loss.weights.ce": 1}, "no loss.weights in the recipe.*all settings"),
        ("train-aot-tiny", {"trunk": "referformer-tiny"}, "trunk.*leave it out"),
        ("train-aot-tiny", {"text": "roberta-base"}, "text.*leave it out"),
        ("train-aot-tiny", {"stages.0.resize": [96, 144]}, "stage 1, resize.*leave it out"),
        ("train-aot-tiny", {"stages.1.one_frame": True}, "stage 2, one_frame.*leave it out"),
    ],
    ids=str,
)
def test_what_cannot_have_its_effect_is_refused_before_a_folder_is_made(
    recipe, given, said, tmp_path
):
    from rvos_nb.train.loop import train

    with pytest.raises(Problem, match=said) as e:
        train(recipe, tmp_path / "out", given=given, device="cpu")
    assert all(word in str(e.value) for word in ("found", "expected"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "trunk, said",
    [
        ("runs/nowhere", "runs/nowhere: found no checkpoint"),
        ("aot-tiny", "aot-tiny: found a aot, which reads no sentences"),
        ("swin.pth", "swin.pth: found a file of weights.*-p start FILE"),
    ],
)
def test_a_trunk_that_cannot_be_one_is_named(trunk, said):
    from rvos_nb.train.refer import build_referring

    with pytest.raises(Problem, match=said):
        build_referring(read_recipe("train-toy", {"trunk": trunk}))


def test_settings_of_a_trunk_that_its_heir_cannot_have_are_left_behind():
    "The tiny ReferFormer has no longest side; a UNINEXT must have one."
    from rvos_nb.train.refer import gather_settings

    settings = gather_settings(read_recipe("train-uninext-toy", {"trunk": "referformer-tiny"}))
    assert "long_side" not in settings and settings["text"]["model_type"] == "bert"


def test_a_picture_leaves_the_heads_of_motion_without_a_gradient():
    from rvos_nb.train.trainer import Trainer, has_unused

    motion = {"loss.motion": 1.0}
    mixed = Trainer(read_recipe("train-toy", motion))
    clips = Trainer(read_recipe("train-toy", motion | {"stages.0.frames": 2}))
    assert "motion.heads" in mixed.task.unused_parts and has_unused(mixed.task)
    assert "motion.heads" not in clips.task.unused_parts


def test_settings_that_a_recipe_leaves_out_can_be_given():
    assert read_recipe("train-toy", {"lora.rank": 4}).lora.rank == 4


SWIN = {"backbone": "swin_t_p4w7", "backbone_options": {}}
CONVNEXT = {"backbone": "convnext_large"}
CONVNEXT["backbone_options"] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


@pytest.mark.parametrize(
    "family, model, unused",
    [
        ("referformer", {}, []),
        ("referformer", SWIN, []),
        ("soc", {}, []),
        ("wavecl", {}, []),
        ("mutr", {}, ["text_encoder.pooler.dense.bias", "text_encoder.pooler.dense.weight"]),
        ("uninext", {}, []),
        ("uninext", SWIN, ["backbone.0.body.norm0.bias", "backbone.0.body.norm0.weight"]),
        ("uninext", CONVNEXT, ["backbone.0.norm_layers.0.bias", "backbone.0.norm_layers.0.weight"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("seen", [True, False], ids=["an object", "none"])
def test_parameters_without_a_gradient_are_known(family, model, unused, seen):
    "Several processes wait for the gradient of every other one."
    from rvos_nb.data.clips import Stream
    from rvos_nb.train.trainer import Trainer, has_unused

    stage = {"steps": 1, "frames": 2, "clips": 1, "size": [32, 64]}
    settings = {"name": "toy", "family": family, "model": NARROW | OWN.get(family, {}) | model}
    trainer = Trainer(read_recipe(settings | {"stages": [stage]}))
    ((part, batch),) = Stream("refer", 0, trainer.recipe.stages)[0]
    if not seen:
        empty = {name: 0 * getattr(batch, name) for name in ("masks", "boxes", "valid")}
        batch = replace(batch, **{k: x.astype(getattr(batch, k).dtype) for k, x in empty.items()})
    trainer.one_step([(part, batch)])
    trained = {n: p for n, p in trainer.task.modules.named_parameters() if p.requires_grad}
    found = sorted(n.removeprefix("model.") for n, p in trained.items() if p.grad is None)
    assert found == unused and has_unused(trainer.task) == bool(unused)


@pytest.mark.parametrize("hold", [True, False], ids=["held", "free"])
def test_the_bank_of_identities_that_are_held_gets_no_gradient(hold):
    from rvos_nb.data.clips import Stream
    from rvos_nb.train.trainer import Trainer, has_unused

    stage = {"steps": 2, "frames": 3, "clips": 1, "size": [32, 48], "levels": {"medium": 1}}
    given = {"stages": [stage], "loss.hold_identities": hold, "loss.own": 0.5}
    trainer = Trainer(read_recipe("train-aot-tiny", given))
    for batches in Stream("sequence", 0, trainer.recipe.stages):
        trainer.one_step(batches)
    parameters = trainer.task.modules.named_parameters()
    unused = {n for n, p in parameters if p.requires_grad and p.grad is None}
    assert all("patch_wise_id_bank" in name for name in unused)
    assert bool(unused) == has_unused(trainer.task) == hold
