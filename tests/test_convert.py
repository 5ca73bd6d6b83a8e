"""Published files: whatever hides in them is not run,
whatever they are is told from their tensors, whatever does not fit is listed."""

import argparse
import functools
import io
import os
import pathlib
import pickle
import subprocess
import tarfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from rvos_nb.core import Problem
from rvos_nb.models import catalogue, zoo
from rvos_nb.models.convert import convert, recognise
from rvos_nb.models.family import adopt_tensors, find_family
from rvos_nb.models.files import read_pickle, read_published, split_published
from rvos_nb.models.referformer import ReferFormer, ReferFormerConfig
from rvos_nb.models.text import ROBERTA_BASE, make_tokenizer, small_text_config
from rvos_nb.verify.cases import fill, load_case
from rvos_nb.vos.aot import AOT, AOT_VARIANTS

FOLDERS = ("referformer", "soc", "mutr", "wavecl", "vos")
GOLDEN = [p for f in FOLDERS for p in sorted(Path(__file__).with_name("golden").glob(f"{f}/*.npz"))]


def filled(model):
    "The model with the values of the golden cases."
    with torch.no_grad():
        for n, t in zoo.unique_tensors(model)[0].items():
            t.copy_(torch.from_numpy(fill(n, tuple(t.shape))))
    return model.eval()


def referformer(**changes):
    config = {
        "backbone": "conv_tiny",
        "text": small_text_config(30, heads=1),
        "hidden_dim": 64,
        "dim_feedforward": 96,
        "mask_dim": 32,
        "enc_layers": 1,
        "dec_layers": 2,
    }
    return filled(ReferFormer(ReferFormerConfig(**config | changes)))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    make_tokenizer(["the red circle on the left", "a blue square"]).save_pretrained(folder)
    return folder


def refused(call, *said):
    with pytest.raises(Problem) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and all(s in text for s in said), text
    return text


# Nothing is run


class Call:
    "Pickles as a call."

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def canaries(trap):
    trap = str(trap)
    return {
        "system": (Call(os.system, f"mkdir {trap}"), "posix.system"),
        "mkdir": (Call(os.mkdir, trap), "posix.mkdir"),
        "eval": (Call(eval, f'__import__("os").mkdir({trap!r})'), "eval"),
        "exec": (Call(exec, f"import os; os.mkdir({trap!r})"), "exec"),
        "getattr": (Call(getattr, Call(__import__, "os"), "mkdir"), "getattr"),
        "popen": (Call(subprocess.Popen, ["mkdir", trap]), ".Popen"),
        "partial": (functools.partial(os.mkdir, trap), "functools.partial"),
        "import": (Call(__import__, "antigravity"), "__import__"),
        "torch": (Call(torch.load, trap), "torch"),
        "numpy array": (np.zeros(2), "_reconstruct"),
        "path": (pathlib.PurePosixPath("a"), "pathlib"),
        "object scalar": (Call(np.float64(1).__reduce__()[0], np.dtype("O"), b"x"), "numpy.dtype"),
    }


