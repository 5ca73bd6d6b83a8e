"Truth of videos in today's forms: public masks of Ref-YouTube-VOS, MeViS v2, ReVOS, Long-RVOS."

import json
import shutil
import zipfile

import numpy as np
import pytest

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.check import check_dataset
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.index import NoTruth
from rvos_nb.data.masks import encode_mask, write_tree
from rvos_nb.data.refshapes import write
from rvos_nb.evaluate import evaluate
from rvos_nb.submit import submission

SIZE = (48, 72)


def make(root, layout, split="valid", videos=2, frames=6, level="easy"):
    write(root, split, level, videos, seed=5, frames=frames, size=SIZE, layout=layout)
    return root


def answer(root, split, run, change=lambda masks: masks):
    "A run that answers the truth, changed; nothing where there is no truth."
    data = open_dataset(root, split)
    for e in data:
        masks = data.masks(e)
        if masks is None:
            masks = np.zeros((len(data.videos[e.video].frames), *SIZE), bool)
        folder = run / "Annotations" / e.video / e.id
        folder.mkdir(parents=True, exist_ok=True)
        write_tree(folder, data.videos[e.video].frames, change(masks.copy()))
    return run


def publish(usual, root, with_objects=True):
    "The valid split as its masks were made public: no meta_expressions/, a tree for each sentence."
    data = open_dataset(usual, "valid")
    shutil.copytree(usual / "valid/JPEGImages", root / "valid/JPEGImages")
    for e in data:
        folder = root / "valid/Annotations" / e.video / e.id
        folder.mkdir(parents=True)
        for name, mask in zip(data.videos[e.video].frames, data.masks(e)):
            if mask.any():
                (folder / f"{name}.png").write_bytes(encode_mask(mask))
    listing = json.loads((usual / "meta_expressions/valid/meta_expressions.json").read_text())
    plain = json.loads(json.dumps(listing))
    for video in plain["videos"].values():
        for entry in video["expressions"].values():
            entry.pop("obj_id"), entry.pop("kind")
    (root / "valid/meta_expressions.json").write_text(json.dumps(plain))
    chosen = listing if with_objects else plain
    (root / "valid/meta_expressions_challenge.json").write_text(json.dumps(chosen))
    return root


@pytest.fixture
def both(tmp_path):
    usual = make(tmp_path / "usual", "ref-youtube-vos")
    return usual, publish(usual, tmp_path / "public"), answer(usual, "valid", tmp_path / "run")


def shift(masks):
    return np.roll(masks, 2, 2)


def test_public_masks_score_as_label_maps_do(both, tmp_path):
    usual, public, _ = both
    run = answer(usual, "valid", tmp_path / "shifted", shift)
    assert open_dataset(public).layout == "ref-youtube-vos"
    first, second = (evaluate(root, run) for root in (usual, public))
    assert first == second and 0 < first["J&F"] < 100
    (public / "own.json").write_text("{}")  # nobody published how much there is
    assert check_dataset(public).faults == []


def test_public_masks_need_no_object_ids(both, tmp_path):
    usual, _, run = both
    public = publish(usual, tmp_path / "plain", with_objects=False)
    assert {e.object_id for e in open_dataset(public)} == {None}
    assert evaluate(public, run)["J&F"] == 100


def test_public_masks_beside_the_usual_lists(both, tmp_path):
    "The archive unpacked into the tree that a user had: its list and its masks are taken."
    usual, public, run = both
    mixed = tmp_path / "mixed"
    shutil.copytree(usual / "meta_expressions", mixed / "meta_expressions")
    (mixed / "meta_expressions/valid/refshapes.json").unlink()
    shutil.copytree(public / "valid", mixed / "valid")
    path = mixed / "meta_expressions/valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    for video in listing["videos"].values():
        for entry in video["expressions"].values():
            del entry["obj_id"]
    path.write_text(json.dumps(listing))
    assert evaluate(mixed, run)["J&F"] == 100
    (mixed / "valid/meta_expressions_challenge.json").unlink()
    assert evaluate(mixed, run)["J&F"] == 100


def test_a_lost_tree_is_unscored_and_named(both):
    _, public, run = both
    data = open_dataset(public)
    e = next(iter(data))
    shutil.rmtree(public / "valid/Annotations" / e.video / e.id)
    result = evaluate(public, run)
    assert list(result["unscored"]) == [f"{e.video}/{e.id}"] and result["J&F"] == 100
    (fault,) = [why for *_, why in check_dataset(public).faults if "no masks" in why]
    assert f"{e.video}/{e.id}" in fault
    shutil.rmtree(public / "valid/Annotations")
    with pytest.raises(NoTruth, match=r"data/README\.md"):
        evaluate(public, run)


def test_submit_says_that_the_server_is_gone(both, tmp_path, capsys):
    usual, _, run = both
    with pytest.raises(SystemExit) as end:
        main(["submit", str(run), str(tmp_path / "s.zip"), "--data", str(usual)])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "switched off" in said and "rvos evaluate" in said


def test_public_masks_are_trained_on_sentence_by_sentence(both):
    from rvos_nb.data.training import ClipStage

    _, public, _ = both
    source = {"folder": str(public), "split": "valid"}
    stage = ClipStage([source], sizes=[48], long=120, clips=4, augment="")
    batch = stage.batch(0, 0)
    assert len(batch.masks) == 4 and batch.masks.any((2, 3)).any(1).all()


