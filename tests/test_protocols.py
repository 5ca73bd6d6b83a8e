"The five protocols: whole runs on small trees, bad input, killed runs, and the rules written out."

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIZE, TREES, write_davis, write_refcoco
from PIL import Image

from rvos_nb import candidates, clip_result, predict, segmentation
from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.datasets import LAYOUT_OPENERS, open_dataset
from rvos_nb.data.masks import PALETTE, read_labels, rle_decode, rle_encode
from rvos_nb.data.video import open_clip, write_video
from rvos_nb.label_maps import merge_annotators
from rvos_nb.models import zoo
from rvos_nb.models.referring import Candidates, Referring
from rvos_nb.protocols import run_protocol
from rvos_nb.single_frames import (
    frame_window,
    predict_frames,
    query_masks,
    read_windows,
    score_file,
    score_frames,
    score_table,
)
from rvos_nb.verify.cases import load_case

FRAMES = ["a2d-sentences", "jhmdb-sentences", "refcoco"]


@pytest.fixture(scope="module")
def model():
    return zoo.load("referformer-tiny")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return {name: write(root / name) for name, write in TREES.items()}


@pytest.fixture
def tree(trees, tmp_path):
    return lambda name: Path(shutil.copytree(trees[name], tmp_path / name))


def edit(path, change):
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found) or found))


def files(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("name", TREES)
def test_a_tree_tells_its_layout(trees, name):
    data = open_dataset(trees[name], "")
    assert (
        data.layout == name
        and not data.faults
        and len(data)
        and data.split == LAYOUT_OPENERS[name][1]
    )
    for e in data:
        m = data.masks(e)
        assert (
            m.dtype == bool
            and m.shape[1:] == SIZE
            and m.any()
            and (e.frame is None) == (name == "ref-davis17")
        )


def test_davis_is_told_by_its_rule_not_only_by_its_name(trees, tmp_path):
    shutil.copytree(trees["ref-davis17"], tmp_path / "anything")
    assert open_dataset(tmp_path / "anything").layout == "ref-davis17"
    assert open_dataset(tmp_path / "anything", layout="ref-youtube-vos").layout == "ref-youtube-vos"
    write_davis(tmp_path / "two", annotators=2)
    assert open_dataset(tmp_path / "two").layout == "ref-youtube-vos"


@pytest.mark.parametrize("name", FRAMES)
def test_single_frames(trees, model, tmp_path, name):
    data = open_dataset(trees[name], "")
    report, lines = run_protocol(trees[name], tmp_path / "out", model)
    assert not report.failed and set(report.done) == set(data.videos) and "mAP" in lines
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) == 5 * len(data) and {r["image_id"] for r in results} == {
        data.sample_id(e) for e in data
    }
    assert all(
        rle_decode(r["segmentation"]).shape == SIZE and 0 <= r["score"] <= 1 for r in results
    )
    scores = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (
        scores["samples"] == len(data)
        and scores["mask"]["mIoU"] > 40
        and ("box" in scores) == (name == "refcoco")
    )
    assert set(scores["AP"]) == {"all", "best"}


@pytest.mark.parametrize("annotators", [4, 3])
def test_davis(model, tmp_path, annotators):
    root = write_davis(tmp_path / "davis", annotators=annotators)
    report, lines = run_protocol(root, tmp_path / "out", model, protocol="davis", clip_length=2)
    data = open_dataset(root)
    assert not report.failed and lines.count("anno_") == annotators and "mean" in lines
    for v in data.videos:
        for a in range(annotators):
            maps = sorted((tmp_path / f"out/valid/anno_{a}" / v).iterdir())
            assert [p.name for p in maps] == [f"{t:05d}.png" for t in range(5)]
            assert Image.open(maps[0]).getpalette() == list(PALETTE)
            each = [e for e in data.expressions[v] if int(e.id) % annotators == a]
            claims = []
            for e in each:  # the rule of `protocols`, with all planes in memory
                arrays, _ = candidates.load_candidates(
                    tmp_path / f"out/candidates/{v}/{e.id}.safetensors"
                )
                p = (
                    torch.nn.functional.interpolate(
                        torch.tensor(arrays["logits"])[None], SIZE, mode="bilinear"
                    )[0]
                    .sigmoid()
                    .numpy()
                )
                claims.append(np.where(p < 0.5, 0, p))
            wanted = np.concatenate(
                [np.full((1, *claims[0].shape), 0.1, np.float32), np.stack(claims)]
            ).argmax(0)
            assert all((read_labels(p) == w).all() for p, w in zip(maps, wanted))


