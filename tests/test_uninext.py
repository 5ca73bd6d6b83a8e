"""UNINEXT beyond the golden cases: published files of every backbone, frames of any size, sentences
as its loader cleans them, training, and every stage that takes a model."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make, record_validation
from torch import nn
from transformers import BertTokenizerFast

from rvos_nb.candidates import load_candidates
from rvos_nb.core import Problem
from rvos_nb.data import scenes
from rvos_nb.data.clips import draw_refer_batch
from rvos_nb.data.masks import read_mask
from rvos_nb.metrics import j_and_f
from rvos_nb.models import zoo
from rvos_nb.models.backbones import build_backbone
from rvos_nb.models.convert import convert, recognise
from rvos_nb.models.family import adopt_tensors, find_family
from rvos_nb.models.files import split_published
from rvos_nb.models.text import BERT_BASE, make_tokenizer
from rvos_nb.models.uninext import FAMILY, UNINEXT, UNINEXTConfig, tiny_uninext
from rvos_nb.predict import predict
from rvos_nb.protocols import run_protocol
from rvos_nb.train.assignment import AssignmentCriterion, assign_queries
from rvos_nb.train.loop import Trainer, train
from rvos_nb.train.losses import box_corners
from rvos_nb.train.recipe import read_recipe, trainable_families
from rvos_nb.verify.cases import load_case

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["the red circle", "a small blue square on the left", "square"]


def make_answer(model: UNINEXT) -> UNINEXT:
    "Box heads that move boxes, so that something depends on them."
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    return model.eval()


def tiny(**changes) -> UNINEXT:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(scenes.WORDS)
    return make_answer(UNINEXT(tiny_uninext(len(tokenizer), **changes), tokenizer))


def noise(frames: int, h: int, w: int):
    return torch.randint(0, 256, (frames, h, w, 3), dtype=torch.uint8)


# Answers


def test_any_size_and_length_is_answered():
    model = tiny()
    for size, frames in (((40, 300), 1), ((300, 40), 2), ((64, 96), 9), ((97, 33), 3)):
        found = model.refer(model.see(noise(frames, *size)), TEXTS[:2])
        assert found.kind == "probability" and found.size == size
        assert tuple(found.logits.shape[2:]) == model.input_size(size)
        assert found.masks(1).shape == (frames, *size)
        assert found.logits.min() >= 0 and found.logits.max() <= 1 and found.logits.isfinite().all()


def test_a_picture_of_few_tokens_has_few_queries():
    model = tiny(num_queries=100)
    assert model.respond(noise(1, 32, 32), TEXTS, short_side=32).scores.shape == (3, 21)
    assert model.respond(noise(1, 96, 96), TEXTS, short_side=96).scores.shape == (3, 100)


def test_frames_and_sentences_are_answered_as_each_alone():
    model, frames = tiny(), noise(4, 64, 100)
    whole = model.refer(model.see(frames), TEXTS)
    for e, text in enumerate(TEXTS):
        for t in range(4):
            alone = model.refer(model.see(frames[t : t + 1]), [text])
            assert torch.allclose(whole.logits[e, t], alone.logits[0, 0], atol=1e-3)
            assert torch.allclose(whole.scores[e, t], alone.scores[0, 0], atol=1e-4)


def test_padding_is_not_part_of_the_picture():
    "Boxes are fractions of the frame, whatever is padded: 97 pixels become 128."
    model = tiny()
    answer = model.respond(noise(1, 96, 97), TEXTS[:1])
    assert answer.inner == (96, 97) and answer.padded == (96, 128)
    assert tuple(answer.logits.shape) == (1, 20, 24, 32)


def test_sentences_are_cleaned_and_refused_as_published():
    model = tiny()
    seen = model.see(noise(1, 64, 96))
    plain, marked = (model.refer(seen, [t]) for t in ("the red circle", "The (red) circle!?"))
    assert torch.equal(plain.logits, marked.logits)
    for text in ("", "?!", "red " * 50):
        with pytest.raises(Problem):
            model.check_sentence(text)


def test_parts_of_a_clip_within_memory():
    model = tiny()
    needed = [model.memory_needed(n, (96, 144), 3) for n in (1, 10, 100)]
    assert needed == sorted(needed)
    assert model.frames_within(needed[1], (96, 144), 3) >= 10
    with pytest.raises(Problem, match="memory"):
        model.frames_within(10**6, (96, 144), 3)


def test_half_precision_answers_the_same_masks():
    model, frames = tiny(), noise(2, 64, 96)
    whole = model.refer(model.see(frames), TEXTS)
    half = model.optimise("bfloat16").refer(model.see(frames), TEXTS)
    assert half.logits.dtype == torch.float32
    assert (whole.scores - half.scores).abs().max() < 0.02


# Training


def plain_iou(a: list[float], b: list[float]) -> tuple[float, float]:
    "IoU and generalised IoU of two boxes (x1, y1, x2, y2), in numbers."
    sides = [(min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    hull = [(max(a[i + 2], b[i + 2]) - min(a[i], b[i])) for i in (0, 1)]
    inter = max(sides[0], 0) * max(sides[1], 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    union = sum(areas) - inter
    return inter / union, inter / union - (hull[0] * hull[1] - union) / (hull[0] * hull[1])


def assign_plainly(scores: list[float], boxes: list, truth: list[float]) -> set[int]:
    "simOTA for one frame as its authors describe it: one query after another."
    x1, y1, x2, y2 = truth
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    costs, overlaps = [], []
    for p, box in zip(scores, boxes):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        inside = x1 < x < x2 and y1 < y < y2
        near = abs(x - middle[0]) < 2.5 / 32 and abs(y - middle[1]) < 2.5 / 32
        overlap, generalised = plain_iou(box, truth)
        cost = 0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p)
        cost += -3 * generalised + 100 * (not (inside and near)) + 10_000 * (not (inside or near))
        costs.append(cost)
        overlaps.append(overlap)
    k = max(int(sum(sorted(overlaps, reverse=True)[:10])), 1)
    return set(np.argsort(costs)[:k].tolist())


@pytest.mark.parametrize("queries", [3, 10, 40])
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_assignment_is_that_of_a_plain_loop(queries, spread):
    torch.manual_seed(queries)
    truth = 0.3 + 0.4 * torch.rand(4, 4)
    boxes = (truth[:, None] + spread * torch.randn(2, 4, queries, 4)).clamp(0.05, 0.95)
    logits, valid = 2 * torch.randn(2, 4, queries, 1), torch.tensor([True, True, False, True])
    right = assign_queries(logits, boxes, truth, valid)
    assert not right[:, 2].any() and right.shape == (2, 4, queries)
    scores, corners, wanted = logits[..., 0].sigmoid(), box_corners(boxes), box_corners(truth)
    counts = set()
    for layer in range(2):
        for n in (0, 1, 3):
            row = (scores[layer, n].tolist(), corners[layer, n].tolist(), wanted[n].tolist())
            found = set(right[layer, n].nonzero()[:, 0].tolist())
            assert found == assign_plainly(*row)
            counts.add(len(found))
    assert max(counts) <= 10 and (max(counts) > 1 or spread > 0.02)


RECIPE = {
    "name": "trained",
    "family": "uninext",
    "stages": [{"steps": 1, "frames": 3, "clips": 2, "sentences": 2, "size": [64, 72]}],
    "loss": {"pixel": 0.0},
}


def build_trainer(**changes) -> Trainer:
    "Of a tiny model; other settings of the recipe by name."
    options = dataclasses.asdict(tiny_uninext(len(make_tokenizer(scenes.WORDS))))
    return Trainer(read_recipe(RECIPE | {"model": options} | changes))


def test_a_tiny_one_learns_a_clip_by_heart():
    """From random weights to J&F ≥ 95: two sentences about four frames that are padded, without the
    pixel loss, so assignment, losses and heads are all there is."""
    stage = {"steps": 110, "frames": 4, "clips": 1, "sentences": 2, "size": [160, 240]}
    tuning = {"lr": 2.0e-3, "warmup": 0.05, "clip": 1.0}
    trainer = build_trainer(stages=[stage], tuning=tuning)
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0], augment=False)
    for _ in range(stage["steps"]):
        trainer.one_step([(0, batch)])
    model = trainer.model.eval()
    found = model.refer(model.see(batch.frames[0], short_side=160), batch.texts)
    scores = [np.mean(j_and_f(found.masks(e).numpy(), batch.masks[e])) for e in range(2)]
    assert len(set(batch.texts)) == 2 and np.mean(scores) >= 0.95, scores


def test_frames_without_a_referent_have_no_right_query():
    trainer = build_trainer()
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0])
    out = trainer.task.answer(batch)
    target = {k: torch.from_numpy(getattr(batch, k)) for k in ("boxes", "valid", "masks")}
    names = {"ce", "bbox", "giou", "boxiou", "mask", "dice"}
    for rows in (slice(1, 2), slice(None)):  # one frame of each sentence, then every frame
        target["boxes"][:, rows], target["valid"][:, rows] = 0, False
        target["masks"][:, rows] = False
        total, parts, right = AssignmentCriterion()(out, target)
        assert not right[:, :, rows].any() and total.isfinite()
        assert all(parts[f"loss_{n}{i}"].isfinite() for n in names for i in ("", "_0"))
    assert total == 0 and not right.any()
    total.backward()  # nothing to learn, and no number that is none
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_every_trained_parameter_learns():
    """All are reached. The head that embeds objects for tracking has a loss of its own, which is
    not here; a bias on attention's keys moves all scores of a row alike and has no effect."""
    trainer = build_trainer()
    model = make_answer(trainer.model).train()
    for name, p in model.named_parameters():  # zero at first: attention that looks at no position
        if re.search("sampling_offsets.weight|attention_weights.weight", name):
            nn.init.normal_(p, std=0.1)
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0])
    total, _ = trainer.task.loss(batch, 0.0)
    total.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(re.search(r"attention\.self\.key\.bias", n) for n in still), still
    with_head = build_trainer(model=dataclasses.asdict(model.config) | {"embed_layers": 1})
    total, _ = with_head.task.loss(batch, 0.0)
    total.backward()
    untrained = [n for n, p in with_head.model.named_parameters() if p.grad is None]
    assert untrained and all(n.startswith("reid_embed_head.") for n in untrained)