@pytest.mark.parametrize("where", ["args", "optimizer", "model", "alone", "stream"])
@pytest.mark.parametrize("what", list(canaries("x")))
def test_canaries(what, where, tmp_path):
    trap = tmp_path / "ran"
    evil, name = canaries(trap)[what]
    state = {"query_embed.weight": torch.ones(2)}
    file = {
        "args": {"model": state, "args": argparse.Namespace(lr=1e-4, note=evil)},
        "optimizer": {"model": state, "optimizer": {"state": {0: {"exp_avg": evil}}}},
        "model": {"model": state | {"x": evil}},
        "alone": evil,
        "stream": {"model": state, "epoch": evil},
    }[where]
    torch.save(file, tmp_path / "evil.pth", _use_new_zipfile_serialization=where != "stream")
    text = refused(lambda: read_pickle(tmp_path / "evil.pth"), "evil.pth", "run code", name)
    assert not trap.exists(), text
    refused(lambda: convert(tmp_path / "evil.pth", tmp_path / "out"), "run code")
    assert not trap.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle(protocol, tmp_path):
    (tmp_path / "evil.pth").write_bytes(
        pickle.dumps(Call(os.mkdir, str(tmp_path / "ran")), protocol)
    )
    refused(lambda: read_pickle(tmp_path / "evil.pth"), "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_the_environment_cannot_allow_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Call(os.mkdir, str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    refused(lambda: read_pickle(tmp_path / "evil.pth"), "posix.mkdir")
    assert not (tmp_path / "ran").exists()


def test_the_list_is_closed_again(tmp_path):
    "What other libraries allow is not allowed here, and what is allowed here is not left behind."
    torch.save({"a": argparse.Namespace(b=1)}, tmp_path / "a.pth")
    torch.save({"a": pathlib.PurePosixPath("b")}, tmp_path / "b.pth")
    with torch.serialization.safe_globals([pathlib.PurePosixPath]):
        before = torch.serialization.get_safe_globals()
        assert read_pickle(tmp_path / "a.pth")["a"].b == 1
        refused(lambda: read_pickle(tmp_path / "b.pth"), "pathlib")
        assert (
            set(torch.serialization.get_safe_globals()) == set(before)
            and argparse.Namespace not in before
        )


def test_a_tar_of_old(tmp_path):
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        data = pickle.dumps(Call(os.mkdir, str(tmp_path / "ran")), 2)
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    refused(lambda: read_pickle(tmp_path / "old.pth"), "old.pth")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pth")
    whole, at = (tmp_path / "good.pth").read_bytes(), tmp_path / "x.pth"
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("readme.txt", "hello")
    for content, said in (
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'  <html lang="en">', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS"),
        (b"epoch loss\n1 2\n", "text"),
        (whole[: len(whole) // 2], "cut short"),
        (whole[:-1], "cut short"),
        (whole[:3], "cut short"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x02\x8a\nl\xfc\x9c", "damaged"),
        (bytes(range(256)) * 8, "damaged"),
        ((tmp_path / "zip").read_bytes(), "damaged"),
    ):
        at.write_bytes(content)
        refused(lambda: read_pickle(at), "x.pth", said)
    refused(lambda: read_pickle(tmp_path), "a folder")
    refused(lambda: read_pickle(tmp_path / "none.pth"), "no such file")
    for empty in (
        {"model": {}},
        [torch.ones(1)],
        torch.ones(2),
        {"model": {"epoch": 3}},
        {"optimizer": {"state": {}}},
    ):
        torch.save(empty, at)
        refused(lambda: read_published(at), "no tensors")


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_a_problem(seed, tmp_path):
    "One bit flipped, or bytes cut out of the middle: read, or refused in one line."
    rng = np.random.RandomState(seed)
    torch.save(
        {"model": {"a": torch.ones(4)}, "args": argparse.Namespace(lr=1), "best": np.float32(2)},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=bool(seed % 2),
    )
    data = bytearray((tmp_path / "a.pth").read_bytes())
    at = rng.randint(len(data))
    if seed % 3:
        data[at] ^= 1 << rng.randint(8)
    else:
        del data[at : at + rng.randint(1, 9)]
    (tmp_path / "a.pth").write_bytes(data)
    try:
        read_published(tmp_path / "a.pth")
    except Problem as p:
        assert "\n" not in str(p)


# What is read


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "stream"])
def test_all_that_training_scripts_leave(archive, tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    torch.save(
        {
            "model": OrderedDict(
                [
                    ("module.w", parameter),
                    ("module.h", torch.ones(2, dtype=torch.float16)),
                    ("module.bn.num_batches_tracked", torch.tensor(3)),
                ]
            ),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "epoch": 4,
            "args": argparse.Namespace(
                backbone="resnet50",
                lr=1e-4,
                milestones=Counter([3, 5]),
                best=np.float64(61.5),
                last=np.int64(3),
                ok=np.bool_(True),
                no=None,
            ),
        },
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=archive,
    )
    found = split_published(read_pickle(tmp_path / "a.pth"))
    assert (
        set(found.tensors) == {"w", "h"}
        and found.epoch == 4
        and torch.equal(found.tensors["w"], parameter.data)
    )
    assert (found.options["best"], found.options["last"], found.options["ok"]) == (
        61.5,
        3,
        True,
    ) and found.options["backbone"] == "resnet50"
    assert found.dropped == {
        "counters of normalisation": ["bn.num_batches_tracked"],
        "state of the training": ["optimizer", "lr_scheduler", "scaler"],
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s},
        lambda s: {"model_state_dict": s},
        lambda s: {"ema_model_state_dict": s},
        lambda s: {"model": {n: torch.zeros_like(t) for n, t in s.items()}, "model_ema": s},
    ],
    ids=["bare", "state_dict", "model", "model_state_dict", "ema", "both"],
)
def test_wherever_the_model_lies(wrap, tmp_path):
    torch.save(wrap({"module.a": torch.ones(2), "module.b": torch.ones(1)}), tmp_path / "a.pth")
    assert {n: t.tolist() for n, t in read_published(tmp_path / "a.pth").items()} == {
        "a": [1, 1],
        "b": [1],
    }


# What it is


def tensors_of(case):
    """The tensors of a case's key list;
    only the box heads have values, as only theirs are looked at."""
    alias, kinds = (
        dict(case.meta.get("aliases") or {}),
        {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool},
    )
    return {
        n: torch.from_numpy(fill(alias.get(n, n), tuple(s)))
        if n.startswith("bbox_embed.")
        else torch.empty(s, dtype=kinds[d], device="meta")
        for n, s, d in case.meta["keys"]
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden_key_lists_are_recognised(path):
    case = load_case(path)
    names = [k[0] for k in case.meta.get("keys", [])]
    if not any(n.startswith(("fusion_module", "vlf", "LSTT")) for n in names):
        return  # a part of a model
    tensors, options = split_published({"model": tensors_of(case)}).tensors, case.meta["config"]
    if path.parent.name in ("referformer", "soc", "mutr", "wavecl"):
        found = recognise(tensors)
        assert found.variant in catalogue.published() and not found.notes
        backbone = options["backbone"].replace("-", "_").removesuffix("_p4w7")
        assert found.config["backbone"].removesuffix("_p4w7") == backbone
        assert path.parent.name in ("soc", "wavecl") or {
            k: found.config[k] for k in options if k in found.config
        } == {k: options[k] for k in options if k in found.config}
    else:
        found = recognise(tensors, model=case.meta["model"])
    family = find_family(found.family)
    cls, config = family.model, family.config
    with torch.device("meta"):
        wanted, aliases = zoo.unique_tensors(cls(config(**found.config)))
    tensors, _ = adopt_tensors(tensors, family)
    zoo.check_tensors(wanted, {n: t for n, t in tensors.items() if n not in aliases}, path)


def on_meta(cls, config):
    with torch.device("meta"):
        return dict(cls(config).state_dict())


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet50",
        "resnet101",
        *(f"{v}swin_{s}_p4w7" for v, ss in (("", "tsbl"), ("video_", "tsb")) for s in ss),
    ],
)
def test_nine_backbones(backbone):
    config = ReferFormerConfig(
        backbone=backbone, num_classes=65, num_feature_levels=3, rel_coord=False, enc_layers=3
    )
    with torch.device("meta"):
        found = recognise(dict(ReferFormer(config).state_dict()))
    name = "referformer-" + backbone.removesuffix("_p4w7").replace("_", "-")
    assert (
        found.variant == name in catalogue.published()
        and ReferFormerConfig(**found.config) == config
    )


