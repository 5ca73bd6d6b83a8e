"""Key frames, evaluation, the submission zip and the report:
scores that are known beforehand, and input that is wrong."""

import io
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import make, write_davis
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rvos_nb.bench.metrics import plain_f, plain_j
from rvos_nb.candidates import save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.index import NoTruth
from rvos_nb.data.masks import (
    encode_mask,
    read_labels,
    rle_encode,
    write_labels,
    write_mask,
    write_tree,
)
from rvos_nb.data.video import open_clip
from rvos_nb.evaluate import evaluate, evaluate_vos, list_findings, score_rows
from rvos_nb.explore import write_overlays, write_report
from rvos_nb.files import read_json, write_json
from rvos_nb.keyframe import choose_key_frames, from_json
from rvos_nb.label_maps import merge_annotators, score_maps
from rvos_nb.metrics import contour_f, jaccard, statistics
from rvos_nb.results import MAX_FILE_BYTES, check_code, open_results
from rvos_nb.stage import StageFailed
from rvos_nb.submit import IncompleteSubmission, submission
from rvos_nb.verify.cases import load_case

GOLDEN = Path(__file__).parent / "golden/pipeline"


@pytest.fixture
def made(tmp_path):
    refshapes.write(tmp_path / "data", "valid", "all", videos=2, seed=4, frames=3, size=(64, 96))
    data = open_dataset(tmp_path / "data")
    for e in data:
        folder = tmp_path / "run/Annotations" / e.video / e.id
        folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, data.masks(e))
    return tmp_path, data


def test_truth_scores_100_and_tables_agree(made):
    tmp, data = made
    result = evaluate(tmp / "data", tmp / "run", tmp / "scores")
    assert (
        result["J&F"]
        == result["J"]
        == result["F"]
        == result["J_recall"]
        == result["objects"]["J&F"]
        == 100
        and result["J_decay"] == 0
    )
    assert result["expressions"] == len(data) and not result["missing"] and not result["unscored"]
    assert (
        result == read_json(tmp / "scores/scores.json")
        and (tmp / "scores/expressions.csv").read_text().count("\n") == len(data) + 1
    )
    assert {p.name for p in (tmp / "scores").iterdir()} == {
        "scores.json",
        "expressions.csv",
        "objects.csv",
        "kinds.csv",
        "videos.csv",
        "missing.csv",
    }
    before = {p.name: p.read_bytes() for p in (tmp / "scores").iterdir()}
    evaluate(tmp / "data", tmp / "run" / "Annotations", tmp / "scores")
    assert before == {p.name: p.read_bytes() for p in (tmp / "scores").iterdir()}


def test_missing_and_broken_masks_score_zero_and_are_named(made):
    tmp, data = made
    first, second, third = list(data)[:3]

    def where(e, i):
        return tmp / "run/Annotations" / e.video / e.id / f"{data.videos[e.video].frames[i]}.png"

    shutil.rmtree(where(first, 0).parent)
    where(second, 1).write_bytes(where(second, 1).read_bytes()[:40])
    write_mask(where(third, 2), np.ones((96, 64), bool))
    result = evaluate(tmp / "data", tmp / "run")
    assert np.isclose(result["J"], 100 * (len(data) - 1 - 2 / 3) / len(data), atol=1e-3)
    why = [result["missing"][f"{e.video}/{e.id}"] for e in (first, second, third)]
    assert (
        why[0].startswith("3 of 3")
        and "cannot be read" in why[1]
        and "96x64" in why[2]
        and len(result["missing"]) == 3
    )


def test_objects_are_averaged_first(made):
    """One object's expressions empty:
    its share of the mean over objects is one object, however many sentences it has."""
    tmp, data = made
    v = next(iter(data.videos))
    sentences = [e for e in data.expressions[v] if e.object_id == data.expressions[v][0].object_id]
    for e in sentences[1:]:
        shutil.rmtree(tmp / "run/Annotations" / v / e.id)
    result = evaluate(tmp / "data", tmp / "run")
    assert np.isclose(
        result["by_object"][f"{v}/{sentences[0].object_id}"]["J"], 100 / len(sentences), atol=1e-3
    )
    assert np.isclose(
        result["objects"]["J"],
        100 * (1 - (1 - 1 / len(sentences)) / result["objects"]["objects"]),
        atol=1e-3,
    )


def test_a_split_without_masks_cannot_be_scored_but_looked_at_and_packed(made):
    tmp, data = made
    shutil.rmtree(tmp / "data/valid/Annotations")
    with pytest.raises(NoTruth, match="cannot be scored"):
        evaluate(tmp / "data", tmp / "run", tmp / "scores")
    assert not (tmp / "scores").exists()
    page = write_report(tmp / "data", {"run": tmp / "run"}, tmp / "r.html", examples=1).read_text()
    assert "no true masks" in page and page.count("<figure>") == 2
    assert len(
        zipfile.ZipFile(submission(tmp / "data", tmp / "run", tmp / "s.zip")).namelist()
    ) == 3 * len(data)


def test_one_broken_annotation_leaves_the_others_scored(made):
    tmp, data = made
    v = next(iter(data.videos))
    path = sorted((tmp / "data/valid/Annotations" / v).glob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:50])
    result = evaluate(tmp / "data", tmp / "run")
    assert set(result["unscored"]) == {
        f"{v}/{e.id}" for e in data.expressions[v]
    } and path.name in next(iter(result["unscored"].values()))
    assert result["J"] == 100


