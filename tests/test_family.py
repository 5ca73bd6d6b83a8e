"""A family that stands in this file alone: it is listed, converted, predicted with, trained,
resumed and verified, and the package knows nothing of it but its record."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rvos_nb.cli import main
from rvos_nb.core import Problem, find_shipped
from rvos_nb.data import refshapes, scenes
from rvos_nb.data.clips import SceneStage, draw_refer_batch
from rvos_nb.evaluate import evaluate
from rvos_nb.models import zoo
from rvos_nb.models.family import (
    FAMILIES,
    Facts,
    Family,
    all_facts,
    available_families,
    find_family,
    find_object,
    register,
    shipped_facts,
)
from rvos_nb.models.hub import OnHub
from rvos_nb.models.referring import Candidates, Referring
from rvos_nb.predict import predict
from rvos_nb.stage import StageFailed
from rvos_nb.train.loop import train
from rvos_nb.train.recipe import read_loss_options, recipe_mapping
from rvos_nb.verify.cases import fill, judge

# The family: a pixel's colour times the mean of its sentence's word vectors


@dataclass
class ToyConfig:
    width: int = 8
    words: tuple = tuple(scenes.WORDS)


class Toy(OnHub, Referring, nn.Module):
    reads_sentences = False  # it keeps its words in its configuration

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.toy_pixels = nn.Linear(3, config.width)
        self.toy_words = nn.Embedding(len(config.words), config.width)

    def forward(self, frames: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        "Logits (E, T, H, W) of frames (T, H, W, 3) in [0, 1]."
        pixels = self.toy_pixels(frames)
        ids = [[self.config.words.index(w) for w in t.split()] for t in texts]
        sentences = torch.stack([self.toy_words(torch.tensor(i)).mean(0) for i in ids])
        return torch.einsum("thwc,ec->ethw", pixels, sentences)

    @torch.inference_mode()
    def see(self, frames, short_side=None):
        return torch.as_tensor(frames).float() / 255

    @torch.inference_mode()
    def refer(self, seen, texts):
        logits = self(seen, texts)
        scores = logits.sigmoid().flatten(2).amax(-1)
        return Candidates(logits, scores, torch.zeros(*scores.shape, 4), tuple(seen.shape[1:3]))


class ToyTask:
    kind = "refer"
    unused_parts = ()

    def __init__(self, recipe, device: str):
        family = find_family(recipe.family)
        self.model = family.model(zoo.read_config(family.config, recipe.model, "recipe, model"))
        self.modules = nn.ModuleDict({"model": self.model}).to(device)

    @staticmethod
    def check_settings(recipe):
        read_loss_options(recipe)

    def count(self, batch):
        return torch.tensor(len(batch))

    def loss(self, batch, progress: float, count=None):
        loss = 0
        for e, c in enumerate(batch.clip):
            frames = torch.from_numpy(batch.frames[c]).float() / 255
            truth = torch.from_numpy(batch.masks[e]).float()
            loss = loss + F.binary_cross_entropy_with_logits(
                self.model(frames, [batch.texts[e]])[0], truth
            )
        return loss, {"loss_mask": loss}

    def validation_clips(self, watch):
        draw = SceneStage(1, frames=2, clips=2, size=watch.size)
        return [("easy", draw_refer_batch(1, 0, draw))]

    def score(self, batches):
        return {f"J&F {level}": -float(self.loss(batch, 0)[0]) for level, batch in batches}


def toy_options(tensors, options):
    return {"width": tensors["toy_pixels.weight"].shape[0]}


def run_toy(meta, arrays):
    model = Toy(ToyConfig(**meta["config"]))
    with torch.no_grad():
        for n, t in model.state_dict().items():
            t.copy_(torch.from_numpy(fill(n, tuple(t.shape))))
        frames = torch.from_numpy(arrays["in/frames"])
        yield "logits", model(frames, meta["texts"]).numpy()


RECIPE = {
    "name": "toy",
    "family": "toy",
    "stages": [{"steps": 10, "frames": 2, "clips": 2, "size": [32, 48]}],
    "tuning": {"lr": 0.1},
    "watch": {"every": 5, "clips": 2, "size": [32, 48]},
}


@pytest.fixture(scope="module")
def family():
    facts = Facts(
        "toy",
        title="Toy (Nobody 2026)",
        page="https://example.org/toy",
        licence="CC0-1.0",
        benchmark="RefShapes easy",
        marks=("toy_pixels.",),
        models=({"name": "toy-base", "backbone": "none", "params": 0.1, "jf": 12.3},),
    )
    yield register(
        Family(
            "toy",
            Toy,
            ToyConfig,
            variants={"toy-base": ToyConfig()},
            options=toy_options,
            architectures=lambda options: ["toy-base"] if options["width"] == 8 else [],
            task=ToyTask,
            runners=[(lambda meta: meta.get("model") == "toy", run_toy)],
            facts=facts,
        )
    )
    FAMILIES.pop("toy")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A file as its authors would leave it."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("published") / "toy_base.pth"
    torch.save({"model": Toy(ToyConfig()).state_dict(), "epoch": 3}, path)
    return path


def rvos(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv)])
    assert not end.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_it_is_listed(family, capsys):
    for argv in (["models"], ["models", "toy"]):
        out = rvos(capsys, *argv)
        assert "Toy (Nobody 2026), licence: CC0-1.0, https://example.org/toy" in out
        assert "toy-base" in out and "convert" in out and "12.3" in out


def test_it_is_converted_and_predicts(family, published, capsys, tmp_path):
    out = rvos(capsys, "convert", published, tmp_path / "model")
    assert "toy-base" in out
    with pytest.raises(Problem, match="unpublished toy"):
        torch.save(Toy(ToyConfig(width=5)).state_dict(), tmp_path / "odd.pth")
        from rvos_nb.models.convert import convert

        convert(tmp_path / "odd.pth", tmp_path / "odd")
    refshapes.write(tmp_path / "data", "valid", "easy", 2, seed=5, frames=3, size=(48, 72))
    report = predict(tmp_path / "data", tmp_path / "run", tmp_path / "model")
    assert len(report.done) == 2 and not report.failed
    assert 0 <= evaluate(tmp_path / "data", tmp_path / "run")["J&F"] <= 100
    loaded = Toy.from_pretrained(tmp_path / "model")
    assert loaded.card["variant"] == "toy-base" and loaded.card["licence"] == "CC0-1.0"
    with pytest.raises(StageFailed, match="does not tell what it needs"):
        predict(tmp_path / "data", tmp_path / "bound", tmp_path / "model", memory="1GB").check()


def test_it_is_trained_and_resumed_to_the_same_weights(family, tmp_path):
    whole = train(RECIPE, tmp_path / "whole")
    assert whole.done == ["toy"]
    for _ in range(10):
        train(RECIPE, tmp_path / "parts", minutes=0)
    a, b = (zoo.load(tmp_path / name / "model") for name in ("whole", "parts"))
    assert a.card["steps"] == b.card["steps"] == 10
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(x, y)
    torch.manual_seed(0)
    assert not torch.equal(a.toy_pixels.weight, Toy(ToyConfig()).toy_pixels.weight)


def write_case(path: Path, logits: np.ndarray, frames: np.ndarray, texts: list[str]):
    meta = {
        "model": "toy",
        "config": {"width": 8},
        "texts": texts,
        "tolerance": 1e-5,
        "outputs": {"logits": {"shape": list(logits.shape)}},
    }
    np.savez(path, **{"meta": json.dumps(meta), "in/frames": frames, "out/logits": logits})


def test_it_is_verified(family, tmp_path):
    frames, texts = np.random.default_rng(0).random((2, 4, 6, 3), np.float32), ["the red circle"]
    meta = {"config": {"width": 8}, "texts": texts}
    (_, logits), *_ = run_toy(meta, {"in/frames": frames})
    write_case(tmp_path / "right.npz", logits, frames, texts)
    write_case(tmp_path / "wrong.npz", logits + 1e-3, frames, texts)
    right, wrong = (judge(tmp_path / f"{name}.npz") for name in ("right", "wrong"))
    assert right.ok and not wrong.ok, (str(right), str(wrong))


# The families that ship


def test_their_records_name_what_is_there():
    for name in available_families():
        record = find_family(name)
        assert record.name == name
        for reference in (record.task, record.propagator, record.runners):
            assert not reference or find_object(reference)
        for recipe in record.recipes:
            assert recipe_mapping(recipe)["family"] == name, recipe


def test_every_training_recipe_belongs_to_a_family():
    listed = {r for n in available_families() for r in find_family(n).recipes}
    ship = {p.stem for p in find_shipped("recipes").glob("train-*.yaml")}
    assert ship == listed


def test_facts_are_whole():
    assert {"referformer", "soc", "mutr", "wavecl", "uninext", "aot", "deaot"} <= set(all_facts())
    for facts in shipped_facts().values():
        assert facts.title and facts.page and (facts.marks or facts.module == "rvos_nb.vos.sam2")