def test_merging_a_run_without_candidates(trees, tmp_path):
    data = open_dataset(trees["ref-davis17"])
    from rvos_nb.data.masks import write_mask

    for e in data:
        for n, m in zip(data.videos[e.video].frames, data.masks(e)):
            write_mask(tmp_path / f"run/Annotations/{e.video}/{e.id}/{n}.png", m)
    victim = tmp_path / f"run/Annotations/{e.video}/{e.id}/00002.png"
    spare = victim.read_bytes()
    victim.unlink()
    report = merge_annotators(data, tmp_path / "run", tmp_path / "out")
    assert (
        list(report.failed) == [e.video]
        and "00002.png" in report.failed[e.video]
        and not (tmp_path / f"out/anno_3/{e.video}").exists()
    )
    victim.write_bytes(spare)
    assert merge_annotators(data, tmp_path / "run", tmp_path / "out").done == [e.video]
    assert (
        read_labels(tmp_path / f"out/anno_3/{e.video}/00002.png") == data.labels(e.video)[2]
    ).all()


def test_the_command(trees, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(
            [
                "predict",
                "--data",
                str(trees["refcoco"]),
                "--split",
                "refcoco+_val",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "mAP" in said and "P@1 " in said and (tmp_path / "out/results.json").exists()
    for argv, word in (
        (["--protocol", "davis"], "refcoco"),
        (["--layout", "a2d-sentences"], "a2d_sentences_single_frame"),
        (["--split", "testA"], "refcoco+_val"),
        (["--memory", "much"], "memory"),
    ):
        with pytest.raises(SystemExit):
            main(
                [
                    "predict",
                    "--data",
                    str(trees["refcoco"]),
                    "--out",
                    str(tmp_path / "other"),
                    *argv,
                ]
            )
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word in err and not (tmp_path / "other").exists(), err


# bad input: one fault, and the rest is done


def test_films_and_frames_that_are_not_there(tree, model, tmp_path):
    root = tree("a2d-sentences")
    rows = root / "a2d_sentences_single_frame_test_annotations.json"
    (root / "Release/clips320H/test-easy-00000.mp4").unlink()
    odd = [
        ["a dog", "test-easy-00001", 99, 1],
        ["a dog", "test-easy-00001", 0, 1],
        ["a dog", "test-easy-00001", "1 (copy)", 1],
        [" ", "test-easy-00001", 1, 1],
        ["a dog", "test-easy-00001", 1],
        "row",
        None,
        ["a dog", "../test-easy-00001", 1, 1],
        ["a dog", "test-easy-00001", 1, "1 (copy)"],
        [5, "test-easy-00001", 1, 1],
    ]
    edit(rows, lambda found: found + odd)
    report, lines = run_protocol(root, tmp_path / "out", model)
    assert (
        report.done == ["test-easy-00001"]
        and "test-easy-00001/f_99_i_1" in report.failed
        and "test-easy-00000.mp4" in report.failed["test-easy-00000"]
        and len(report.failed) == 2 + 8
    )
    assert all("\n" not in why and "expected" in why for why in report.failed.values())
    assert "mAP" in lines


def test_a_film_cut_short(tree, model, tmp_path):
    root = tree("a2d-sentences")
    film = root / "Release/clips320H/test-easy-00000.mp4"
    film.write_bytes(film.read_bytes()[:600])
    report, _ = run_protocol(root, tmp_path / "out", model)
    assert (
        "test-easy-00000" in report.failed
        and report.done == ["test-easy-00001"]
        and sorted(p.name for p in (tmp_path / "out/results").iterdir()) == ["test-easy-00001.json"]
    )


def test_jhmdb_and_refcoco_name_what_is_missing(tree, model, tmp_path):
    root = tree("jhmdb-sentences")
    shutil.rmtree(root / "Rename_Images/easy/test-easy-00000")
    (root / "puppet_mask/easy/test-easy-00001/puppet_mask.mat").write_bytes(b"no Matlab file")
    with pytest.raises(Problem, match=r"puppet_mask\.mat"):
        run_protocol(root, tmp_path / "out", model)
    assert sorted(p.name for p in (tmp_path / "out/results").iterdir()) == ["test-easy-00001.json"]
    root = tree("refcoco")
    min((root / "train2014").iterdir()).unlink()
    listing = root / "refcoco+/instances_refcoco+_val.json"

    def change(found):
        found["images"][-1]["caption"] = ""
        found["images"][-2]["file_name"] = "../x.jpg"
        found["annotations"][-3]["segmentation"] = [[1, 2]]

    edit(listing, change)
    data = open_dataset(root, "val")
    assert len(data.faults) == 3 and sum("no such file" in why for why in data.faults.values()) == 1
    report, lines = run_protocol(root, tmp_path / "out2", model)
    assert "left out of the mean" in lines and len(report.failed) == 3


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "[[]]", '{"images": []}', '[["a", "b", 1]]', "[", '{"videos": {}}']
)
@pytest.mark.parametrize("name", FRAMES)
def test_lists_of_another_layout(tree, name, text):
    root = tree(name)
    path = next(
        p
        for p in (
            *root.glob("*single_frame*"),
            *root.glob("*metadata*"),
            *root.glob("*/instances*"),
        )
    )
    path.write_text(text)
    with pytest.raises(Problem) as e:
        open_dataset(root, "")
    assert "\n" not in str(e.value) and path.name in str(e.value)


@pytest.mark.parametrize("name", FRAMES)
def test_fuzzed_lists_never_raise_anything_but_a_problem(tree, name):
    root, rng, odd = (
        tree(name),
        np.random.default_rng(1),
        [None, 3, "", [], {}, "../x", [None], {"a": 1}, 1.5, True, -1, 10**9],
    )
    path = next(
        p
        for p in (
            *root.glob("*single_frame*"),
            *root.glob("*metadata*"),
            *root.glob("*/instances*"),
        )
    )
    whole = path.read_text()
    for _ in range(60):
        at = found = json.loads(whole)
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if not isinstance(at[key], (dict, list)) or rng.random() < 0.2:
                at[key] = odd[rng.integers(len(odd))]
                break
            at = at[key]
        path.write_text(json.dumps(found))
        try:
            data = open_dataset(root, "")
            for e in data:
                data.masks(e)
        except Problem as e:
            assert "\n" not in str(e)
            continue
        assert all(e.text.strip() and 0 <= e.frame < len(data.videos[e.video].frames) for e in data)


def test_two_splits_of_one_name(tree):
    root = write_refcoco(tree("refcoco"), split="refcocog_val")
    with pytest.raises(Problem, match="refcoco\\+_val, refcocog_val"):
        open_dataset(root, "val")
    assert open_dataset(root, "refcocog_val").truth.path.parent.name == "refcocog"


def golden_frames(root):
    "The golden samples in the layout of RefCOCO, with running ids, and their results."
    case = load_case(Path(__file__).parent / "golden/pipeline/a2d_metrics.npz")
    listing, results = (
        json.loads(str(case.arrays[f"in/{k}"])) for k in ("ground_truth", "predictions")
    )
    ids = {i["id"]: n for n, i in enumerate(listing["images"], 1)}
    (root / "train2014").mkdir(parents=True)
    for i in listing["images"]:
        i.update(id=ids[i["id"]], caption="it", file_name=f"COCO_{ids[i['id']]}.jpg")
        Image.new("RGB", (i["width"], i["height"])).save(root / "train2014" / i["file_name"])
    for a in listing["annotations"]:
        a["image_id"] = ids[a["image_id"]]
    for r in results:
        x1, y1, x2, y2 = r["bbox"]
        r.update(image_id=ids[r["image_id"]], bbox=[x1, y1, x2 - x1, y2 - y1])
    (root / "instances_refcoco_val.json").write_text(json.dumps(listing))
    return case.answers, results


def test_frames_as_their_authors_score_them(tmp_path, capsys):
    answers, results = golden_frames(tmp_path / "coco")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    rows = []
    data = open_dataset(tmp_path / "coco", "")
    scores = score_file(data, tmp_path / "run", rows.extend)

    def equal(found, wanted):
        return np.allclose(
            [np.nan if x is None else x for x in found],
            np.where(np.asarray(wanted) < 0, np.nan, 100 * np.asarray(wanted)),
            atol=1e-4,
            equal_nan=True,
        )

    assert len(data) == 40 == scores["samples"] and equal(
        scores["AP"]["all"].values(), answers["coco_stats"]
    )
    for kind, prefix in (("mask", ""), ("box", "bbox_")):
        assert equal(
            [scores[kind][f"P@0.{k}"] for k in range(5, 10)], answers[f"{prefix}precision_at_k"]
        ) and equal(
            [scores[kind]["oIoU"], scores[kind]["mIoU"]],
            [answers[f"{prefix}overall_iou"], answers[f"{prefix}mean_iou"]],
        )
    assert equal([scores["box"][f"P@{k}"] for k in (1, 5, 10)], answers["refexp_precision_1_5_10"])
    assert equal([r["IoU"] for r in rows], answers["per_instance"][:, 0]) and [
        r["expression"] for r in rows
    ] == [str(n) for n in range(1, 41)]
    with pytest.raises(SystemExit) as end:
        main(
            [
                "evaluate",
                str(tmp_path / "coco"),
                str(tmp_path / "run"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert (
        end.value.code == 0
        and f"mIoU {scores['mask']['mIoU']:.1f}" in capsys.readouterr().out
        and json.loads((tmp_path / "out/metrics.json").read_text())["AP"]["best"]
        == scores["AP"]["best"]
    )
    assert (
        (tmp_path / "out/samples.csv").read_text().count("\n") == 41
        and {p.name for p in (tmp_path / "out").iterdir()}
        == {"metrics.json", "samples.csv", "objects.csv", "kinds.csv", "videos.csv", "report.html"}
        and (tmp_path / "out/report.html").read_text().count("<figure>") == 20
    )


SPOILT = {  # what is done to one result: what is said of it
    "another size": (lambda r: r["segmentation"].update(size=[5, 7]), "as the truth has"),
    "too few runs": (lambda r: r["segmentation"].update(counts="0"), "do not fill"),
    "cut": (
        lambda r: r["segmentation"].update(counts=r["segmentation"]["counts"][:-1]),
        "do not fill",
    ),
    "polygons": (lambda r: r.update(segmentation=[[0, 0, 4, 0, 4, 4]]), "no run lengths"),
    "no mask": (lambda r: r.pop("segmentation"), "no run lengths"),
    "size of text": (lambda r: r["segmentation"].update(size=["64", "96"]), "as the truth has"),
    "no score": (lambda r: r.pop("score"), '"score" None'),
    "score nan": (lambda r: r.update(score=float("nan")), '"score" nan'),
    "score true": (lambda r: r.update(score=True), '"score" True'),
    "score text": (lambda r: r.update(score="1"), "\"score\" '1'"),
    "id list": (lambda r: r.update(image_id=[1]), "no result"),
    "no id": (lambda r: r.pop("image_id"), "no result"),
    "id true": (lambda r: r.update(image_id=True), "no result"),
    "empty": (lambda r: r.clear(), "no result"),
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("how", SPOILT)
def test_a_result_that_cannot_be_used_costs_itself_only(trees, name, how):
    data, (spoil, words) = open_dataset(trees[name], ""), SPOILT[how]

    def result(e):
        m = data.masks(e)[0]
        ys, xs = np.nonzero(m)
        code = rle_encode(m)
        return {
            "image_id": data.sample_id(e),
            "score": 0.5,
            "segmentation": {
                "size": list(map(int, code["size"])),
                "counts": code["counts"].decode(),
            },
            "bbox": [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1],
        }

    results = [result(e) for e in data]
    spoil(results[1])
    scores = score_frames(data, results, "results.json")
    assert (
        len(scores["unusable"]) == 1
        and "results.json, entry 1" in scores["unusable"][0]
        and words in scores["unusable"][0]
        and "\n" not in scores["unusable"][0]
    )
    assert (
        scores["missing"] == [data.sample_id(list(data)[1])]
        and np.isclose(scores["mask"]["mIoU"], 100 * (len(data) - 1) / len(data))
        and "unusable, ignored" in score_table(scores)
        and "counted as 0: 1 samples" in score_table(scores)
    )
    if name == "refcoco" and how == "empty":
        for box in ([0, 0, 1], [0, 0, -1, 1], [0, 0, 1, float("inf")], "box", None):
            assert '"bbox"' in score_frames(data, [results[0] | {"bbox": box}])["unusable"][0]


def test_results_about_other_samples_are_said(trees):
    data = open_dataset(trees["a2d-sentences"], "")
    e = next(iter(data))
    good = {
        "image_id": data.sample_id(e),
        "score": 0.5,
        "segmentation": rle_encode(data.masks(e)[0]),
    }
    scores = score_frames(
        data,
        [
            good,
            *(good | {"image_id": f"v_other_f_{k}_i_1"} for k in range(5)),
            good | {"image_id": "v_other_f_1_i_1"},
        ],
    )
    assert (
        len(scores["strays"]) == 1
        and "5 ids" in scores["strays"][0]
        and "'v_other_f_2_i_1', …" in scores["strays"][0]
        and "not asked for, ignored" in score_table(scores)
    )
    assert (
        scores["mask"] == score_frames(data, [good])["mask"]
        and score_frames(data, [good])["strays"] == []
        and len(scores["missing"]) == len(data) - 1
    )
    nothing = score_frames(data, [])
    assert nothing["mask"]["oIoU"] == nothing["mask"]["mIoU"] == nothing["AP"]["all"][
        "AP"
    ] == 0 and len(nothing["missing"]) == len(data)


@pytest.mark.parametrize("text", ["{}", "3", "null", "[", '"results"', "[[[", "PK\x03\x04"])
def test_a_file_that_holds_no_results(trees, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    for where in (tmp_path, tmp_path / "results.json", tmp_path / "nowhere"):
        with pytest.raises(Problem) as e:
            score_file(open_dataset(trees["refcoco"], ""), where)
        assert "\n" not in str(e.value)


def test_a_model_that_gives_one_answer_only(trees, tmp_path):
    class One(Referring):
        def refer(self):
            pass

    report, lines = run_protocol(trees["refcoco"], tmp_path / "out", One())
    assert (
        not report.done
        and all("one answer only" in why for why in report.failed.values())
        and lines == ""
    )


# rules


@pytest.mark.parametrize("seed", range(20))
def test_windows(seed):
    rng = np.random.default_rng(seed)
    frames, length = int(rng.integers(1, 12)), int(rng.integers(1, 9))
    at = int(rng.integers(frames))
    around, place = frame_window(frames, at, length)
    wanted = sorted(
        min(max(i, 0), frames - 1) for i in range(at - length // 2, at - length // 2 + length)
    )
    assert around == wanted and around[place] == at and at not in around[:place]


def test_frames_of_a_video_are_read_once(trees, monkeypatch):
    data = open_dataset(trees["a2d-sentences"], "")
    from rvos_nb import single_frames

    read, real = [], single_frames.read_video

    def counted(video, names):
        for n, f in zip(names, real(video, names=names)):
            read.append(n)
            yield f

    monkeypatch.setattr(single_frames, "read_video", counted)
    asked = [
        ([e.frame for e in es], len(frames), at)
        for es, frames, at in read_windows(data, "test-easy-00000", 3)
    ]
    assert [(a[0][0], a[1], a[2]) for a in asked] == [(0, 3, 0), (3, 3, 1), (5, 3, 1)] and all(
        len(set(a[0])) == 1 for a in asked
    )
    assert read == ["00000", "00001", "00002", "00003", "00004", "00005"]


@pytest.mark.parametrize("size", [(31, 45), (97, 64), (120, 33)])
def test_odd_sizes(model, size):
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    a = model.respond(frames, ["the red circle", "it"], at=1)
    masks = query_masks(a.logits[1], a.inner, a.size)
    assert (
        masks.shape == (5, *size)
        and a.logits.shape[-2] * 4 % 32 == 0
        and a.logits.shape[-1] * 4 % 32 == 0
    )
    x = (
        torch.nn.functional.interpolate(a.logits[1][None], scale_factor=4, mode="bilinear")[
            0, :, : a.inner[0], : a.inner[1]
        ]
        .sigmoid()
        .numpy()
        > 0.5
    )
    rows, cols = (
        np.arange(n) * m // n for n, m in zip(size, a.inner)
    )  # nearest: floor(i · in / out)
    assert (masks == x[:, rows][:, :, cols]).mean() > 0.999


# a sentence that no encoder reads

LISTS = {
    "ref-davis17": "meta_expressions/valid/meta_expressions.json",
    "a2d-sentences": "a2d_sentences_single_frame_test_annotations.json",
}


@pytest.mark.parametrize("layout", LISTS)
def test_an_overlong_sentence_costs_itself_only(layout, tmp_path):
    root = TREES[layout](tmp_path / "data")
    before = run_protocol(root, tmp_path / "all", layout=layout)[0]
    assert not before.failed
    listing = json.loads((root / LISTS[layout]).read_text())
    if layout == "a2d-sentences":
        listing[0][0] += " and so on" * 40
    else:
        listing["videos"]["easy-00000"]["expressions"]["1"]["exp"] += " and so on" * 40
    (root / LISTS[layout]).write_text(json.dumps(listing))
    report, scores = run_protocol(root, tmp_path / "rest", layout=layout)
    [(unit, why)] = report.failed.items()
    assert (
        report.done == before.done
        and unit.split("/")[0] in ("easy-00000", "test-easy-00000")
        and "64" in why
        and scores
    )
    if layout == "a2d-sentences":
        assert (
            len(json.loads((tmp_path / "all/results.json").read_text()))
            - len(json.loads((tmp_path / "rest/results.json").read_text()))
            == 5
        )
    else:

        def told(out):
            return {
                str(p.relative_to(tmp_path / out)): p.read_bytes()
                for p in (tmp_path / out).glob("*/anno_[023]/**/*.png")
            } | {
                str(p.relative_to(tmp_path / out)): p.read_bytes()
                for p in (tmp_path / out / "Annotations/easy-00001").rglob("*.png")
            }

        assert (
            unit == "easy-00000/1"
            and told("all") == told("rest")
            and (tmp_path / "rest/valid/anno_1/easy-00000/00000.png").exists()
        )
        assert (
            not (tmp_path / "rest/Annotations/easy-00000/1").exists()
            and len(list((tmp_path / "rest/Annotations/easy-00000").iterdir()))
            == len(list((tmp_path / "all/Annotations/easy-00000").iterdir())) - 1
        )


# one's own clip


class Bright(Referring):
    "Means whatever is brighter than the average; answers with as many queries as asked."

    def see(self, frames, short_side=None):
        return torch.as_tensor(frames).float().mean(-1), frames.shape[1:3]

    def refer(self, seen, texts):
        grey, size = seen
        x = (grey - grey.mean())[:, ::4, ::4].expand(len(texts), -1, -1, -1)
        return Candidates(x, x.amax((2, 3)), torch.zeros(*x.shape[:2], 4), size)


def test_a_long_clip_streams(tmp_path, monkeypatch):
    write_video(
        tmp_path / "long.mp4", (np.full((32, 48, 3), 5 * t % 256, np.uint8) for t in range(60)), 10
    )

    def watch(reader, user, act):
        "How many frames were decoded beyond those that something was done to, at each act."
        read, do, decoded, ahead = reader.read_video, getattr(user, act), [], []

        def counted(video):
            for frame in read(video):
                decoded.append(1)
                yield frame

        def noted(*args):
            ahead.append(len(decoded) - len(ahead))
            return do(*args)

        monkeypatch.setattr(reader, "read_video", counted)
        monkeypatch.setattr(user, act, noted)
        return decoded, ahead

    asked = watch(predict, segmentation, "encode_mask")
    painted = watch(clip_result, clip_result, "overlay")
    clip = open_clip(tmp_path / "long.mp4")
    segmentation.segment(clip, ["it"], Bright(), tmp_path / "out", clip_length=6)
    for decoded, ahead in (asked, painted):
        assert len(decoded) == len(ahead) == 60 and max(ahead) <= 3 * 6, (
            "no more than the clips that are written, answered and decoded"
        )
    assert len(list((tmp_path / "out/Annotations/long/0").iterdir())) == 60


def test_a_clip_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.zeros((12, 32, 48, 3), np.uint8))
    monkeypatch.setattr(Bright, "refer", lambda self, seen, texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segmentation.segment(
            open_clip(tmp_path / "clip.mp4"), ["it"], Bright(), tmp_path / "out", clip_length=6
        )
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


# killed

KILL = """
import os, signal, sys, torch
from pathlib import Path
from rvos_nb import files, protocols
from rvos_nb.models.referring import Candidates, Referring, Responses

class Toy(Referring):
    def see(self, frames, short_side=None):
        return torch.as_tensor(frames).float().mean(-1), frames.shape[1:3]

    def refer(self, seen, texts):
        grey, size = seen
        x = (grey - grey.mean())[:, ::4, ::4].expand(len(texts), -1, -1, -1)
        return Candidates(x, x.amax((2, 3)), torch.zeros(*x.shape[:2], 4), size)

    def respond(self, frames, texts, at=0, **sizes):
        grey = torch.as_tensor(frames[at]).float().mean(-1)[::4, ::4]
        q, n = torch.linspace(-20, 20, 5), len(texts)
        x = (grey - grey.mean())[None] + q[:, None, None]
        size = frames.shape[1:3]
        probabilities, boxes = (q / 20).sigmoid().expand(n, 5), torch.full((n, 5, 4), .5)
        return Responses(probabilities, x.expand(n, *x.shape), boxes, size, size)

out, kill, flush, seen = Path(sys.argv[2]), sys.argv[3], files._flush, []
def die(p):
    if kill and kill in str(p): seen.append(p)
    if len(seen) > 3: os.kill(os.getpid(), signal.SIGKILL)
    flush(p)
files._flush = die
protocols.run_protocol(sys.argv[1], out, Toy())[0].check()
"""


@pytest.mark.parametrize("name,where", [("a2d-sentences", ".json"), ("ref-davis17", "anno_")])
def test_killed_and_run_again(trees, tmp_path, name, where):
    def go(out, kill):
        return subprocess.run(
            [sys.executable, "-c", KILL, str(trees[name]), str(tmp_path / out), kill],
            capture_output=True,
        )

    assert go("killed", where).returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").rglob(".tmp-*")), "killed in the middle of a unit"
    for out in ("whole", "killed"):
        done = go(out, "")
        assert done.returncode == 0, done.stderr.decode()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_davis_where_nothing_could_be_read(tree, tmp_path):
    root = tree("ref-davis17")
    for p in (root / "valid/JPEGImages").rglob("*.jpg"):
        p.write_bytes(b"")
    report, lines = run_protocol(root, tmp_path / "out", Bright())
    assert (
        set(report.failed) == {"easy-00000", "easy-00001"}
        and lines == ""
        and not list(tmp_path.rglob("anno_*"))
    )

    def add_odd_names(listing):
        expressions = listing["videos"]["easy-00000"]["expressions"]
        expressions |= {"../x": {"exp": "it"}, "first": {"exp": "it"}}

    edit(root / "meta_expressions/valid/meta_expressions.json", add_odd_names)
    shutil.rmtree(root / "valid/JPEGImages")
    shutil.copytree(write_davis(tmp_path / "again") / "valid/JPEGImages", root / "valid/JPEGImages")
    report, lines = run_protocol(root, tmp_path / "out", Bright())
    assert (
        report.done == ["easy-00000", "easy-00001"]
        and "'first'" in report.failed["easy-00000"]
        and "easy-00000/../x" in report.failed
        and (tmp_path / "out/valid/anno_3/easy-00001").is_dir()
    )


@pytest.mark.parametrize("part", ["logits", "scores", "boxes"])
def test_an_answer_that_is_no_number_fails_its_video(model, trees, tmp_path, monkeypatch, part):
    respond = type(model).respond

    def spoil_answer(self, *args, **sizes):
        answer = respond(self, *args, **sizes)
        return replace(answer, **{part: getattr(answer, part) * float("nan")})

    monkeypatch.setattr(type(model), "respond", spoil_answer)
    data = open_dataset(trees["jhmdb-sentences"], "test")
    report = predict_frames(data, tmp_path / "out", model)
    assert not report.done
    assert all("found NaN; expected numbers" in why for why in report.failed.values())


def test_a_damaged_file_of_results_costs_its_video(model, trees, tmp_path):
    data = open_dataset(trees["jhmdb-sentences"], "test")
    predict_frames(data, tmp_path / "out", model).check()
    first, *others = sorted((tmp_path / "out/results").glob("*.json"))
    first.write_text('[{"image_id": ')
    report = predict_frames(data, tmp_path / "out", model)
    assert list(report.failed) == [first.stem] and len(report.skipped) == len(others) > 0
    assert str(first) in report.failed[first.stem]