def test_videos_scored_side_by_side_are_those_of_the_formulas(tmp_path):
    """Seven videos in threads, displaced masks:
    J and F of every frame coded plainly, rows in the order of the data set."""
    refshapes.write(tmp_path / "data", "valid", "all", videos=7, seed=9, frames=4, size=(64, 96))
    data, rng, expected = open_dataset(tmp_path / "data"), np.random.default_rng(0), {}
    for e in data:
        truth = data.masks(e)
        found = np.roll(truth, rng.integers(-5, 6, 2), (1, 2))
        (tmp_path / "run" / e.video / e.id).mkdir(parents=True)
        write_tree(tmp_path / "run" / e.video / e.id, data.videos[e.video].frames, found)
        expected[e.video, e.id] = (
            100 * plain_j(truth, found).mean(),
            100 * plain_f(truth, found).mean(),
        )
    rows = list(score_rows(data, open_results(tmp_path / "run")))
    assert {(r["video"], r["expression"]): (r["J"], r["F"]) for r in rows} == expected and [
        (r["video"], r["expression"]) for r in rows
    ] == [*expected]
    result = evaluate(tmp_path / "data", tmp_path / "run")
    assert np.allclose((result["J"], result["F"]), np.mean(list(expected.values()), 0), atol=1e-4)


def test_every_unusable_mask_has_a_line(made):
    tmp, data = made
    e, other = list(data)[:2]
    names = data.videos[e.video].frames

    def at(e, i):
        return tmp / "run/Annotations" / e.video / e.id / f"{names[i]}.png"

    at(e, 0).unlink()
    at(e, 1).unlink()
    at(e, 1).mkdir()
    at(e, 2).unlink()
    os.mkfifo(at(e, 2))
    at(other, 0).unlink()
    at(other, 0).symlink_to(at(other, 0))
    with open(at(other, 1), "wb") as f:
        f.truncate(MAX_FILE_BYTES + 1)
    result = evaluate(tmp / "data", tmp / "run", tmp / "scores")
    lines = (tmp / "scores/missing.csv").read_text().splitlines()
    assert (
        len(lines) == 1 + 5
        and [
            w in line
            for w, line in zip(
                ("no such file", "no plain file", "no plain file", "cannot be read", "at most"),
                lines[1:],
            )
        ]
        == [True] * 5
    )
    assert (
        len(list_findings(result)) == 2
        and "3 of 3" in list_findings(result)[0]
        and np.isclose(result["J"], 100 * (len(data) - 1 - 2 / 3) / len(data), atol=1e-3)
    )
    with pytest.raises(IncompleteSubmission) as e:
        submission(tmp / "data", tmp / "run", tmp / "s.zip")
    assert len(e.value.faults) == 5


def test_a_mask_that_strict_readers_refuse_is_not_packed(made):
    tmp, data = made
    e = next(iter(data))
    path = tmp / "run/Annotations" / e.video / e.id / f"{data.videos[e.video].frames[1]}.png"
    note = PngInfo()
    note.add_text("made", "by hand")
    Image.open(path).save(path, pnginfo=note)
    sound = path.read_bytes()
    path.write_bytes(sound[:-16] + b"sums" + sound[-12:])
    assert evaluate(tmp / "data", tmp / "run")["J"] == 100
    with pytest.raises(IncompleteSubmission, match="check sums") as e:
        submission(tmp / "data", tmp / "run", tmp / "s.zip")
    assert len(e.value.faults) == 1


def test_no_run(made):
    for call in (
        lambda: evaluate(made[0] / "data", made[0] / "nothing"),
        lambda: submission(made[0] / "data", made[0] / "nothing", made[0] / "x.zip"),
        lambda: write_report(made[0] / "data", {}, made[0] / "x.html"),
        lambda: write_overlays(
            made[0] / "data", {"run": made[0] / "run"}, made[0] / "x.mp4", videos=["nobody"]
        ),
    ):
        with pytest.raises(Problem) as e:
            call()
        assert "\n" not in str(e.value)
    assert not (made[0] / "x.zip").exists()


def test_zip(made):
    tmp, data = made
    a, b = (
        submission(tmp / "data", tmp / "run", tmp / "a.zip"),
        submission(tmp / "data", tmp / "run", tmp / "sub" / "b.zip"),
    )
    assert a.read_bytes() == b.read_bytes()
    with zipfile.ZipFile(a) as box:
        assert {n.split("/")[0] for n in box.namelist()} == {
            "Annotations"
        } and box.testzip() is None
        e = next(iter(data))
        name = f"{e.video}/{e.id}/{data.videos[e.video].frames[0]}.png"
        assert box.read(f"Annotations/{name}") == (tmp / "run/Annotations" / name).read_bytes()


def test_zip_mends_the_form_of_masks(made):
    "0/1 and palette masks are as good as 0/255, but a server may not think so."
    tmp, data = made
    e = next(iter(data))
    folder = tmp / "run/Annotations" / e.video / e.id
    mask = data.masks(e)
    Image.fromarray(mask[0].astype(np.uint8)).save(folder / f"{data.videos[e.video].frames[0]}.png")
    p = Image.fromarray(mask[1].astype(np.uint8))
    p.putpalette(bytes([0, 0, 0, 255, 255, 255]))
    p.save(folder / f"{data.videos[e.video].frames[1]}.png")
    with zipfile.ZipFile(submission(tmp / "data", tmp / "run", tmp / "a.zip")) as box:
        box.extractall(tmp / "x")
    for t, f in enumerate(data.videos[e.video].frames):
        with Image.open(tmp / "x/Annotations" / e.video / e.id / f"{f}.png") as im:
            assert im.mode == "L" and (np.array(im) == mask[t] * 255).all()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: f.unlink(), "no such file"),
        (lambda f: f.write_bytes(f.read_bytes()[:30]), "cannot be read"),
        (lambda f: write_mask(f, np.ones((64, 95), bool)), "64x95"),
        (lambda f: shutil.rmtree(f.parent), "none of its 3 masks"),
    ],
)
def test_zip_refuses(made, spoil, words):
    tmp, data = made
    e = list(data)[-1]
    spoil(tmp / "run/Annotations" / e.video / e.id / f"{data.videos[e.video].frames[0]}.png")
    (tmp / "s.zip").write_bytes(b"older")
    with pytest.raises(Problem, match=words) as p:
        submission(tmp / "data", tmp / "run", tmp / "s.zip")
    assert (
        f"{e.video}/{e.id}" in str(p.value)
        and (tmp / "s.zip").read_bytes() == b"older"
        and not list(tmp.glob(".tmp-*"))
    )