@pytest.mark.parametrize("family", ["aot", "deaot"])
def test_all_variants(family):
    cls = find_family(family).model
    for name, config in zoo.variants(family).items():
        state = on_meta(cls, config) | {"LSTT.mask_token": torch.empty(1, 1, 256, device="meta")}
        assert vars(config) == recognise(state, model=name).config
        found = recognise(state)
        assert found.variant == (name if not name.endswith("aotb") else name[:-1] + "l") and bool(
            found.notes
        ) == name.startswith(("aotb", "aotl", "deaotb", "deaotl"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "r50-aotl"}, "aotl or aotb"),
        ({"model": "nothing"}, "rvos models"),
        ({"model": "deaotl"}, "aotl or aotb"),
    ],
)
def test_a_wrong_name(change, said):
    refused(lambda: recognise(on_meta(AOT, AOT_VARIANTS["aotl"]), **change), said)


def test_other_families_are_named():
    for mark, family in (("voc.fq_pos", "soc"), ("vita.fq_pos", "soc")):
        names = (mark, "vlf.multihead_attn.in_proj_bias", "fusion_module.x")
        state = {name: torch.ones(1) for name in names}
        refused(functools.partial(recognise, state), f"a checkpoint of {family}")
    refused(
        lambda: recognise(
            {"MTA.layers.0.norm1.weight": torch.ones(1), "fusion_module.x": torch.ones(1)}
        ),
        "a checkpoint of mutr",
    )
    refused(lambda: recognise({"detr.detr.x": torch.ones(1)}), "uninext")
    refused(
        lambda: recognise(
            {"layers.0.blocks.0.x": torch.ones(1), "patch_embed.proj.weight": torch.ones(1)}
        ),
        "start file",
    )