@pytest.mark.parametrize("split, name", [("valid_u", "_v2"), ("valid_u", "_v2_release")])
def test_mevis_of_the_second_version(tmp_path, split, name):
    root = make(tmp_path / "mevis", "mevis", split)
    old = root / split / "meta_expressions.json"
    before = list(open_dataset(root, split))
    new = old.with_name(f"meta_expressions{name}.json")
    shutil.copy(old, new)
    listing = json.loads(old.read_text())
    del listing["videos"]["easy-00001"]
    old.write_text(json.dumps(listing))
    assert list(open_dataset(root, split)) == before  # the second version is read
    old.unlink()
    data = open_dataset(root, split)
    assert data.layout == "mevis" and list(data) == before
    assert check_dataset(root).faults == [] and list(check_dataset(root).counts) == [split]
    result = evaluate(root, answer(root, split, tmp_path / "run"), split=split)
    assert result["J&F"] == 100 and result["N-acc"] == result["T-acc"] == 100


def test_revos_counts_its_kinds_alike(tmp_path):
    root = make(tmp_path / "revos", "revos", videos=3, level="all")
    data = open_dataset(root)
    assert data.layout == "revos" and not data.faults
    assert {e.kind for e in data} == {"referring", "reasoning", "type 2"}
    run = answer(root, "valid", tmp_path / "run")
    for e in data:  # one kind is answered with nothing
        if e.kind == "reasoning":
            for path in (run / "Annotations" / e.video / e.id).iterdir():
                path.write_bytes(encode_mask(np.zeros(SIZE, bool)))
    result = evaluate(root, run)
    kinds = result["kinds"]
    middle = (kinds["referring"]["J&F"] + kinds["reasoning"]["J&F"]) / 2
    assert kinds["referring"]["J&F"] == 100 and abs(result["overall"]["J&F"] - middle) < 1e-3
    assert result["overall"]["J&F"] != result["J&F"]


def test_revos_is_packed_by_the_paths_of_its_list(tmp_path):
    root = make(tmp_path / "revos", "revos")
    run = answer(root, "valid", tmp_path / "run")
    with zipfile.ZipFile(submission(root, run, tmp_path / "s.zip")) as box:
        assert all(name.startswith("valid/easy-") for name in box.namelist())


def test_revos_names_do_not_leave_the_tree(tmp_path):
    root = make(tmp_path / "revos", "revos", videos=1)
    path = root / "meta_expressions_valid_.json"
    listing = json.loads(path.read_text())["videos"]
    (entry,) = listing.values()
    shutil.copytree(root / "JPEGImages/valid/easy-00000", tmp_path / "outside")
    names = ("../../outside", "/etc", "valid//easy-00000", "valid__easy-00000")
    path.write_text(json.dumps({"videos": listing | dict.fromkeys(names, entry)}))
    data = open_dataset(root)
    assert not data.videos and len(data.faults) == 4  # the last name is that of the first
    assert "twice" in data.faults["valid__easy-00000"]


def test_long_rvos_asks_when_the_object_is_there(tmp_path):
    root = make(tmp_path / "long", "long-rvos", videos=3, frames=8)
    data = open_dataset(root)
    assert {e.kind for e in data} <= {"static", "dynamic", "hybrid"} and not data.faults
    right = evaluate(root, answer(root, "valid", tmp_path / "right"), tmp_path / "scores")
    assert right["J&F"] == right["tIoU"] == right["vIoU"] == 100
    assert "tIoU" in right["kinds"]["static"]
    assert "tIoU" in (tmp_path / "scores/expressions.csv").read_text().splitlines()[0]

    def leave_early(masks):
        masks[4:] = False
        return masks

    early = evaluate(root, answer(root, "valid", tmp_path / "early", leave_early))
    shown = [data.masks(e).any((1, 2)) for e in data]
    expected = 100 * np.mean([s[:4].sum() / s.sum() for s in shown])
    assert abs(early["tIoU"] - expected) < 1e-3 and early["tIoU"] == early["vIoU"]


def test_long_rvos_without_masks(tmp_path):
    "The split for a competition is told by the folder's name, and asked about all the same."
    root = make(tmp_path / "long_rvos", "long-rvos", "test")
    shutil.rmtree(root / "test/Annotations")
    data = open_dataset(root, "test")
    assert data.layout == "long-rvos" and all(data.masks(e) is None for e in data)
    assert check_dataset(root).faults == []
    run = answer(root, "test", tmp_path / "run")
    with zipfile.ZipFile(submission(root, run, tmp_path / "s.zip", "test")) as box:
        assert box.namelist()[0].startswith("test-easy-00000/0/")
    (root / "test/frame_types.json").write_text("{}")
    shutil.move(root, tmp_path / "any")
    assert open_dataset(tmp_path / "any", "test").layout == "long-rvos"


@pytest.mark.parametrize("value", [[1], "x", -1, True, {}])
def test_odd_objects_of_long_rvos(tmp_path, value):
    root = make(tmp_path / "long", "long-rvos", videos=1)
    path = root / "valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    listing["videos"]["easy-00000"]["expressions"]["0"]["obj_id"] = value
    path.write_text(json.dumps(listing))
    data = open_dataset(root)
    assert list(data.faults) == ["easy-00000/0"] and "whole number" in data.faults["easy-00000/0"]


def test_the_new_layouts_are_asked_as_videos(tmp_path):
    from rvos_nb.protocols import find_protocol

    for layout in ("revos", "long-rvos"):
        data = open_dataset(make(tmp_path / layout, layout, videos=1))
        assert find_protocol(data) == find_protocol(data, "mevis")
        with pytest.raises(Problem, match="one of"):
            find_protocol(data, "a2d")