def test_zip_refuses_a_data_set_with_faults(made):
    tmp, data = made
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    listing["videos"][next(iter(data.videos))]["expressions"]["0"]["exp"] = ""
    write_json(path, listing)
    with pytest.raises(Problem, match="empty sentence"):
        submission(tmp / "data", tmp / "run", tmp / "s.zip")


def pack(path, members, method=zipfile.ZIP_STORED, mode=0):
    "A zip of (name, bytes), with this type of file in its entries."
    with zipfile.ZipFile(path, "w", method) as box:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            box.writestr(info, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "names, words",
    [
        (["../v.png"], "leaves its folder"),
        (["v/../../x.png"], "leaves its folder"),
        (["v//x.png"], "leaves its folder"),
        (["/v/0/x.png"], "absolute"),
        (["c:/v/x.png"], "absolute"),
        (["v\\x.png"], "backslash"),
        (["v/a\nb.png"], "control character"),
        (["v/0/x.png"] * 2, "twice"),
        (["v/0", "v/0/x.png"], "file and a folder"),
    ],
)
def test_zips_that_reach_out_are_not_read(tmp_path, names, words):
    with pytest.raises(Problem, match=words) as e:
        open_results(pack(tmp_path / "x.zip", [("good/0/a.png", b""), *((n, b"") for n in names)]))
    assert "member" in str(e.value) and "\n" not in str(e.value)


def test_links_bombs_and_odd_zips_are_not_read(tmp_path):
    name, path = "v/0/x.png", tmp_path / "x.zip"
    with pytest.raises(Problem, match="link"):
        open_results(pack(path, [(name, b"/etc/passwd")], mode=stat.S_IFLNK | 0o777))
    for content, method, words in (
        (bytes(1 << 22), zipfile.ZIP_DEFLATED, "unpack"),
        (bytes(9), zipfile.ZIP_LZMA, "compression method"),
        (bytes(MAX_FILE_BYTES + 1), zipfile.ZIP_STORED, "at most"),
    ):
        with pytest.raises(Problem, match=words) as e:
            open_results(pack(path, [(name, content)], method))
        assert name in str(e.value)
    stored = bytearray(pack(path, [(name, bytes(5000)), ("v/1/x.png", bytes(5000))]).read_bytes())
    start = stored.index(b"PK\x01\x02")
    stored[start + 8] |= 1
    path.write_bytes(stored)
    with pytest.raises(Problem, match="encrypted"):
        open_results(path)
    stored[start + 8] &= 254
    second = stored.index(b"PK\x01\x02", start + 4)
    for at in (start, second):
        stored[at + 20 : at + 28] = (9000).to_bytes(4, "little") * 2
    path.write_bytes(stored)
    with pytest.raises(Problem, match="do not overlap"):
        open_results(path)
    path.write_bytes(stored[:200])
    with pytest.raises(Problem, match="no zip"):
        open_results(path)