# What becomes of it


def published_file(model, path, average=None, prefix="module.", **more):
    "A file as a training script of the field leaves it."
    state = {prefix + n: t for n, t in model.state_dict().items()}
    state |= {
        f"{prefix}backbone.0.body.total_ops": torch.zeros(1, dtype=torch.float64),
        f"{prefix}backbone.0.body.total_params": torch.zeros(1, dtype=torch.float64),
        f"{prefix}empty_weight": torch.ones(2),
        f"{prefix}backbone.0.body.bn.num_batches_tracked": torch.tensor(9),
    }
    torch.save(
        {
            "model": state,
            "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": np.float64(1e-4)}]},
            "lr_scheduler": {"milestones": Counter([3])},
            "epoch": 5,
        }
        | more
        | ({"ema": average} if average else {}),
        path,
    )
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"with_box_refine": False},
        {"num_classes": 65, "rel_coord": False, "num_feature_levels": 3},
    ],
    ids=["refined", "one head", "K 65"],
)
def test_referformer_there_and_back(changes, words, tmp_path):
    model = referformer(**changes)
    if not changes:
        model.bbox_embed[1].layers[2].bias.data[:] = 1
    args = argparse.Namespace(
        backbone="conv_tiny",
        with_box_refine=model.config.with_box_refine,
        nheads=8,
        binary=True,
        output_dir="x",
    )
    ids = {"text_encoder.embeddings.position_ids": torch.arange(66)[None]}
    done = convert(
        published_file(model, tmp_path / "a.pth", args=args, **ids),
        tmp_path / "out",
        tokenizer=str(words),
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
    } and not done.found.notes
    text = str(done)
    for said in (
        "profiler",
        "optimizer",
        "second names",
        "weights of the loss",
        "counters of normalisation",
    ):
        assert said in text
    again = zoo.load(tmp_path / "out", family="referformer")
    ours, theirs = zoo.unique_tensors(model)[0], zoo.unique_tensors(again)[0]
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    frames = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    model.text_encoder.tokenizer = again.tokenizer
    assert torch.equal(
        *(m.refer(m.see(frames, 64), ["the red circle"]).logits for m in (model, again))
    )
    said = zoo.read_card(tmp_path / "out")["card"]
    assert (
        said["epoch"] == 5
        and said["source"] == "a.pth"
        and said["variant"] == "referformer-conv-tiny"
    )


def test_published_names_win_over_second_names(words, tmp_path):
    model, state = referformer(), {}
    state = dict(model.state_dict())
    state["transformer.decoder.bbox_embed.0.layers.0.weight"] = torch.full((64, 64), 9.0)
    torch.save({"model": state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "out", tokenizer=str(words))
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")[
            "bbox_embed.0.layers.0.weight"
        ],
        state["bbox_embed.0.layers.0.weight"],
    )


