"""Every reader under hypothesis: bytes at random, values at random, and files that were good until
a few of their bytes changed. What comes back is a value or a `Problem`, never another error. Each
reader gets `EXAMPLES` of each kind, always the same ones."""

import io
import json
import pickle
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image
from safetensors.numpy import save
from scipy.io import savemat

from rvos_nb.candidates import load_candidates, save_candidates
from rvos_nb.core import Problem
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_labels, read_mask
from rvos_nb.data.pictures import read_frame, read_picture_size
from rvos_nb.data.prepare import read_plain_pickle
from rvos_nb.data.samples import read_h5_masks, read_mat_masks
from rvos_nb.files import write_json
from rvos_nb.keyframe import read_key_frames
from rvos_nb.models.files import read_published
from rvos_nb.models.zoo import read_card
from rvos_nb.predictions import Predictions
from rvos_nb.propagation import read_start_mask
from rvos_nb.results import decode_mask, open_results
from rvos_nb.run_state import read_work_record
from rvos_nb.stage import read_record
from rvos_nb.train.recipe import read_recipe
from rvos_nb.verify.cases import load_case
from rvos_nb.verify.hostile import pack_archive, pack_stream
from rvos_nb.workflow import load_workflow

EXAMPLES = 100
set_hypothesis_home_dir(tempfile.mkdtemp())  # nothing is left in the checkout
GOLDEN = Path(__file__).with_name("golden")
checked = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# Good files


def write_png(path, mode):
    values = np.arange(32 * 24, dtype=np.uint8).reshape(24, 32) % 3
    picture = Image.fromarray(values)
    if mode == "P":
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.convert(mode).save(path, "PNG")


def write_candidates(path):
    info = {"kind": "logit", "size": [8, 8], "model": "toy", "frames": ["0", "1"]}
    save_candidates(path, np.zeros((2, 4, 4)), np.zeros(2), np.zeros((2, 4)), info)


def write_torch(path):
    torch.save({"model": {"w": torch.ones(2, 3), "b": torch.zeros(3)}, "epoch": 3}, path)


def write_predictions(path):
    entry = {"mask_logits": torch.zeros(2, 4, 4), "class_info": [0.5, 0.25]}
    torch.save({"v": {"0": entry}}, path)


def write_sentences(path):
    path.write_bytes(pickle.dumps([{"sent": "a dog", "ids": [1, 2.5, None, True]}], 2))


def write_h5(path):
    with h5py.File(path, "w") as f:
        f["instance"], f["reMask"] = np.ones((1, 1)), np.ones((4, 4), np.uint8)


def write_mat(path):
    savemat(path, {"part_mask": np.ones((4, 4), np.uint8)}, do_compression=True)


def write_zip(path):
    picture = io.BytesIO()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(picture, "PNG")
    path.write_bytes(pack_archive(picture.getvalue(), ["v/0/00000.png"]))


def write_tensors(path):
    path.write_bytes(save({"w": np.ones((2, 3), np.float32)}))


def write_golden(path):
    path.write_bytes(min(GOLDEN.rglob("*.npz"), key=lambda p: p.stat().st_size).read_bytes())


RECORD = {"stage": "a", "params": {"b": 1}, "units": {"v/0": "done"}, "sources": {"v": ["x", "y"]}}
KEYS = {"v": {"0": {"index_info": {"class_index": 3}}}}
WORK = {
    "asked": {"does": "fuse", "makes": ["swap"], "parameters": {}},
    "state": "done",
    "inputs": {"a": ["x", [3, "y"]]},
    "looks": {"swap": [3, "y"]},
}
CARD = {"family": "aot", "config": {"encoder": "mobilenetv2"}, "card": {}}
LISTING = {"videos": {"v": {"expressions": {"0": {"exp": "a dog"}}, "frames": ["00000"]}}}
RECIPE = {
    "name": "x",
    "parameters": {"a": 1},
    "stages": [{"name": "s", "notebook": "fuse", "parameters": {"split": "valid"}}],
}
TRAINING = {
    "name": "x",
    "family": "aot",
    "model": {"variant": "aott"},
    "stages": [{"steps": 4, "frames": 3, "clips": 2, "size": [32, 48], "levels": {"hard": 1}}],
    "tuning": {"lr": 0.001},
}


# Readers


def read_object(path):
    read_start_mask(path, (24, 32))


def read_archive(path):
    with open_results(path) as results:
        for video in results.names():
            for expression in results.names(video):
                for name in results.names(f"{video}/{expression}"):
                    results.mask(f"{video}/{expression}/{name}")


def read_listing(path):
    root = path.parent / "set"
    (root / "valid/JPEGImages/v").mkdir(parents=True, exist_ok=True)
    place = root / "meta_expressions/valid/meta_expressions.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(path.read_bytes())
    open_dataset(root)


def read_folder_card(path):
    (path.parent / "model").mkdir(exist_ok=True)
    (path.parent / "model/config.json").write_bytes(path.read_bytes())
    read_card(path.parent / "model")


def read_predictions(path):
    found = Predictions(path)
    try:
        for video, expressions in found.entries.items():
            for expression in expressions:
                found.scores(video, expression)
                for _ in found.frames(video, expression):
                    pass
    finally:
        found.file.close()