def test_a_member_that_lies_about_itself_loses_its_mask_only(tmp_path):
    """Sizes in the entry are promises:
    what a member gives is bounded by them, and checked by its sum."""
    good = encode_mask(np.eye(64, 96) > 0)
    path = pack(
        tmp_path / "x.zip", [("v/0/a.png", good), ("v/0/b.png", good)], zipfile.ZIP_DEFLATED
    )
    stored = bytearray(path.read_bytes())
    at = stored.index(b"PK\x01\x02")
    stored[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(stored)
    with open_results(path) as results:
        with pytest.raises(Problem, match=r"a\.png"):
            results.mask("v/0/a.png", (64, 96))
        assert results.mask("v/0/b.png", (64, 96))[0].sum() == 64


def test_run_lengths_are_added_up_before_they_are_decoded(seed=0):
    """What fills the mask is accepted whatever its runs are;
    a character lost, added or changed is refused or is another whole mask."""
    from pycocotools import mask as coco

    rng = np.random.default_rng(seed)
    kept = 0
    for _ in range(300):
        h, w = rng.integers(1, 90, 2)
        code = rle_encode(
            np.repeat(rng.random((h, w)) < rng.random(), rng.integers(1, 5), 1)[:, :w]
        )
        check_code(code, (h, w), "entry")
        counts = bytearray(code["counts"])
        i = rng.integers(len(counts))
        if rng.random() < 0.3:
            del counts[i]
        elif rng.random() < 0.3:
            counts.insert(i, 48 + rng.integers(64))
        else:
            counts[i] ^= 1 << rng.integers(7)
        try:
            check_code(code | {"counts": bytes(counts)}, (h, w), "entry")
        except Problem as e:
            assert "do not fill" in str(e)
            continue
        kept += 1
        whole = coco.decode({"size": [int(h), int(w)], "counts": bytes(counts)})
        assert (
            whole.shape == (h, w)
            and set(np.unique(whole)) <= {0, 1}
            and coco.area({"size": [int(h), int(w)], "counts": bytes(counts)}) == whole.sum()
        )
    assert kept < 60


def test_random_damage_never_ends_the_evaluation(made):
    tmp, data = made
    packed = submission(tmp / "data", tmp / "run", tmp / "s.zip").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(12):
        hurt = bytearray(packed)
        for i in rng.integers(0, len(hurt), 40):
            hurt[i] ^= 1 << rng.integers(8)
        (tmp / "hurt.zip").write_bytes(hurt)
        try:
            result = evaluate(tmp / "data", tmp / "hurt.zip")
        except Problem as e:
            assert "hurt.zip" in str(e)
        else:
            assert result["expressions"] == len(data)


def test_a_zip_scores_as_its_folder(made):
    tmp, data = made
    e = list(data)[1]
    shutil.rmtree(tmp / "run/Annotations" / e.video / e.id)
    (tmp / "run/Annotations/other").mkdir()
    (tmp / "run/Annotations" / e.video / "99").mkdir()
    write_mask(tmp / "run/Annotations" / e.video / "0" / "zzz.png", np.ones((64, 96), bool))
    write_mask(tmp / "run/Annotations/other/0/a.png", np.ones((4, 4), bool))
    write_mask(tmp / "run/Annotations" / e.video / "99" / "a.png", np.ones((4, 4), bool))
    files = [
        (str(p.relative_to(tmp / "run")), p.read_bytes())
        for p in sorted((tmp / "run").rglob("*.png"))
    ]
    folder, whole, bare = (
        evaluate(tmp / "data", tmp / "run"),
        evaluate(tmp / "data", pack(tmp / "a.zip", files)),
        evaluate(
            tmp / "data",
            pack(
                tmp / "b.zip",
                [(n.removeprefix("Annotations/"), c) for n, c in files],
                zipfile.ZIP_DEFLATED,
            ),
        ),
    )
    for key in ("J&F", "videos", "kinds", "by_object"):
        assert folder[key] == whole[key] == bare[key]
    for found in (folder, whole, bare):
        assert (
            len(found["strays"]) == 3
            and all(w in " ".join(found["strays"]) for w in ("other", "99", "zzz.png"))
            and list(found["missing"]) == [f"{e.video}/{e.id}"]
        )
    assert "member" in whole["strays"][0]
    littered = evaluate(
        tmp / "data", pack(tmp / "d.zip", [*files, ("__MACOSX/._a.png", b""), ("notes.txt", b"")])
    )
    assert (
        littered["J&F"] == whole["J&F"]
        and "__MACOSX, notes.txt beside" in littered["strays"][0]
        and len(littered["strays"]) == 4
    )
    with pytest.raises(Problem, match="folder around"):
        evaluate(tmp / "data", pack(tmp / "c.zip", [("mine/" + n, c) for n, c in files]))


def test_masks_of_odd_forms_are_scored_and_named(made):
    tmp, data = made
    first, second, third = list(data)[:3]
    name = data.videos[first.video].frames[0]

    def at(e):
        return tmp / "run/Annotations" / e.video / e.id / f"{name}.png"

    Image.fromarray(data.masks(first)[0].astype(np.uint8)).save(at(first))
    Image.fromarray(np.repeat(data.masks(second)[0][..., None], 3, 2).astype(np.uint8) * 255).save(
        at(second)
    )
    Image.fromarray(data.masks(third)[0]).convert("RGB").save(at(third), "JPEG")
    result = evaluate(tmp / "data", tmp / "run")
    keys = [f"{e.video}/{e.id}" for e in (first, second, third)]
    assert (
        list(result["odd"]) == keys[:2]
        and "1 of 3 masks: values other than" in result["odd"][keys[0]]
        and "colour" in result["odd"][keys[1]]
    )
    assert "no PNG" in result["missing"][keys[2]] and np.isclose(
        result["J"], 100 * (1 - 1 / 3 / len(data)), atol=1e-3
    )
    p = Image.fromarray(data.masks(first)[0].astype(np.uint8))
    p.putpalette([255] * 3 + [0] * 3)
    p.save(at(first))
    with pytest.raises(IncompleteSubmission, match="not black") as e:
        submission(tmp / "data", tmp / "run", tmp / "s.zip")
    assert (
        len(e.value.faults) == 2
        and "entry 0 is not black" in evaluate(tmp / "data", tmp / "run")["odd"][keys[0]]
    )


def test_zip_of_ref_davis17(tmp_path):
    root = write_davis(tmp_path / "davis")
    data = open_dataset(root)
    for e in data:
        folder = tmp_path / "run/Annotations" / e.video / e.id
        folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, data.masks(e))
    merge_annotators(data, tmp_path / "run", tmp_path / "run" / "valid")
    with zipfile.ZipFile(submission(root, tmp_path / "run", tmp_path / "s.zip")) as box:
        assert box.namelist() == [
            f"anno_{a}/{v}/{t:05d}.png" for v in data.videos for a in range(4) for t in range(5)
        ]
        v = next(iter(data.videos))
        with Image.open(io.BytesIO(box.read(f"anno_3/{v}/00001.png"))) as im:
            assert im.mode == "P" and (np.array(im) == data.labels(v)[1]).all()
    shutil.rmtree(tmp_path / "run/valid/anno_2" / v)
    with pytest.raises(IncompleteSubmission, match="none of its 5") as e:
        submission(root, tmp_path / "run", tmp_path / "t.zip")
    assert (
        len(e.value.faults) == 1
        and f"anno_2/{v}" in e.value.faults[0]
        and not (tmp_path / "t.zip").exists()
    )