def test_options_are_a_cross_check(words, tmp_path):
    args = argparse.Namespace(backbone="resnet50", enc_layers=4, num_queries=5)
    done = convert(
        published_file(referformer(), tmp_path / "a.pth", args=args),
        tmp_path / "out",
        tokenizer=str(words),
    )
    assert (
        len(done.found.notes) == 2
        and "backbone resnet50" in str(done)
        and "enc_layers 4" in str(done)
    )


@pytest.mark.parametrize("model_name", ["", "aott", "AOTT"])
@pytest.mark.parametrize("token", [True, False])
def test_real_aott(token, model_name, tmp_path):
    model = filled(AOT(AOT_VARIANTS["aott"]))
    state = dict(model.state_dict()) | (
        {"LSTT.mask_token": torch.zeros(1, 1, 256)} if token else {}
    )
    torch.save(
        {"state_dict": state, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}},
        tmp_path / "save_step_100000.pth",
    )
    done = convert(tmp_path / "save_step_100000.pth", tmp_path / "aott", model_name)
    assert (
        done.found.variant == "aott"
        and ("never used" in str(done)) == token
        and {p.name for p in (tmp_path / "aott").iterdir()} == {"config.json", "model.safetensors"}
    )
    again = zoo.load(tmp_path / "aott", family="aot")
    assert (
        vars(again.config) == vars(AOT_VARIANTS["aott"])
        and zoo.read_card(tmp_path / "aott")["card"]["licence"] == "BSD-3-Clause"
    )
    x = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.encode(x), again.encode(x)))


PREFIXES = {
    "several GPUs": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled on several GPUs": lambda name: f"module._orig_mod.{name}",
    "several GPUs, compiled": lambda name: f"_orig_mod.module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning, compiled": lambda name: f"model._orig_mod.{name}",
    "a compiled part": lambda name: name.replace(".", "._orig_mod.", 1),
}


@pytest.mark.parametrize("wrapper", PREFIXES)
def test_what_wrapped_a_model_is_taken_off(wrapper, words, tmp_path):
    "For a referring family and for a propagator, and with the weights of a loss beside them."
    for name, model in (("r", referformer()), ("v", filled(AOT(AOT_VARIANTS["aott"])))):
        plain = {n: t.clone() for n, t in model.state_dict().items()}
        for folder, rename in (("plain", str), ("wrapped", PREFIXES[wrapper])):
            state = {rename(n): t for n, t in plain.items()}
            state["criterion.empty_weight"] = torch.ones(2)
            torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
            convert(tmp_path / f"{name}.pth", tmp_path / name / folder, tokenizer=str(words))
        expected = (tmp_path / name / "plain/model.safetensors").read_bytes()
        assert (tmp_path / name / "wrapped/model.safetensors").read_bytes() == expected


def test_moving_average_of_the_trained_part(tmp_path):
    model, average = (
        filled(AOT(AOT_VARIANTS["aot-tiny"])),
        {"decoder.conv_out.bias": torch.full((6,), 3.0)},
    )
    torch.save({"state_dict": model.state_dict(), "ema": average}, tmp_path / "a.pth")
    assert "moving average" in str(convert(tmp_path / "a.pth", tmp_path / "out"))
    again = zoo.load(tmp_path / "out")
    assert again.decoder.conv_out.bias.tolist() == [3.0] * 6 and torch.equal(
        again.patch_wise_id_bank.weight, model.patch_wise_id_bank.weight
    )


