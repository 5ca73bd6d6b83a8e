"""SOC, MUTR and WaveCL beyond the golden cases: published files of every edition, clips that mix as
published, tiny ones that learn a clip by heart, and every stage that takes a model."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TREES, make, record_validation, write_a2d

from rvos_nb.core import Problem
from rvos_nb.data import scenes
from rvos_nb.data.clips import draw_refer_batch
from rvos_nb.data.datasets import open_dataset
from rvos_nb.evaluate import evaluate
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.metrics import j_and_f
from rvos_nb.models import catalogue, zoo
from rvos_nb.models.convert import convert, recognise
from rvos_nb.models.family import find_family
from rvos_nb.models.mutr import MUTR, tiny_mutr
from rvos_nb.models.referring import choose_query
from rvos_nb.models.soc import SOC, tiny_soc
from rvos_nb.models.text import make_tokenizer, small_text_config
from rvos_nb.models.wavecl import WaveCL, WaveCLConfig, tiny_wavecl
from rvos_nb.predict import predict
from rvos_nb.protocols import run_protocol
from rvos_nb.train.loop import Trainer
from rvos_nb.train.recipe import read_recipe
from rvos_nb.verify.cases import compare, load_case, load_filled
from rvos_nb.verify.mutr import build_mutr_case
from rvos_nb.verify.referformer import pad_clips
from rvos_nb.verify.soc import build_soc_case, read_case_text

GOLDEN = Path(__file__).parent / "golden"
TINY = {"soc": (SOC, tiny_soc), "mutr": (MUTR, tiny_mutr), "wavecl": (WaveCL, tiny_wavecl)}
each = pytest.mark.parametrize("family", list(TINY))


def tiny(family, tokenizer=None, **changes):
    "A random one, whose heads answer something."
    torch.manual_seed(0)
    cls, config = TINY[family]
    tokenizer = tokenizer or make_tokenizer(scenes.WORDS)
    return cls(config(len(tokenizer), **changes), tokenizer).eval()


# Clips that mix, as published


@pytest.mark.parametrize(
    "name, build",
    [("soc/video_swin_t_train", build_soc_case), ("mutr/resnet50_batch", build_mutr_case)],
)
def test_clips_mix_as_published_where_asked(name, build):
    case = load_case(GOLDEN / f"{name}.npz")
    inputs, published = case.meta["inputs"], case.meta["extra"]
    model = build(case.meta).eval()
    model.config.mixes_clips = True
    frames, mask, sizes = pad_clips(inputs)
    soc = name.startswith("soc")
    with torch.inference_mode():
        load_filled(model, case.meta, case.arrays)
        text = read_case_text(model, case.arrays)
        out = model(frames, mask, *text, sizes, aux=inputs["training"])
    answers = {n: case.arrays[f"extra/{n}"] for n in published if "/out" not in n}
    turned = {n: x.transpose(0, 1) if soc else x for n, x in out.items() if n.startswith("pred_")}
    ours = {f"as_published/pred/{n}": x for n, x in turned.items()}
    if soc:
        ours["as_published/pred/video_object"] = out["pred_video"]
        ours["as_published/pred/text_sentence_feature"] = out["text_feature"]
    else:
        ours["as_published/pred/reference_points"] = out["reference_points"]
    record = dataclasses.replace(case, answers=answers, meta=case.meta | {"outputs": published})
    verdict = compare(record, ((n, x.numpy()) for n, x in ours.items()))
    assert verdict.ok, str(verdict)


# Published files


def published_state(model, renames):
    "What a training script of the field saves: with second names, integers, another prefix."
    state = dict(model.state_dict())
    for new, old in renames.items():
        state = {old + n[len(new) :] if n.startswith(new) else n: t for n, t in state.items()}
    return state | {"text_encoder.embeddings.position_ids": torch.arange(514)[None]}


def check_converted(model, file, folder, words, family):
    found = convert(file, folder, tokenizer=words)
    assert found.found.family == family
    loaded = zoo.load(folder)
    assert type(loaded) is type(model)
    frames = torch.randint(0, 256, (5, 64, 96, 3), dtype=torch.uint8)
    for m in (model, loaded):
        m.config.short_side, m.config.long_side = 64, 640
        m.config.answer_layer = 0
    a, b = (m.refer(m.see(frames), ["the red circle"]) for m in (model, loaded))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.scores, b.scores)
    return found


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    make_tokenizer(scenes.WORDS).save_pretrained(folder)
    return folder


SMALL = {
    "video_dropout": 0.1,
    "num_classes": 65,
    "nheads": 8,
    "hidden_dim": 64,
    "enc_n_points": 1,
    "dec_n_points": 1,
}
SMALL |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "fusion_heads": 8}
SMALL |= {"proj_groups": 32, "fpn_groups": 8, "video_enc_layers": 3, "video_dec_layers": 3}
OWN = {"soc": {"hidden_dim": 128}, "mutr": {"video_dropout": 0.2}, "wavecl": {"hidden_dim": 128}}


@pytest.mark.parametrize(
    "family, edition",
    [
        (family, edition)
        for family in TINY
        for edition in ("first", "renamed", "average", "bare", "module")
        if edition != "renamed" or find_family(family).renames
    ],
)
def test_published_files_of_every_edition(family, edition, words, tmp_path):
    text = small_text_config(len(make_tokenizer(scenes.WORDS)), heads=1, positions=38)
    model = tiny(family, **SMALL | OWN[family], text=text)
    renames = find_family(family).renames if edition == "renamed" else {}
    state = published_state(model, {ours: theirs for theirs, ours in renames.items()})
    other = {n: t + 1 if t.is_floating_point() else t for n, t in state.items()}
    training = {"optimizer_state_dict": {"state": {}}, "scheduler_state_dict": {}, "best_mAP": 0.5}
    training |= {"grad_scaler_state_dict": {}, "total_epochs": 30, "epoch": 29}
    training |= {"args": argparse.Namespace(nheads=8)}
    file = {
        "first": {"model_state_dict": state} | training,
        "renamed": {"model_state_dict": state} | training,
        "average": {"model_state_dict": other, "ema_model_state_dict": state} | training,
        "bare": state,
        "module": {"model": {f"module.{n}": t for n, t in state.items()}} | training,
    }[edition]
    torch.save(file, tmp_path / "published.pth")
    found = check_converted(model, tmp_path / "published.pth", tmp_path / "out", words, family)
    config = json.loads((tmp_path / "out/config.json").read_text())["config"]
    assert config["num_classes"] == 65 and config["answer_layer"] == 0
    assert "integers that the model computes" in found.dropped
    assert ("counters of normalisation" in found.dropped) == (family == "wavecl")


@each
def test_a_file_that_lacks_a_part(family, words, tmp_path):
    state = tiny(family).state_dict()
    del state["controller.layers.2.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(Problem, match=rf"checkpoint of {family} without .*controller"):
        convert(tmp_path / "part.pth", tmp_path / "out", tokenizer=words)
    assert not (tmp_path / "out").exists()


# Learning


@each
def test_a_tiny_one_learns_a_clip_by_heart(family):
    "From random weights to J&F ≥ 95 on four frames: losses, matching and heads agree."
    options = dataclasses.asdict(TINY[family][1](len(make_tokenizer(scenes.WORDS))))
    recipe = {
        "name": "by-heart",
        "family": family,
        "model": options,
        "stages": [{"steps": 120, "frames": 4, "clips": 1, "size": [64, 96]}],
        "tuning": {"lr": 2.0e-3, "warmup": 0.05, "clip": 1.0},
        "loss": {"pixel": 1.0},
    }
    recipe = read_recipe(recipe)
    trainer = Trainer(recipe)
    batch = draw_refer_batch(7, 0, recipe.stages[0], augment=False)
    for _ in range(120):
        trainer.one_step([(0, batch)])
    model = trainer.model.eval()
    seen = model.see(batch.frames[0], short_side=64)
    found = model.refer(seen, batch.texts)
    scores = [
        np.mean(j_and_f(found.masks(e).numpy(), batch.masks[e])) for e in range(len(batch.texts))
    ]
    assert np.mean(scores) >= 0.95, scores


@each
def test_validation_scores_what_refer_answers(family, monkeypatch):
    "Not the last layer, nor closed windows, as losses do."
    options = dataclasses.asdict(TINY[family][1](len(make_tokenizer(scenes.WORDS)), answer_layer=0))
    recipe = {"name": "watched", "family": family, "model": options}
    recipe["stages"] = [{"steps": 1, "frames": 6, "clips": 1, "size": [64, 96]}]
    trainer = Trainer(read_recipe(recipe))
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0], augment=False)
    query, masks = record_validation(trainer, batch, monkeypatch)
    model = trainer.model.eval()
    found = model.refer(model.see(batch.frames[0], short_side=64), batch.texts)
    e, t = torch.arange(len(batch.texts))[:, None], torch.arange(6)
    chosen = masks[e, t, query]
    scale = found.logits.abs().max().item()
    assert torch.allclose(chosen, found.logits, rtol=1e-3, atol=1e-3 * scale)


# Every stage that takes a model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data"), "ref-youtube-vos", "valid", frames=6)


@each
def test_predicted_like_any_other(family, data, tmp_path):
    zoo.save(tiny(family), tmp_path / "model", {})
    predict(data, tmp_path / "run", str(tmp_path / "model"), clip_length=4).check()
    again = predict(data, tmp_path / "again", str(tmp_path / "model"), clip_length=4)
    again.check()
    pairs = [
        (p, tmp_path / "again" / p.relative_to(tmp_path / "run"))
        for p in (tmp_path / "run").rglob("*.png")
    ]
    assert pairs and all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    for policy in ("score", "best_nonempty"):
        frames = choose_key_frames(tmp_path / "run", policy)
        assert all(
            0 <= e["index_info"]["class_index"] < 6 for es in frames.values() for e in es.values()
        )
    assert 0 <= evaluate(data, tmp_path / "run", tmp_path / "scores")["J&F"] <= 100


@each
def test_every_query_of_a_single_frame(family, tmp_path):
    data = write_a2d(tmp_path / "a2d")
    zoo.save(tiny(family), tmp_path / "model", {})
    report, lines = run_protocol(data, tmp_path / "run", str(tmp_path / "model"))
    report.check()
    assert "mAP" in lines
    frame = torch.randint(0, 256, (3, 70, 90, 3), dtype=torch.uint8)
    answer = tiny(family).respond(frame, ["the red circle", "it"], at=1, short_side=62)
    assert answer.scores.shape == (2, 5 if family == "mutr" else 8)
    assert answer.padded == ((64, 96) if family == "mutr" else answer.inner)


@pytest.mark.parametrize("layout", TREES)
def test_wavecl_answers_every_benchmark(layout, tmp_path):
    "Ref-YouTube-VOS is asked like any other, see above; eight frames as its authors ask A2D."
    data = TREES[layout](tmp_path / "data")
    length = 1 if layout == "refcoco" else 8
    model = tiny("wavecl", short_side=64, long_side=80)
    report, lines = run_protocol(data, tmp_path / "run", model, clip_length=length)
    report.check()
    if layout == "ref-davis17":
        assert lines.count("anno_") == 4 and "mean" in lines
        return
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(results) == 8 * len(open_dataset(data, ""))
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 <= scores["mask"]["oIoU"] <= 100 and ("box" in scores) == (layout == "refcoco")


def test_a_single_frame_is_as_long_as_its_model_wants():
    frame = torch.randint(0, 256, (1, 60, 120, 3), dtype=torch.uint8)
    for long_side, inner in ((None, (96, 192)), (160, (80, 160))):
        model = tiny("wavecl", long_side=long_side)
        assert model.respond(frame, ["it"]).inner == inner
    assert model.respond(frame, ["it"], long_side=100).inner == (50, 100)


WAVECL_RECIPES = {  # backbone, classes, sides of a frame in evaluation
    "wavecl-video-swin-t-scratch": ("video_swin_t_p4w7", 65, 360, None),
    "wavecl-video-swin-t-refcoco": ("video_swin_t_p4w7", 1, 360, 640),
    "wavecl-video-swin-t": ("video_swin_t_p4w7", 1, 360, None),
    "wavecl-video-swin-t-a2d-scratch": ("video_swin_t_p4w7", 1, 320, 576),
    "wavecl-video-swin-t-a2d": ("video_swin_t_p4w7", 1, 320, 576),
    "wavecl-video-swin-b-joint": ("video_swin_b_p4w7", 1, 360, None),
}


def test_models_of_the_published_recipes_of_wavecl():
    "What its tables of configurations and recipes say, from the tensors and the name."
    names = [row["name"] for row in catalogue.published_models("wavecl")]
    assert sorted(names) == sorted(WAVECL_RECIPES)
    for name, (backbone, classes, *sides) in WAVECL_RECIPES.items():
        with torch.device("meta"):
            state = WaveCL(WaveCLConfig(backbone=backbone, num_classes=classes)).state_dict()
        found = recognise(state, model=name)
        config = WaveCLConfig(**found.config)
        assert found.variant == name and config.backbone == backbone
        assert (config.num_classes, config.short_side, config.long_side) == (classes, *sides)
        assert (config.num_queries, config.hidden_dim, config.num_feature_levels) == (20, 256, 4)
        assert (config.enc_layers, config.dec_layers, config.answer_layer) == (3, 3, 0)
        assert (config.video_enc_layers, config.video_dec_layers) == (3, 3)
        assert (config.nheads, config.enc_n_points, config.dec_n_points) == (8, 4, 4)
        assert config.with_box_refine and config.rel_coord and config.mask_dim == 8


@each
def test_any_size_and_length_is_answered(family):
    model = tiny(family)
    for size, frames in (((40, 300), 1), ((300, 40), 2), ((64, 96), 9), ((97, 33), 5)):
        clip = torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8)
        found = model.refer(
            model.see(clip), ["the red circle", "a large blue square that moves up"]
        )
        assert found.masks(1).shape == (frames, *size) and found.logits.isfinite().all()


@each
def test_parts_of_a_clip_within_memory(family):
    model = tiny(family)
    needed = [model.memory_needed(n, (96, 144), 3) for n in (1, 10, 100)]
    assert needed == sorted(needed)
    longest = model.frames_within(needed[1], (96, 144), 3)
    assert longest >= 10
    with pytest.raises(Problem, match="memory"):
        model.frames_within(10**6, (96, 144), 3)


@each
def test_many_sentences_are_answered_as_each_alone(family):
    model, texts = tiny(family), ["the red circle", "a small blue square on the left", "square"]
    seen = model.see(torch.randint(0, 256, (5, 64, 96, 3), dtype=torch.uint8))
    whole = model.refer(seen, texts)
    for e, text in enumerate(texts):
        alone = model.refer(seen, [text])
        scale = alone.logits.abs().max().item()
        assert torch.allclose(whole.logits[e], alone.logits[0], rtol=1e-3, atol=1e-3 * scale)
        assert torch.allclose(whole.scores[e], alone.scores[0], atol=1e-4)


def test_the_answer_layer_is_the_published_one_by_default():
    for family in TINY:
        model = tiny(family, answer_layer=0)
        for head in model.bbox_embed:
            torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
        frames = torch.randn(1, 5, 3, 64, 96)
        with torch.inference_mode():
            text = model.encode(["the red circle"])
            plain, every = model(frames, None, *text), model(frames, None, *text, aux=True)
        assert "aux_outputs" not in plain
        first = every["aux_outputs"][0]
        assert plain["pred_masks"].shape == first["pred_masks"].shape
        same = [torch.equal(plain[n], first[n]) for n in ("pred_boxes", "pred_logits")]
        assert same == [family == "mutr", False]
        assert choose_query(plain["pred_logits"]).shape == (1,)
        assert find_family(family).config().answer_layer == 0


@each
@pytest.mark.parametrize("layer", [2, -3, "last"])
def test_a_layer_that_the_decoder_lacks_is_named(family, layer):
    with pytest.raises(Problem, match="answer_layer"):
        TINY[family][1](30, answer_layer=layer)