def test_label_maps_of_a_zip_and_what_is_wrong_with_them(tmp_path):
    root = write_davis(tmp_path / "davis")
    data = open_dataset(root)
    v, w = data.videos
    for n in range(4):
        for u in data.videos:
            for t, labels in enumerate(data.labels(u)):
                write_labels(tmp_path / f"maps/anno_{n}/{u}/{t:05d}.png", labels)
    packed = submission(root, tmp_path / "maps", tmp_path / "s.zip")
    assert (
        score_maps(data, packed)[0] == score_maps(data, tmp_path / "maps")[0]
        and score_maps(data, packed)[0]["mean"]["J&F"] == 100
    )
    assert submission(root, packed, tmp_path / "t.zip").read_bytes() == packed.read_bytes()

    def at(a, u, t):
        return tmp_path / f"maps/anno_{a}/{u}/{t:05d}.png"

    at(0, v, 1).unlink()
    Image.open(at(0, v, 2)).convert("RGB").save(at(0, v, 2))
    write_labels(at(0, v, 3), np.zeros((4, 4), np.uint8))
    many = read_labels(at(1, v, 0))
    many[0, 0] = 21
    write_labels(at(1, v, 0), many)
    shutil.rmtree(at(2, w, 0).parent)
    write_labels(at(3, w, 9), many)
    scores, notes = score_maps(data, tmp_path / "maps")
    assert [len(notes[k]) for k in notes] == [5, 1, 0] and all(
        any(x in line for line in notes["counted as empty"])
        for x in ("no such file", "mode RGB", "4x4", "object 21", "none of its 5")
    )
    assert scores["anno_3"]["J&F"] == 100 > scores["anno_0"]["J&F"] and [
        scores[f"anno_{a}"]["J"] for a in (1, 2)
    ] == [
        100
        * sum(len(np.unique(data.labels(u)[0])) - 1 for u in kept)
        / sum(len(np.unique(data.labels(u)[0])) - 1 for u in data.videos)
        for kept in ([w], [v])
    ]
    path = root / "valid/Annotations" / v / f"{data.videos[v].frames[0]}.png"
    path.write_bytes(b"")
    again, notes = score_maps(open_dataset(root), tmp_path / "maps")
    assert (
        again["anno_0"]["J&F"] == 100
        and len(notes["left out of the mean"]) == 1
        and path.name in notes["left out of the mean"][0]
    )
    with pytest.raises(IncompleteSubmission) as e:
        submission(root, tmp_path / "maps", tmp_path / "u.zip")
    assert len(e.value.faults) == 4 and not (tmp_path / "u.zip").exists()


def test_zip_of_mevis_has_no_folder_around(tmp_path):
    for t in range(2):
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(
            (
                (tmp_path / "mevis/valid/JPEGImages/v").mkdir(parents=True, exist_ok=True)
                or tmp_path / "mevis/valid/JPEGImages/v"
            )
            / f"{t:05d}.jpg"
        )
    write_json(
        tmp_path / "mevis/valid/meta_expressions.json",
        {
            "videos": {
                "v": {
                    "frames": ["00000", "00001"],
                    "expressions": {"0": {"exp": "both birds"}, "1": {"exp": "a bird"}},
                }
            }
        },
    )
    for e in "01":
        for t in range(2):
            write_mask(tmp_path / "run/Annotations/v" / e / f"{t:05d}.png", np.eye(32, 48) > 0)
    with zipfile.ZipFile(
        submission(tmp_path / "mevis", tmp_path / "run", tmp_path / "s.zip", "valid")
    ) as box:
        assert box.namelist() == [f"v/{e}/{t:05d}.png" for e in "01" for t in range(2)]
    assert (
        submission(tmp_path / "mevis", tmp_path / "s.zip", tmp_path / "t.zip", "valid").read_bytes()
        == (tmp_path / "s.zip").read_bytes()
    )


def golden_mevis(root):
    "The golden case of MeViS as a tree of files and a run."
    case = load_case(GOLDEN / "mevis_eval.npz")
    listing = json.loads(str(case.arrays["in/meta_expressions"]))
    codes = json.loads(str(case.arrays["in/mask_dict"]))
    for v, about in listing["videos"].items():
        if v == "missing_video":
            about["frames"] = [
                f"{t:05d}" for t in range(len(codes["0"]))
            ]  # the case lists one frame of it, and borrows an annotation of more
        size = next(
            c["size"]
            for e in about["expressions"].values()
            for a in e["anno_id"]
            for c in codes[str(a)]
            if c
        )
        (root / "data/valid_u/JPEGImages" / v).mkdir(parents=True)
        for f in about["frames"]:
            Image.new("RGB", size[::-1]).save(root / "data/valid_u/JPEGImages" / v / f"{f}.jpg")
        for e in about["expressions"]:
            if (key := f"in/{v}/{e}") in case.arrays:
                (root / "run" / v / e).mkdir(parents=True)
                write_tree(root / "run" / v / e, about["frames"], case.arrays[key] > 0)
    write_json(root / "data/valid_u/meta_expressions.json", listing)
    write_json(root / "data/valid_u/mask_dict.json", codes, None)
    return case


def test_mevis_as_its_authors_score_it(tmp_path):
    case = golden_mevis(tmp_path)
    result, published = (
        evaluate(tmp_path / "data", tmp_path / "run", split="valid_u"),
        json.loads(str(case.answers["per_expression"])),
    )
    assert (
        np.allclose([result[k] for k in ("J", "F", "J&F")], 100 * case.answers["J_F_JF"], atol=1e-4)
        and result["expressions"] == len(published) == 13
    )
    rows = {
        f"{r['video']}_{r['expression']}": (r["J"] / 100, r["F"] / 100)
        for r in score_rows(
            open_dataset(tmp_path / "data", "valid_u"), open_results(tmp_path / "run")
        )
    }
    assert rows.keys() == published.keys() and all(
        np.allclose(rows[k], published[k], atol=1e-9) for k in rows
    )