def test_half_precision_becomes_single(tmp_path):
    torch.save(
        {
            "state_dict": {
                n: t.half() for n, t in filled(AOT(AOT_VARIANTS["aot-tiny"])).state_dict().items()
            }
        },
        tmp_path / "a.pth",
    )
    convert(tmp_path / "a.pth", tmp_path / "out")
    assert {
        t.dtype
        for t in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").values()
    } == {torch.float32}


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda s: s.pop("decoder.conv_out.bias"), "1 missing (decoder.conv_out.bias)"),
        (lambda s: s.update(extra=torch.ones(1)), "1 left over (extra)"),
        (
            lambda s: s.update({"decoder.conv_out.bias": torch.ones(4)}),
            "decoder.conv_out.bias (4,) for (6,)",
        ),
        (
            lambda s: s.pop("patch_wise_id_bank.weight"),
            "without the tensor patch_wise_id_bank.weight",
        ),
        (
            lambda s: s.update({"patch_wise_id_bank.weight": torch.ones(64, 9, 16, 16)}),
            "unpublished aot",
        ),
    ],
)
def test_what_does_not_fit(edit, said, tmp_path):
    state = dict(AOT(AOT_VARIANTS["aot-tiny"]).state_dict())
    edit(state)
    torch.save(state, tmp_path / "a.pth")
    refused(lambda: convert(tmp_path / "a.pth", tmp_path / "out"), "a.pth", said)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_the_output_folder(tmp_path, monkeypatch):
    torch.save({"state_dict": AOT(AOT_VARIANTS["aot-tiny"]).state_dict()}, tmp_path / "a.pth")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for force in (False, True):
        into_photos = functools.partial(
            convert, tmp_path / "a.pth", tmp_path / "photos", force=force
        )
        refused(into_photos, "no checkpoint")
    convert(tmp_path / "a.pth", tmp_path / "out")
    refused(lambda: convert(tmp_path / "a.pth", tmp_path / "out"), "--force")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(safetensors.torch, "save_file", full)
        refused(lambda: convert(tmp_path / "a.pth", tmp_path / "out", force=True), "no space")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["a.pth", "out", "photos"]
    convert(tmp_path / "a.pth", tmp_path / "out", force=True)


def test_the_tokenizer_is_found_later(words, tmp_path, monkeypatch):
    "Without a folder its name is kept: looked up in the Hub cache, on the Hub only where asked."
    monkeypatch.setitem(ROBERTA_BASE, "vocab_size", 30)
    convert(published_file(referformer(), tmp_path / "a.pth"), tmp_path / "out")
    assert (
        zoo.read_card(tmp_path / "out")["tokenizer"] == "roberta-base"
        and not (tmp_path / "out" / "tokenizer").exists()
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(
        lambda: zoo.load(tmp_path / "out"),
        "'roberta-base' is not at hand",
        "out/tokenizer",
        "online=True",
    )
    refused(
        lambda: zoo.load(tmp_path / "out", online=True), "'roberta-base' is not at hand"
    )  # HF_HUB_OFFLINE: no network
    snapshot = tmp_path / "cache" / "models--FacebookAI--roberta-base"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    (snapshot / "snapshots").mkdir()
    (snapshot / "snapshots" / "abc").symlink_to(words)
    again = zoo.load(tmp_path / "out")
    again.save_pretrained(tmp_path / "saved")
    assert zoo.load(tmp_path / "saved").tokenizer("the red circle") == again.tokenizer(
        "the red circle"
    ) and "tokenizer" not in zoo.read_card(tmp_path / "saved")


def test_the_command(tmp_path, monkeypatch, capsys):
    from rvos_nb.cli import main

    torch.save({"state_dict": AOT(AOT_VARIANTS["aot-tiny"]).state_dict()}, tmp_path / "a.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["convert", "a.pth", "out"])
    assert (
        not e.value.code
        and "aot-tiny" in capsys.readouterr().out
        and zoo.load("out").config == AOT_VARIANTS["aot-tiny"]
    )
    with pytest.raises(SystemExit) as e:
        main(["convert", "a.pth", "other", "--model", "r50-aotl"])
    said = capsys.readouterr().err
    assert (
        e.value.code == 1
        and said.startswith("rvos: ")
        and "a checkpoint of aot-tiny" in said
        and len(said.splitlines()) == 1
        and not (tmp_path / "other").exists()
    )