def test_validation_scores_what_refer_answers(monkeypatch):
    "The query of each frame, chosen by class and IoU, and its mask without padding."
    trainer = build_trainer()
    make_answer(trainer.model)
    batch = draw_refer_batch(7, 0, trainer.recipe.stages[0], augment=False)
    query, masks = record_validation(trainer, batch, monkeypatch)
    model, t = trainer.model.eval(), torch.arange(3)
    assert any(len(set(row)) > 1 for row in query.tolist())  # not one query for a whole clip
    for e, (clip, text) in enumerate(zip(batch.clip, batch.texts)):
        found = model.refer(model.see(batch.frames[clip], short_side=64), [text])
        assert torch.allclose(masks[e, t, query[e]].sigmoid(), found.logits[0], atol=1e-3)


def test_resume_equals_undisturbed(tmp_path):
    "Ten steps with the published optimizer, and the same ten with a pause after the first."
    train("train-uninext-toy", tmp_path / "a").check()
    torch.rand(7)  # the state of the global generator must not matter
    train("train-uninext-toy", tmp_path / "b", minutes=0).check()
    train("train-uninext-toy", tmp_path / "b").check()
    for name in ("model/model.safetensors", "run.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card = zoo.read_card(tmp_path / "a/model")["card"]
    assert card["steps"] == card["of_steps"] == 10 and "J easy" in card["quick_validation"]
    assert "uninext" in trainable_families()


def test_the_published_optimizer_has_its_groups():
    trainer = Trainer(read_recipe("train-uninext-toy"))
    factors = {p: g["factor"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.05}
    for name, p in trainer.task.model.named_parameters():
        slow = "backbone" in name or "sampling_offsets" in name
        wanted = None if name.startswith("text_encoder") else 0.1 if slow else 1.0
        assert factors.get(p) == wanted, name


# Files


def publish_name(name: str) -> str:
    "What UNINEXT's files call a tensor of ours."
    if name.startswith("text_encoder."):
        return name.replace("text_encoder.", "text_encoder.body.model.")
    if name.startswith(("controller.", "mask_head.", "reid_embed_head.")):
        return f"detr.{name}"
    name = name.replace("backbone.0.body.", "backbone.0.backbone.")
    name = re.sub(r"backbone\.0\.norm_layers\.(\d)", r"backbone.0.backbone.norm\1", name)
    name = name.replace(".backbone.stem.", ".backbone.downsample_layers.0.")
    name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
    name = name.replace(".blocks.", ".") if ".stages." in name else name
    for timms, authors in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2")):
        name = name.replace(timms, authors) if ".stages." in name else name
    return f"detr.detr.{name}"


def publish(model: UNINEXT) -> dict:
    "The model as UNINEXT's training leaves it, with parts of other tasks, second names last."
    state = {}
    for name, tensor in model.state_dict().items():
        new = publish_name(name)
        norm = tensor.ndim == 1 and re.search(
            r"\.norm\d?\.|downsample_layers\.(0\.1|[123]\.0)", new
        )
        if (
            ".backbone." in new
            and (norm or new.endswith("gamma"))
            and "convnext" in model.config.backbone
        ):
            new, tensor = f"{new}.weight", tensor[None]
        state[new] = tensor + (".decoder.bbox_embed." in new)  # differs, and does not count
    width, text = model.config.hidden_dim, model.config.text["hidden_size"]
    state |= {
        "detr.detr.ref_backbone.0.backbone.norm1.weight.weight": torch.ones(1, 8),
        "detr.detr.transformer.resizer.fc.weight": torch.ones(width, text),
        "detr.resizer.layer_norm.bias": torch.ones(width),
        "detr.adjust_layer.weight": torch.ones(text, width),
        "detr.sot_fuser.refine.0.bias": torch.ones(width),
        "criterion._iter": torch.ones(1),
        "text_encoder.body.model.embeddings.position_ids": torch.arange(512)[None],
    }
    return {"model": state, "optimizer": {"state": {}}, "scheduler": {}, "iteration": 179_999}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "A tokenizer of BERT with the words of the synthetic benchmark."
    folder = tmp_path_factory.mktemp("words")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = folder / "all.txt"
    vocabulary.write_text("\n".join([*special, *sorted(set(" ".join(scenes.WORDS).split()))]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    vocabulary.rename(folder / "vocab.txt")
    return folder


SMALL = {"num_feature_levels": 4, "nheads": 8, "enc_n_points": 4, "dec_n_points": 4}
SMALL |= {"fusion_heads": 8, "proj_groups": 32, "embed_layers": 1, "num_queries": 30}
SMALL |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BODIES = {
    "convnext_large": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 40], "first_norm": False}
    | {"norm_eps": 1e-6, "drop": 0.7},
    "vit_huge": {"depth": 3, "width": 32, "heads": 4, "windowed": [0, 2]},
    "conv_tiny": {"widths": [32, 48, 64, 96], "time_strides": []},
}


@pytest.mark.parametrize("backbone", BODIES)
def test_published_files_become_folders(backbone, words, tmp_path):
    tokenizer = BertTokenizerFast.from_pretrained(words)
    text = BERT_BASE | {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "intermediate_size": 128, "max_tokens": 256}
    options = SMALL | {"backbone": backbone, "backbone_options": BODIES[backbone], "text": text}
    torch.manual_seed(0)
    model = UNINEXT(tiny_uninext(0, **options), tokenizer)
    for p in model.body.parameters():
        nn.init.normal_(p, std=0.1)
    torch.save(publish(make_answer(model)), tmp_path / "model_final.pth")
    made = convert(tmp_path / "model_final.pth", tmp_path / "out", tokenizer=words)
    assert made.found.family == "uninext"
    for reason in FAMILY.drops.values():
        assert made.dropped[reason]
    assert "second names of tensors that are kept once" in made.dropped
    loaded = zoo.load(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["config"]
    wanted, frames = BODIES[backbone], noise(2, 64, 96)
    assert {k: config["backbone_options"].get(k, v) for k, v in wanted.items()} == wanted
    for m in (model, loaded):
        m.config.short_side, m.config.long_side = 64, 640
    a, b = (m.refer(m.see(frames), TEXTS[:2]) for m in (model, loaded))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.scores, b.scores)


def test_published_names_are_recognised():
    case = load_case(GOLDEN / "uninext/convnext_large.npz")
    kinds = {"int64": torch.int64, "float32": torch.float32}
    state = {n: torch.empty(s, dtype=kinds[d], device="meta") for n, s, d in case.meta["keys"]}
    tensors = split_published({"model": state}).tensors
    found = recognise(tensors)
    assert found.variant == "uninext-convnext-l" and not found.notes
    with torch.device("meta"):
        wanted, aliases = zoo.unique_tensors(UNINEXT(UNINEXTConfig(**found.config)))
    adopted, dropped = adopt_tensors(tensors, FAMILY)
    zoo.check_tensors(wanted, {n: t for n, t in adopted.items() if n not in aliases}, "case")
    assert len(dropped["the backbone of templates, for tracking"]) > 300


def publish_resnet(name: str) -> str:
    "What detectron2 calls a tensor of torchvision's ResNet."
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"^conv1\.", "stem.conv1.", name)
    return re.sub(r"^bn1\.", "stem.conv1.norm.", name)


def test_the_resnet_of_detectron2_is_taken():
    with torch.device("meta"):
        state = build_backbone("resnet50").state_dict()
    prefix = "detr.detr.backbone.0.backbone."
    published = {prefix + publish_resnet(n): t for n, t in state.items()}
    assert prefix + "res4.5.conv3.norm.running_var" in published
    adopted, _ = adopt_tensors(published, find_family("uninext"))
    assert adopted.keys() == {f"backbone.0.body.{n}" for n in state}


def test_a_saved_one_answers_the_same(tmp_path):
    model, frames = tiny(embed_layers=1), noise(2, 64, 96)
    zoo.save(model, tmp_path / "saved", {})
    loaded = zoo.load(tmp_path / "saved", family="uninext")
    a, b = (m.refer(m.see(frames), TEXTS) for m in (model, loaded))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)


# Stages


def test_predictions_are_stored_as_probabilities(tmp_path):
    data = make(tmp_path / "data", "ref-youtube-vos", "valid")
    zoo.save(tiny(), tmp_path / "model", {})
    predict(data, tmp_path / "out", str(tmp_path / "model")).check()
    path = next((tmp_path / "out/candidates").rglob("*.safetensors"))
    arrays, info = load_candidates(path)
    assert info["kind"] == "probability" and arrays["logits"].shape[1:] == (96, 144)
    assert (
        arrays["scores"].shape == (5,)
        and 0 <= arrays["logits"].min() <= arrays["logits"].max() <= 1
    )
    masks = (
        tmp_path / "out/Annotations" / path.relative_to(tmp_path / "out/candidates").with_suffix("")
    )
    drawn = [read_mask(p) for p in sorted(masks.iterdir())]
    assert len(drawn) == 5 and drawn[0].shape == (64, 96)


def test_single_frames_are_answered(tmp_path):
    data = make(tmp_path / "data", "a2d-sentences", "test")
    zoo.save(tiny(), tmp_path / "model", {})
    report, lines = run_protocol(data, tmp_path / "out", str(tmp_path / "model"))
    report.check()
    assert "mAP" in lines