def test_davis_as_its_authors_score_it(tmp_path):
    """The golden label maps as palette PNGs, in a tree of the data set:
    both tasks of the official evaluation."""
    case = load_case(GOLDEN / "davis17_eval.npz")
    published = json.loads(str(case.answers["results"]))
    names = ("J&F", "J", "J_recall", "J_decay", "F", "F_recall", "F_decay")
    listing, refused = {}, 0
    (tmp_path / "davis/ImageSets/2017").mkdir(parents=True)
    for v in dict.fromkeys(n.split("/")[1] for n in case.arrays):
        truth = case.arrays[f"in/{v}/gt"]
        frames = [f"{t:05d}" for t in range(len(truth))]
        listing[v] = {
            "frames": frames,
            "expressions": {str(i): {"exp": "it", "obj_id": str(i // 4 + 1)} for i in range(4)},
        }
        for t, f in enumerate(frames):
            write_labels(tmp_path / f"data/valid/Annotations/{v}/{f}.png", truth[t])
            write_labels(tmp_path / f"davis/Annotations/480p/{v}/{f}.png", truth[t])
            (tmp_path / f"data/valid/JPEGImages/{v}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", truth.shape[:0:-1]).save(
                tmp_path / f"data/valid/JPEGImages/{v}/{f}.jpg"
            )
            for a in range(4):
                write_labels(
                    tmp_path / f"run/anno_{a}/{v}/{f}.png", case.arrays[f"in/{v}/anno_{a}"][t]
                )
    write_json(tmp_path / "data/meta_expressions/valid/meta_expressions.json", {"videos": listing})
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("\n".join(listing))
    scores, notes = score_maps(
        open_dataset(tmp_path / "data", layout="ref-davis17"), tmp_path / "run"
    )
    assert not any(notes.values()) and np.allclose(
        [scores["mean"][n] for n in names],
        100 * np.array(published["unsupervised/mean_of_annotators"]),
        atol=1e-7,
    )
    for a in range(4):
        assert np.allclose(
            [scores[f"anno_{a}"][n] for n in names],
            100 * np.array(published[f"unsupervised/anno_{a}"]["global_"]),
            atol=1e-7,
        )
        wanted = published[f"semi-supervised/anno_{a}"]
        if isinstance(wanted, str):
            refused += 1
            with pytest.raises(Problem, match="ids up to"):
                evaluate_vos(tmp_path / "davis", tmp_path / f"run/anno_{a}")
        else:
            assert np.allclose(
                [evaluate_vos(tmp_path / "davis", tmp_path / f"run/anno_{a}")[n] for n in names],
                100 * np.array(wanted["global_"]),
                atol=1e-3,
            )
    assert 0 < refused < 4


def test_mevis_is_scored_over_sentences(tmp_path):
    "Several objects under one sentence: the truth is their union, and a lost sentence counts as 0."
    data = open_dataset(make(tmp_path / "mevis", "mevis", "valid_u"), "valid_u")
    for e in data:
        folder = tmp_path / "run" / e.video / e.id
        folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, data.masks(e))
    assert (
        evaluate(
            tmp_path / "mevis",
            submission(tmp_path / "mevis", tmp_path / "run", tmp_path / "s.zip", "valid_u"),
            split="valid_u",
        )["J&F"]
        == 100
    )
    e = list(data)[-1]
    shutil.rmtree(tmp_path / "run" / e.video / e.id)
    assert np.isclose(
        evaluate(tmp_path / "mevis", tmp_path / "run", split="valid_u")["J&F"],
        100 * (1 - 1 / len(data)),
        atol=1e-3,
    )


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_several_and_none_are_scored_by_kind(tmp_path, level):
    "The truth scores 100 in each kind; silence is right about nobody alone, half a frame never."
    options = dict(videos=2, seed=6, frames=4, size=(48, 72), layout="mevis")
    refshapes.write(tmp_path / "data", "valid_u", level, **options)
    data = open_dataset(tmp_path / "data", "valid_u")
    left = np.arange(72) < 36
    runs = {"truth": lambda m: m, "silent": np.zeros_like, "half": lambda m: m | left}
    scores = {}
    for name, draw in runs.items():
        for e in data:
            folder = tmp_path / name / e.video / e.id
            folder.mkdir(parents=True)
            write_tree(folder, data.videos[e.video].frames, draw(data.masks(e)))
        scores[name] = evaluate(tmp_path / "data", tmp_path / name, tmp_path / "s", "valid_u")
    asked = {kind: sum(e.kind == kind for e in data) for kind in {e.kind for e in data}}
    for name, score in scores.items():
        found = {kind: row["expressions"] for kind, row in score["kinds"].items()}
        assert found == asked and asked["several"] >= 2 and asked["none"] >= 2
        assert score["kinds"]["none"]["J&F"] == score["N-acc"] == (0 if name == "half" else 100)
        assert score["T-acc"] == (0 if name == "silent" else 100)
    assert all(row["J&F"] == 100 for row in scores["truth"]["kinds"].values())
    assert scores["silent"]["kinds"]["several"]["J"] == 0 < scores["half"]["kinds"]["several"]["J"]
    nobody = next(e for e in data if e.kind == "none")
    shutil.rmtree(tmp_path / "silent" / nobody.video / nobody.id)
    lost = evaluate(tmp_path / "data", tmp_path / "silent", split="valid_u")["N-acc"]
    assert lost == pytest.approx(100 * (1 - 1 / asked["none"]), abs=1e-3)  # no answer is no silence


def test_commands(made, capsys):
    from rvos_nb.cli import main

    tmp, data = made

    def rvos(*words):
        try:
            code = main([*map(str, words)])
        except SystemExit as e:
            code = e.code
        return code or 0, capsys.readouterr()

    assert (
        rvos("submit", tmp / "run", tmp / "s.zip", "--data", tmp / "data")[0] == 0
        and (tmp / "s.zip").exists()
    )
    code, said = rvos("evaluate", tmp / "data", tmp / "s.zip", "--out", tmp / "scores")
    assert (
        code == 0
        and "J&F 100.0" in said.out
        and (tmp / "scores/report.html").read_text().count("<figure>") == min(20, len(data)) + 4
    )
    e = next(iter(data))
    shutil.rmtree(tmp / "run/Annotations" / e.video / e.id)
    assert (
        "missing, counted as 0"
        in rvos("evaluate", tmp / "data", tmp / "run", "--out", tmp / "scores")[1].out
    )
    assert (
        rvos("evaluate", tmp / "data", tmp / "run", "--zip", tmp / "u.zip")[0] == 2
        and not (tmp / "u.zip").exists()
    )
    code, said = rvos("submit", tmp / "run", tmp / "t.zip", "--data", tmp / "data")
    assert (
        code
        and f"{e.video}/{e.id}" in said.out
        and "listed above" in said.err
        and not (tmp / "t.zip").exists()
    )


def test_report_is_self_contained_and_escapes(made):
    tmp, data = made
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    for v in listing["videos"].values():
        for e in v["expressions"].values():
            e["exp"] = '<script>alert(1)</script> & "it"'
    write_json(path, listing)
    shutil.rmtree(tmp / "run/Annotations" / next(iter(data.videos)))
    pages = [
        write_report(
            tmp / "data",
            {"first & best": tmp / "run", "again": tmp / "run"},
            tmp / f"{i}.html",
            examples=1,
        ).read_bytes()
        for i in "12"
    ]
    text = pages[0].decode()
    assert (
        pages[0] == pages[1]
        and "<script" not in text
        and "http" not in text.replace("doctype", "")
        and "first &amp; best" in text
    )
    assert "no masks of this expression" in text


def test_overlays_show_a_run_with_holes(made):
    tmp, data = made
    v = next(iter(data.videos))
    shutil.rmtree(tmp / "run/Annotations" / v)
    film = open_clip(write_overlays(tmp / "data", {"run": tmp / "run"}, tmp / "o.mp4", videos=[v]))
    assert len(film.frames) == 3 * len(data.expressions[v])


def candidates(run, e, scores, frames, mask=None):
    save_candidates(
        run / "candidates" / e.video / f"{e.id}.safetensors",
        np.zeros((len(scores), 2, 2)),
        np.array(scores),
        np.zeros((len(scores), 4)),
        {"kind": "logit", "size": [64, 96], "model": "toy", "frames": list(frames)},
    )


def test_key_frames(made):
    tmp, data = made
    for i, e in enumerate(data):
        candidates(
            tmp / "run",
            e,
            [0.2, 0.9, 0.9] if i % 2 else [0.1, 0.2, 0.3],
            data.videos[e.video].frames,
        )
    keys = from_json(choose_key_frames(tmp / "run"))
    assert [keys[e.video][e.id] for e in data][:4] == [2, 1, 2, 1]
    first = (tmp / "run/key_frame.json").read_bytes()
    choose_key_frames(tmp / "run")
    assert (tmp / "run/key_frame.json").read_bytes() == first
    e = list(data)[1]
    write_mask(
        tmp / "run/Annotations" / e.video / e.id / f"{data.videos[e.video].frames[1]}.png",
        np.zeros((64, 96), bool),
    )
    other = from_json(choose_key_frames(tmp / "run", "best_nonempty"))[e.video][e.id]
    assert other == (2 if data.masks(e)[2].any() else 0)


def test_key_frames_of_broken_candidates(made):
    tmp, data = made
    good, cut, nan = list(data)[:3]
    for e in (good, cut, nan):
        candidates(
            tmp / "run",
            e,
            [0.1, 0.2, 0.3] if e != nan else [np.nan] * 3,
            data.videos[e.video].frames,
        )
    path = tmp / "run/candidates" / cut.video / f"{cut.id}.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StageFailed) as e:
        choose_key_frames(tmp / "run")
    assert f"{cut.video}/{cut.id}" in str(e.value) and f"{nan.video}/{nan.id}" in str(e.value)
    assert from_json(read_json(tmp / "run/key_frame.json")) == {good.video: {good.id: 2}}
    with pytest.raises(Problem, match="no candidates"):
        choose_key_frames(tmp / "data")
    with pytest.raises(Problem, match="policy"):
        choose_key_frames(tmp / "run", "luck")


def test_rounding_chooses_no_key_frame(made):
    """Scores as of MUTR, which differ in the last bits only: frame 0, and of frames that are really
    better the first."""
    tmp, data = made
    even, late = [e for e in data if data.masks(e).any((1, 2)).all()][:2]
    noise = np.float32([0.7, 0.7, 0.7])
    noise[1:] = np.nextafter(noise[1:], np.float32(1))
    candidates(tmp / "run", even, noise, data.videos[even.video].frames)
    candidates(tmp / "run", late, noise - np.float32([2e-5, 0, 0]), data.videos[late.video].frames)
    for policy in ("score", "best_nonempty"):
        keys = from_json(choose_key_frames(tmp / "run", policy))
        assert keys[even.video][even.id] == 0 and keys[late.video][late.id] == 1


def test_the_surest_mask(made):
    "`mask_score`: drawn frames only, logits and probabilities alike, and the first of equals."
    tmp, data = made
    e = next(iter(data))
    frames = data.videos[e.video].frames
    folder, path = tmp / "run/Annotations" / e.video / e.id, tmp / "run/candidates" / e.video
    about = {"kind": "logit", "size": [64, 96], "model": "toy", "frames": list(frames)}

    def chosen(levels, kind="logit", drawn=(1, 1, 1)):
        logits = np.full((3, 2, 2), -5, np.float32)
        logits[:, 0, 0] = levels
        if kind == "probability":
            logits = 1 / (1 + np.exp(-logits))
        path.mkdir(parents=True, exist_ok=True)
        save_candidates(
            path / f"{e.id}.safetensors",
            logits,
            np.full(3, 0.4),
            np.zeros((3, 4)),
            about | {"kind": kind},
        )
        for name, is_drawn in zip(frames, drawn):
            write_mask(folder / f"{name}.png", np.full((64, 96), bool(is_drawn)))
        return from_json(choose_key_frames(tmp / "run", "mask_score"))[e.video][e.id]

    for kind in ("logit", "probability"):
        assert chosen([1, 2, 3], kind) == 2
        assert chosen([1, 3, 2], kind, (1, 0, 1)) == 2  # the surest one was not drawn
        assert chosen([2, 2, 2], kind) == 0
        assert chosen([-1, -1, 1], kind) == 2
        assert chosen([-1, -1, -1], kind, (0, 0, 0)) == 0  # nothing anywhere
        assert chosen([-1, -1, -1], kind, (0, 1, 1)) == 1  # drawn with a lower threshold
    with pytest.raises(StageFailed, match="kind: found 'mask'"):
        chosen([1, 2, 3], "mask")
    chosen([3, 2, 1])
    (folder / f"{frames[0]}.png").unlink()
    with pytest.raises(StageFailed, match=frames[0]):
        choose_key_frames(tmp / "run", "mask_score")


@pytest.fixture
def tracks(tmp_path):
    """Two videos in both layouts, noisy results,
    one object that enters late, one category that training lacks."""
    rng = np.random.default_rng(0)
    truth = {v: np.zeros((6, 40, 56), np.uint8) for v in ("v2", "v10")}
    truth["v2"][:, 4:20, 4:30] = 1
    truth["v2"][2:, 22:38, 20:50] = 3
    truth["v10"][:, 10:30, 10:40] = 1
    truth["v10"][1, :5] = 255
    found = {v: np.where(rng.random(m.shape) < 0.2, 0, np.roll(m, 2, 2)) for v, m in truth.items()}
    for v in truth:
        found[v][found[v] == 255] = 0
        for t in range(6):
            write_labels(
                tmp_path / "youtube" / "valid" / "Annotations" / v / f"{5 * t:05d}.png", truth[v][t]
            )
            write_labels(tmp_path / "run" / "Annotations" / v / f"{5 * t:05d}.png", found[v][t])
            write_labels(
                tmp_path / "davis" / "Annotations" / "480p" / v / f"{t:05d}.png", truth[v][t]
            )
            write_labels(
                tmp_path / "run-davis" / v / f"{t:05d}.png",
                np.where(found[v][t] == 3, 0, found[v][t]),
            )
    (tmp_path / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "davis" / "ImageSets" / "2017" / "val.txt").write_text("v2\nv10\n")

    def objects(**kw):
        return {
            "objects": {
                o: {"category": c, "frames": [f"{5 * t:05d}" for t in range(first, 6)]}
                for o, (c, first) in kw.items()
            }
        }

    write_json(
        tmp_path / "youtube" / "valid" / "meta.json",
        {
            "videos": {
                "v2": objects(**{"1": ("dog", 0), "3": ("yak", 2)}),
                "v10": objects(**{"1": ("dog", 0)}),
            }
        },
    )
    write_json(
        tmp_path / "youtube" / "train" / "meta.json",
        {"videos": {"x": objects(**{"1": ("dog", 0)})}},
    )
    return tmp_path, truth, found


def test_youtube_vos(tracks):
    """Frames after the first annotation only;
    an average over objects in each group, then over the four."""
    root, truth, found = tracks
    result = evaluate_vos(root / "youtube", root / "run", root / "scores")

    def pair(v, o, start):
        a, b = truth[v][start:] == o, found[v][start:] == o
        return 100 * jaccard(a, b).mean(), 100 * contour_f(a, b).mean()

    (j1, f1), (j2, f2), (j3, f3) = pair("v2", 1, 1), pair("v10", 1, 1), pair("v2", 3, 3)
    expected = {
        "J seen": (j1 + j2) / 2,
        "F seen": (f1 + f2) / 2,
        "J unseen": j3,
        "F unseen": f3,
        "G": ((j1 + j2) / 2 + (f1 + f2) / 2 + j3 + f3) / 4,
    }
    assert (
        all(np.isclose(result[k], v, atol=1e-3) for k, v in expected.items())
        and result["objects"] == 3
        and result == read_json(root / "scores" / "scores.json")
    )
    shutil.rmtree(root / "youtube" / "train")
    alone = evaluate_vos(root / "youtube", root / "run")
    assert "G" not in alone and np.isclose(alone["J"], (j1 + j2 + j3) / 3, atol=1e-3)


def test_davis_semi_supervised(tracks):
    """The first and the last frame are left out, unknown pixels are not;
    objects are those of the first annotation."""
    root, truth, found = tracks
    result = evaluate_vos(root / "davis", root / "run-davis")
    per = [
        [
            statistics(m(truth[v][1:-1] == 1, np.where(found[v] == 3, 0, found[v])[1:-1] == 1))
            for m in (jaccard, contour_f)
        ]
        for v in truth
    ]
    assert result["objects"] == 2 and all(
        np.isclose(result[k], 100 * np.mean([p[i][n] for p in per]), atol=1e-3)
        for k, i, n in (
            ("J", 0, 0),
            ("J_recall", 0, 1),
            ("J_decay", 0, 2),
            ("F", 1, 0),
            ("F_decay", 1, 2),
        )
    )
    write_labels(root / "run-davis" / "v10" / "00002.png", found["v2"][3])
    with pytest.raises(Problem, match=r"v10.*object 3"):
        evaluate_vos(root / "davis", root / "run-davis")


def test_label_maps_that_are_missing_or_wrong(tracks):
    root, _, _ = tracks
    path = root / "run" / "Annotations" / "v10" / "00010.png"
    path.write_bytes(path.read_bytes()[:60])
    (path.parent / "00015.png").unlink()
    write_labels(path.parent / "00020.png", np.zeros((4, 4), np.uint8))
    result = evaluate_vos(root / "youtube", root / "run")
    assert result["missing"].keys() == {"v10"} and result["missing"]["v10"].startswith("3 of 6")
    with pytest.raises(Problem, match="no such folder"):
        evaluate_vos(root / "youtube", root / "nowhere")
    with pytest.raises(Problem, match="layout of DAVIS"):
        evaluate_vos(root, root / "run")
    shutil.rmtree(root / "youtube" / "valid" / "Annotations" / "v2")
    with pytest.raises(Problem, match="no annotation"):
        evaluate_vos(root / "youtube", root / "run")
    (root / "youtube" / "valid" / "meta.json").write_text('{"videos": []}')
    with pytest.raises(Problem, match="another form"):
        evaluate_vos(root / "youtube", root / "run")