BINARY = {  # name -> what writes a good one, its readers
    "x.png": (lambda p: write_png(p, "RGB"), (read_frame, read_picture_size)),
    "grey.png": (lambda p: write_png(p, "L"), (read_mask, read_labels, read_object)),
    "palette.png": (lambda p: write_png(p, "P"), (read_mask, read_labels, read_object)),
    "decoded.png": (
        lambda p: write_png(p, "L"),
        (lambda p: decode_mask(p.read_bytes(), p, (24, 32)),),
    ),
    "x.safetensors": (write_candidates, (load_candidates,)),
    "other.safetensors": (write_tensors, (load_candidates,)),
    "x.pth": (write_torch, (read_published,)),
    "predictions.pth": (write_predictions, (read_predictions,)),
    "refs.p": (write_sentences, (read_plain_pickle,)),
    "x.h5": (write_h5, (read_h5_masks,)),
    "x.mat": (write_mat, (read_mat_masks,)),
    "x.zip": (write_zip, (read_archive,)),
    "x.npz": (write_golden, (load_case,)),
}
VALUES = {  # name -> a good value, its reader
    "run.json": (RECORD, read_record),
    "key_frame.json": (KEYS, read_key_frames),
    "STAGE.json": (WORK, read_work_record),
    "config.json": (CARD, read_folder_card),
    "meta_expressions.json": (LISTING, read_listing),
    "recipe.yaml": (RECIPE, load_workflow),
    "training.yaml": (TRAINING, read_recipe),
}


def offer(read, path):
    "Read a file; a value or a `Problem` is an answer, anything else is a fault of the reader."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except Problem as e:
            assert e.where and e.found and e.expected and e.remedy
            assert all(c.isprintable() or c == "\u3000" for c in str(e)[:200] if ord(c) < 128)


# What is offered

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, changes) -> bytes:
    for kind, share, count, odd in changes:
        at = int(share * len(data))
        if kind == "flip":
            data = data[:at] + odd + data[at + len(odd) :]
        elif kind == "cut":
            data = data[:at] + data[at + count :]
        elif kind == "insert":
            data = data[:at] + odd + data[at:]
        elif kind == "repeat":
            data = data[: at + count] + data[at:]
        else:
            data = data[:at]
    return data


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([10**400, -(10**30), "../x", "\x1b[2J", "\ud800", "9" * 300, [], {}, [[[]]]]),
)
JSON = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@st.composite
def spoiled(draw, good):
    "A good value with one odd one in it."
    value = json.loads(json.dumps(good))
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw(st.sampled_from(sorted(keys)))
        if not holder[key] or not isinstance(holder[key], (dict, list)) or draw(st.booleans()):
            holder[key] = draw(JSON)
            return value
        holder = holder[key]


@pytest.mark.parametrize("name", BINARY)
def test_a_damaged_file(name, tmp_path):
    write, readers = BINARY[name]
    path = tmp_path / name
    write(path)
    good = path.read_bytes()
    for read in readers:
        offer(read, path)

    @checked
    @given(CHANGES)
    def try_damage(changes):
        path.write_bytes(damage(good, changes))
        for read in readers:
            offer(read, path)

    try_damage()


@pytest.mark.parametrize("name", [*BINARY, *VALUES])
def test_bytes_at_random(name, tmp_path):
    readers = BINARY[name][1] if name in BINARY else (VALUES[name][1],)
    path = tmp_path / name

    @checked
    @given(st.binary(max_size=200))
    def try_bytes(data):
        path.write_bytes(data)
        for read in readers:
            offer(read, path)

    try_bytes()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_at_random(name, tmp_path):
    good, read = VALUES[name]
    path = tmp_path / name

    @checked
    @given(st.one_of(JSON, spoiled(good), spoiled(good)))
    def try_value(value):
        write_json(path, value)
        offer(read, path)

    try_value()


@pytest.mark.parametrize("name", VALUES)
def test_a_text_that_was_good(name, tmp_path):
    good, read = VALUES[name]
    text = yaml.safe_dump(good) if name.endswith(".yaml") else json.dumps(good)
    path = tmp_path / name

    @checked
    @given(CHANGES)
    def try_text(changes):
        path.write_bytes(damage(text.encode(), changes))
        offer(read, path)

    try_text()


@pytest.mark.parametrize("pack", [pack_stream, pack_archive])
def test_instructions_at_random(pack, tmp_path):
    "Pickles made of the instructions of the machine, in the frame that torch.save gives them."
    codes = [getattr(pickle, n) for n in pickle.__all__ if isinstance(getattr(pickle, n), bytes)]
    path = tmp_path / "x.pth"

    @checked
    @given(st.lists(st.sampled_from(codes) | st.binary(max_size=6), max_size=30))
    def try_instructions(parts):
        path.write_bytes(pack(b"\x80\x02" + b"".join(parts) + b"."))
        for read in (read_published, read_predictions):
            offer(read, path)

    try_instructions()


def test_a_header_of_an_array_that_breaks_off(tmp_path):
    "NumPy's reader tokenizes it, and lets the tokenizer's own error through."
    path = tmp_path / "x.npz"
    write_golden(path)
    good = path.read_bytes()
    path.write_bytes(damage(good, [("flip", 0.65625, 1, b"\0")]))
    offer(load_case, path)
