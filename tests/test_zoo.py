"""Checkpoints that are wrong in every way we could think of:
each is refused with one line that names the fault."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from rvos_nb.core import Problem, find_shipped
from rvos_nb.models import catalogue, zoo
from rvos_nb.models.family import find_family
from rvos_nb.models.referformer import ReferFormer, tiny_config
from rvos_nb.models.text import make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["the red circle on the left", "a small blue square"])
    model = ReferFormer(tiny_config(len(tokenizer)), tokenizer).eval()
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    zoo.save(model, folder, {"steps": 0})
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "tiny")
    return tmp_path / "tiny"


def refused(folder, *words, **options):
    with pytest.raises(Problem) as e:
        zoo.load(folder, **options)
    said = str(e.value)
    assert "\n" not in said and all(w in said for w in words), said


def change(folder, edit):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def test_round_trip(saved):
    model, folder = saved
    again = zoo.load(folder, family="referformer")
    assert not again.training and again.config == model.config
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer"}
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    frames = torch.randint(0, 256, (3, 64, 96, 3), dtype=torch.uint8)
    a, b = (
        m.refer(m.see(frames), ["the red circle", "a small blue square"]) for m in (model, again)
    )
    assert (
        torch.equal(a.logits, b.logits) and torch.equal(a.scores, b.scores) and a.size == (64, 96)
    )


def test_same_bytes(saved, tmp_path):
    zoo.save(saved[0], tmp_path / "again", {"steps": 0})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved[1] / name).read_bytes()


def test_whoever_reads_the_options_reads_the_weights(saved):
    modes = {p.name: p.stat().st_mode for p in saved[1].iterdir() if p.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_box_heads_are_stored_once(saved):
    stored = safetensors.torch.load_file(saved[1] / "model.safetensors")
    assert "bbox_embed.0.layers.0.weight" in stored and not any(
        n.startswith("transformer.decoder.bbox_embed") for n in stored
    )


def test_missing(copy):
    change(copy, lambda t: t.pop("query_embed.weight"))
    refused(copy, "1 missing (query_embed.weight)", "model.safetensors")


def test_left_over(copy):
    change(copy, lambda t: t.update({"criterion.empty_weight": torch.ones(2)}))
    refused(copy, "1 left over (criterion.empty_weight)")


def test_other_shape(copy):
    change(copy, lambda t: t.update({"query_embed.weight": torch.ones(7, 64)}))
    refused(copy, "1 of another shape", "(7, 64) for (5, 64)")


def test_other_configuration(copy):
    said = json.loads((copy / "config.json").read_text())
    said["config"]["dec_layers"] = 3
    (copy / "config.json").write_text(json.dumps(said))
    refused(copy, "30 missing", "transformer.decoder.layers.2")


@pytest.mark.parametrize("cut", [0, 7, 1000, -1])
def test_truncated_weights(copy, cut):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:cut])
    refused(copy, "model.safetensors", "damaged")


def test_weights_are_not_a_pickle(copy):
    torch.save({"query_embed.weight": torch.ones(1)}, copy / "model.safetensors")
    refused(copy, "damaged")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "model.safetensors", "no such file")


def test_no_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    refused(copy, "tokenizer")


def test_damaged_tokenizer(copy):
    for p in (copy / "tokenizer").iterdir():
        p.write_text('{"cut')
    refused(copy, "tokenizer")


@pytest.mark.parametrize("text", ['{"family": "referf', "[]", '{"card": {}}'])
def test_damaged_config(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, "config.json")


def test_unknown_setting(copy):
    said = json.loads((copy / "config.json").read_text())
    said["config"]["hiden_dim"] = 64
    (copy / "config.json").write_text(json.dumps(said))
    refused(copy, "config.json", "hiden_dim")


def test_unknown_family(copy):
    said = json.loads((copy / "config.json").read_text()) | {"family": "later"}
    (copy / "config.json").write_text(json.dumps(said))
    refused(copy, "'later'", "referformer")


def test_another_family(copy):
    refused(copy, "family 'referformer'", "family 'aot'", family="aot")


def test_no_such_name(tmp_path):
    refused("no-such-model", "no such checkpoint")
    refused(tmp_path, "without config.json")


def test_too_long_a_sentence(saved):
    model = saved[0]
    with pytest.raises(Problem, match="tokens"):
        model.refer(model.see(torch.zeros(1, 64, 96, 3, dtype=torch.uint8)), ["red " * 60])


@pytest.mark.parametrize(
    "size,frames", [((96, 144), 5), ((33, 47), 1), ((200, 90), 2), ((20, 300), 3)]
)
def test_any_size_is_answered(saved, size, frames):
    model = saved[0]
    found = model.refer(
        model.see(torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8)), ["the red circle"]
    )
    assert (
        found.masks(0).shape == (frames, *size)
        and found.scores.shape == (1, frames)
        and found.logits.isfinite().all()
    )


def test_sentences_in_small_batches(saved, monkeypatch):
    from rvos_nb.models import referring

    model, texts = saved[0], ["the red circle", "a small blue square on the left", "square"]
    seen = model.see(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))
    whole = model.refer(seen, texts)
    monkeypatch.setattr(referring, "SENTENCE_CELLS", 1)
    single = model.refer(seen, texts)
    assert torch.allclose(
        whole.logits, single.logits, rtol=1e-4, atol=1e-4 * whole.logits.abs().max().item()
    )
    assert torch.allclose(whole.scores, single.scores, atol=1e-5)


def test_resnet_has_the_published_tensors():
    from rvos_nb.models.referformer import ReferFormerConfig

    with torch.device("meta"):
        model = ReferFormer(ReferFormerConfig())
    assert sum(p.numel() for p in model.parameters()) == 176_262_207


# The Hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty Hub cache of this test, and no network."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def keep(cache, name, folder):
    "Put a folder into the cache, as a download would."
    home = cache / ("models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))


def test_the_methods_of_the_hub(saved, tmp_path):
    model, folder = saved
    again = ReferFormer.from_pretrained(folder)
    assert isinstance(again, ReferFormer) and not again.training and again.card == {"steps": 0}
    again.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer",
    }
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert "rvos_nb" in (tmp_path / "again" / "README.md").read_text()
    assert ReferFormer.from_pretrained(tmp_path / "again").tokenizer(
        "the red circle"
    ) == model.tokenizer("the red circle")


def test_a_model_of_another_class(saved):
    from rvos_nb.vos.aot import AOT

    with pytest.raises(Problem, match="family 'referformer'"):
        AOT.from_pretrained(saved[1])


def test_propagators_have_them_too(tmp_path):
    from rvos_nb.vos import aot, deaot

    for cls, config in (
        (aot.AOT, aot.AOT_VARIANTS["aot-tiny"]),
        (deaot.DeAOT, deaot.DEAOT_VARIANTS["deaot-tiny"]),
    ):
        model = cls(config)
        model.save_pretrained(tmp_path / cls.__name__)
        again = cls.from_pretrained(tmp_path / cls.__name__)
        assert (
            type(again) is cls
            and vars(again.config) == vars(config)
            and torch.equal(again.patch_wise_id_bank.weight, model.patch_wise_id_bank.weight)
        )


def test_push(saved, monkeypatch, tmp_path):
    "What goes up is the folder that comes down."
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **k: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **k: (
            shutil.copytree(folder_path, tmp_path / "hub") and f"pushed {repo_id}"
        ),
    )
    assert saved[0].push_to_hub("somebody/tiny") == "pushed somebody/tiny"
    assert zoo.load(tmp_path / "hub").config == saved[0].config
    from huggingface_hub.utils import filter_repo_objects

    from rvos_nb.models.text import HUB_FILES

    files = {
        str(p.relative_to(tmp_path / "hub")) for p in (tmp_path / "hub").rglob("*") if p.is_file()
    }
    assert set(
        filter_repo_objects(files, allow_patterns=[*HUB_FILES, "*.safetensors"])
    ) == files - {"README.md"}


def test_the_cache_is_used_without_network(saved, cache):
    keep(cache, "somebody/tiny", saved[1])
    for load in (zoo.load, ReferFormer.from_pretrained):
        assert load("somebody/tiny").config == saved[0].config
    assert zoo.read_card("somebody/tiny")["family"] == "referformer"


def test_nothing_is_downloaded_unasked(cache, monkeypatch):
    def never(*a, **k):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", never)
    refused("somebody/tiny", "somebody/tiny", "Hub cache", "online=True")
    for name in ("referformer-video-swin-b", "AOTT", "r50_deaotl", "roberta-base"):
        refused(name)
    with pytest.raises(Problem, match="online=True"):
        ReferFormer.from_pretrained("somebody/tiny")


def test_asked_and_not_given(cache, monkeypatch):
    from unittest.mock import MagicMock

    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    refused("somebody/tiny", "somebody/tiny", "HF_HUB_OFFLINE", online=True)
    for error, said in (
        (GatedRepoError("403", response=MagicMock(headers={})), "hf auth login"),
        (RepositoryNotFoundError("404", response=MagicMock(headers={})), "check the name"),
        (ConnectionError("no route"), "no route"),
    ):
        monkeypatch.setattr("huggingface_hub.snapshot_download", MagicMock(side_effect=error))
        refused("somebody/tiny", "somebody/tiny", said, online=True)


def test_a_broken_snapshot(saved, cache):
    "A download that was broken off is named as such."
    keep(cache, "somebody/tiny", saved[1])
    (cache / "models--somebody--tiny" / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    refused("somebody/tiny", "model.safetensors", "no such file")


def test_a_model_of_somebody_else(cache, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    keep(cache, "somebody/bert", tmp_path / "bert")
    refused("somebody/bert", "no family and config")


# The table


def test_a_family_lists_only_its_own_shipped_models():
    assert "aot-tiny" in catalogue.list_shipped() and "referformer-tiny" in catalogue.list_shipped()
    aot = catalogue.list_shipped("aot")
    assert " aot-tiny" in aot and "deaot-tiny" not in aot and "referformer" not in aot
    assert catalogue.list_shipped("sam2") == ""


def test_every_published_variant_has_a_row():
    rows = {r["name"]: r for r in catalogue.published_models()}
    assert [r["name"] for r in catalogue.shipped_models()] == sorted(
        p.parent.name for p in find_shipped("checkpoints").glob("*/config.json")
    )
    for family in ("aot", "deaot"):
        for name in zoo.variants(family):
            assert name in rows or name.endswith("-tiny")
    assert (
        rows["referformer-video-swin-b-joint"]
        | {"jf": 64.9, "j": 62.8, "f": 67.0, "licence": "Apache-2.0", "loads": "convert"}
        == rows["referformer-video-swin-b-joint"]
    )
    assert (
        rows["referformer-resnet50"]["jf"],
        rows["referformer-resnet50"]["cfbi"],
        rows["referformer-resnet50"]["other"],
    ) == (55.6, 59.4, {"Ref-DAVIS17": [58.5, 55.8, 61.3]})
    assert rows["wavecl-video-swin-t"]["loads"] == "no weights" and rows["r50-deaotl"]["jf"] == 85.9
    known = {r["backbone"] for r in rows.values() if r["family"] == "referformer"}
    assert len(known) == 9


@pytest.mark.parametrize(
    "name",
    [
        "referformer-resnet50",
        "referformer-swin-l",
        "referformer-video-swin-b",
        "soc-video-swin-t",
        "soc-video-swin-b",
        "mutr-resnet50",
        "mutr-video-swin-b",
        "mutr-convnext-l",
        "mutr-convmae-b",
        "aott",
        "r50-aotl",
        "swinl-deaotl",
    ],
)
def test_parameters_are_those_of_the_table(name):
    row = catalogue.published()[name]
    family = find_family(row["family"])
    with torch.device("meta"):
        config = zoo.variants(family.name).get(name) or family.config(backbone=row["backbone"])
        model = family.model(config)
    count = sum(
        t.numel()
        for t in (
            model.state_dict().values() if zoo.variants(row["family"]) else model.parameters()
        )
    )
    assert abs(count / 1e6 - row["params"]) < 0.06 * max(1, row["params"] / 100)


def test_listing_of_one_family():
    text = catalogue.list_published(catalogue.published_models("AOT"))
    assert "r50-aotl" in text and "deaott" not in text and "BSD-3-Clause" in text
    with pytest.raises(Problem, match=r"one of .*mutr"):
        catalogue.published_models("yolo")
