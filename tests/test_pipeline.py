"""Recipes: the winners' graph with tiny models, what is made again and what is not,
faults that are named before anything runs, and kills."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import interpolate

from rvos_nb import pipeline, run_state
from rvos_nb.candidates import load_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask, write_tree
from rvos_nb.files import read_json, write_json
from rvos_nb.keyframe import as_json, choose_key_frames, from_json
from rvos_nb.models import mutr, referformer, soc, uninext, zoo
from rvos_nb.models.text import make_tokenizer
from rvos_nb.pipeline import WorkflowFaults, plan_workflow, run_stage_here, run_workflow
from rvos_nb.propagate import propagate
from rvos_nb.run_state import inspect_stage
from rvos_nb.stage import StageFailed
from rvos_nb.workflow import load_workflow


def tree(folder, *without):
    "Every file below `folder` with its bytes, records and logs aside."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
        and "_run" not in p.parts
        and p.name != ".lock"
        and not {*p.relative_to(folder).parts} & {*without}
    }


def read_zip(path):
    "The files of a zip with their bytes."
    with zipfile.ZipFile(path) as box:
        return {n: box.read(n) for n in box.namelist()}


def states(recipe, given):
    "What a dry run says: {stage: state}. It must not write a byte."
    values, stages = plan_workflow(recipe, given)
    run_state.forget_measures()
    views = []
    for s in stages:
        views.append(inspect_stage(s, Path(values["out"]), views))
    return {v.stage.name: v.state for v in views}


def stale(recipe, given):
    return {n for n, state in states(recipe, given).items() if state == "stale"}


# ---- the winners' graph


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    given = {"data": str(root / "data"), "out": str(root / "out")}
    ends = run_workflow("lsvos2023-tiny", given)
    return given, ends


def test_the_winners_tree(tiny):
    given, ends = tiny
    out, data = Path(given["out"]), open_dataset(given["data"])
    assert {e.state for e in ends} == {"done"} and len(ends) == 25
    refined = {
        "soc": ["AOT"],
        "mutr": ["AOT"],
        "referformer_ft": ["AOT", "DEAOT"],
        "vit-huge": ["DEAOT"],
        "convnext": ["DEAOT"],
        "soc_mutr_referft": ["AOT"],
        "vit_convnext_soc": ["DEAOT"],
    }
    trees = [
        f"{folder}/{name}"
        for folder, by in refined.items()
        for name in ["Annotations", *(f"Annotations_{x}_class_index" for x in by)]
    ]
    trees += [
        "second_ensemble/Annotations_en2",
        "second_ensemble/Annotations_vit_convnext_soc_deaot_vitdeaot_en2_referftdeaot",
    ]
    for name in trees:
        for e in data:
            assert sorted(p.stem for p in (out / name / e.video / e.id).iterdir()) == sorted(
                data.videos[e.video].frames
            ), name
    for folder in refined:
        keys = read_json(out / folder / "key_frame.json")
        assert {v: set(es) for v, es in keys.items()} == {
            v: {e.id for e in es} for v, es in data.expressions.items()
        }
    assert not os.path.isabs(
        os.readlink(out / "soc/Annotations_AOT_class_index")
    )  # the tree may be moved
    assert (out / "soc_mutr_referft/key_frame.json").read_bytes() == (
        out / "soc/key_frame.json"
    ).read_bytes()
    assert (out / "vit_convnext_soc/key_frame.json").read_bytes() == (
        out / "vit-huge/key_frame.json"
    ).read_bytes()


def test_the_submission_is_the_final_ensemble(tiny):
    out = Path(tiny[0]["out"])
    final = out / "second_ensemble/Annotations_vit_convnext_soc_deaot_vitdeaot_en2_referftdeaot"
    assert read_zip(out / "submission.zip") == {
        f"Annotations/{p.relative_to(final)}": p.read_bytes() for p in final.rglob("*.png")
    }


def test_every_round_is_worth_something(tiny):
    score = {
        p.parent.name: read_json(p)["J&F"]
        for p in (Path(tiny[0]["out"]) / "scores").glob("*/scores.json")
    }
    assert len(score) == 17 and score["final"] > max(
        s for n, s in score.items() if n.startswith("predict-")
    )
    table = pipeline.summarise_scores("lsvos2023-tiny", tiny[0])
    assert f"final={score['final']:.1f}" in table.splitlines()[-1] and "submission: " in table


def test_five_models_that_differ(tiny):
    trees = [
        tree(Path(tiny[0]["out"]) / m / "Annotations")
        for m in ("soc", "mutr", "referformer_ft", "vit-huge", "convnext")
    ]
    assert all(a != b for i, a in enumerate(trees) for b in trees[:i])


def test_a_second_run_starts_nothing(tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in Path(tiny[0]["out"]).rglob("*") if p.is_file()}
    ends = run_workflow("lsvos2023-tiny", tiny[0])
    assert {e.state for e in ends if e.name != "generate"} == {"done"} and not any(
        e.seconds for e in ends
    )
    assert {p: p.stat().st_mtime_ns for p in before} == before
    run_workflow("lsvos2023-tiny", tiny[0], dry=True)
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:5] for line in lines if line.startswith("final")]
    assert found == [["final", "done", "2", "0", "0"]]
    assert {
        p: p.stat().st_mtime_ns for p in Path(tiny[0]["out"]).rglob("*") if p.is_file()
    } == before


ENDS = {"score", "submission"}
AFTER = {
    "soc": {"aot-soc", "swap-1", "swap-2", "aot-swap-1", "deaot-swap-2", "en2", "final"},
    "mutr": {"aot-mutr", "swap-1", "aot-swap-1", "en2", "final"},
    "convnext": {"deaot-convnext", "swap-2", "deaot-swap-2", "final"},
}


@pytest.mark.parametrize(
    "change, again",
    [
        ({"soc_side": 104}, {"soc", "keys-soc"} | AFTER["soc"] | ENDS),
        ({"mutr_clip": 2}, {"mutr", "keys-mutr"} | AFTER["mutr"] | ENDS),
        ({"convnext_side": 56}, {"convnext", "keys-convnext"} | AFTER["convnext"] | ENDS),
        ({"threshold_2": 5.0}, {"en2", "final"} | ENDS),
        ({"device": "cpu"}, set()),
    ],
)
def test_exactly_what_depends_on_a_change_is_stale(tiny, change, again):
    found = states("lsvos2023-tiny", {**tiny[0], **change})
    keys = {n for n in found if n.startswith("keys-") and n in again}
    assert {n for n, s in found.items() if s == "stale"} == again - keys and all(
        found[n] == "to do" for n in keys
    )  # whether they run is open: their model may bring its own


def test_a_member_more_is_made_and_only_what_reads_it_again(tiny, tmp_path):
    out = shutil.copytree(tiny[0]["out"], tmp_path / "out", symlinks=True)  # moved, too
    given = dict(tiny[0], out=str(out))
    assert set(states("lsvos2023-tiny", given).values()) == {"done", "skipped"}
    final = next(s for s in load_workflow("lsvos2023-tiny").stages if s.name == "final").parameters[
        "member_dirs"
    ]
    mine = {
        "name": "mine",
        "extends": "lsvos2023-tiny",
        "parameters": {"mine": str(out / "aot/mutr")},
        "stages": [
            {
                "name": "mine",
                "function": "rvos_nb.pipeline:take_member",
                "parameters": {"data_dir": "{data}", "source": "{mine}", "out_dir": "{out}/mine"},
            },
            {
                "name": "final",
                "parameters": {"member_dirs": [*final, "{out}/mine"], "threshold": 5.0},
            },
        ],
    }
    assert {n: s for n, s in states(mine, given).items() if s not in ("done", "skipped")} == {
        "mine": "to do",
        "final": "stale",
        "score": "stale",
        "submission": "stale",
    }
    before = tree(out, "final", "scores", "submission.zip")
    ends = run_workflow(mine, given)
    assert {e.name for e in ends if e.seconds} == {"mine", "final", "score", "submission"}
    assert (
        before.items() <= tree(out, "final").items()
        and len(read_json(out / "second_ensemble/final/run.json")["inputs"]) == 5
    )
    assert (out / "soc/Annotations_AOT_class_index").is_dir()


# ---- five members of four families

SMALL_BODIES = {
    "vit_huge": {"depth": 2, "width": 32, "heads": 2, "windowed": [0]},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    | uninext.BODY_OPTIONS["convnext_large"],
}


def configure_uninext(vocab_size, member):
    "As `tiny_uninext`, with the kind of backbone that the member has."
    backbone = {"convnext": "convnext_large"}.get(member, member)
    options = {"backbone": backbone, "backbone_options": SMALL_BODIES[member]}
    return uninext.tiny_uninext(vocab_size, **options)


MEMBERS = {
    "soc": (soc.SOC, soc.tiny_soc),
    "mutr": (mutr.MUTR, mutr.tiny_mutr),
    "referformer_ft": (referformer.ReferFormer, referformer.tiny_config),
    "vit_huge": (uninext.UNINEXT, partial(configure_uninext, member="vit_huge")),
    "convnext": (uninext.UNINEXT, partial(configure_uninext, member="convnext")),
}


def save_random(member, folder, seed=0):
    "A checkpoint folder of a tiny model that was never trained: right shapes, no skill."
    torch.manual_seed(seed)
    make, configure = MEMBERS[member]
    tokenizer = make_tokenizer(["the red circle on the left", "a small blue square"])
    zoo.save(make(configure(len(tokenizer)), tokenizer).eval(), folder, {"steps": 0})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "The winners' whole graph, each member a random model of the family that it had."
    root = tmp_path_factory.mktemp("mixed")
    for member in MEMBERS:
        save_random(member, root / member)
    given = {name: str(root / name) for name in ("data", "out", *MEMBERS)}
    given |= {"videos": 1, "frames": 3, "scales": [1.0], "flip": False}
    given |= {"mutr_key_frames": "mask_score"}
    return given, run_workflow("lsvos2023-tiny", given, run_stage=run_stage_here)


def test_members_of_several_families(mixed):
    "Checkpoint folders are enough, from models to submission. Nothing is said of what they score."
    given, ends = mixed
    out, data = Path(given["out"]), open_dataset(given["data"])
    assert {e.state for e in ends} == {"done"} and len(ends) == 25
    families = [zoo.read_card(given[m])["family"] for m in MEMBERS]
    assert families == ["soc", "mutr", "referformer", "uninext", "uninext"]
    runs = [m.replace("_huge", "-huge") for m in MEMBERS]
    for member, run in zip(MEMBERS, runs):
        assert read_json(out / run / "run.json")["params"]["model"] == given[member]
    ensembles = ["soc_mutr_referft", "vit_convnext_soc"]
    for run in (*runs, "aot/mutr", "deaot/vit-huge", *ensembles, "second_ensemble/final"):
        for e in data:
            masks = (out / run / "Annotations" / e.video / e.id).iterdir()
            assert {p.stem for p in masks} == set(data.videos[e.video].frames), run
    for ensemble, first in zip(ensembles, ("soc", "vit-huge")):
        assert (out / ensemble / "key_frame.json").read_bytes() == (
            out / first / "key_frame.json"
        ).read_bytes()
    assert read_zip(out / "submission.zip") == {
        f"Annotations/{name}": content
        for name, content in tree(out / "second_ensemble/final/Annotations").items()
    }
    assert not [*out.parent.rglob("*.pth")]


@pytest.mark.parametrize("run", ["vit-huge", "convnext"])
def test_uninext_hands_over_probabilities(mixed, run):
    "A score for each frame beside them, and the surest frame is the key frame: the first such."
    given, out = mixed[0], Path(mixed[0]["out"])
    data, keys = open_dataset(given["data"]), from_json(read_json(out / run / "key_frame.json"))
    for e in data:
        path = out / run / "candidates" / e.video / f"{e.id}.safetensors"
        arrays, about = load_candidates(path)
        probabilities, scores = arrays["logits"], arrays["scores"]
        assert about["kind"] == "probability" and scores.shape == (3,)
        assert 0 <= probabilities.min() < 0.5 < probabilities.max() <= 1
        assert ((scores > 0) & (scores < 1)).all()
        assert keys[e.video][e.id] == scores.argmax()
        large = interpolate(torch.from_numpy(probabilities)[None], about["size"], mode="nearest")
        for p, frame in zip(large[0], data.videos[e.video].frames):
            mask = read_mask(out / run / "Annotations" / e.video / e.id / f"{frame}.png")
            assert np.array_equal(mask, p > 0.5)


def test_key_frames_of_mutr(mixed, tmp_path):
    "Its scores are the same in every frame, so that the published policy takes frame 0."
    run = Path(mixed[0]["out"], "mutr")
    files = sorted((run / "candidates").glob("*/*.safetensors"))
    assert files
    for path in files:
        arrays, _ = load_candidates(path, ["scores"])
        assert np.ptp(arrays["scores"]) < 1e-5
    kept = shutil.copytree(run, tmp_path / "mutr")
    for e in from_json(choose_key_frames(kept, "score")).values():
        assert set(e.values()) == {0}


def test_another_checkpoint_of_a_member_is_noticed(mixed):
    given, _ = mixed
    before = states("lsvos2023-tiny", given)
    assert {*before.values()} <= {"done", "skipped"}
    save_random("mutr", Path(given["mutr"]), seed=1)
    assert stale("lsvos2023-tiny", given) == {"mutr", *AFTER["mutr"], *ENDS}
    save_random("mutr", Path(given["mutr"]))
    assert states("lsvos2023-tiny", given) == before


# ---- a small graph of the same kind, for what has to be done often


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "Two videos, and two trees of masks by somebody else, with key frames."
    root = tmp_path_factory.mktemp("small")
    refshapes.write(root / "data", "valid", "easy", videos=2, seed=5, frames=3, size=(48, 72))
    data = open_dataset(root / "data")
    for name, shift in (("a", 0), ("b", 2)):
        for e in data:
            folder = root / name / "Annotations" / e.video / e.id
            folder.mkdir(parents=True)
            write_tree(folder, data.videos[e.video].frames, np.roll(data.masks(e), shift, 2))
        write_json(
            root / name / "key_frame.json",
            as_json(
                {v: {e.id: i % 3 for i, e in enumerate(es)} for v, es in data.expressions.items()}
            ),
        )
    return root


def small_stage(name, function, parameters, **others):
    "An entry of a recipe; every stage of this graph reads the same data."
    return dict(
        name=name, function=function, parameters={"data_dir": "{data}"} | parameters, **others
    )


SMALL_STAGES = [
    small_stage("a", "rvos_nb.pipeline:take_member", {"source": "{a}", "out_dir": "{out}/a"}),
    small_stage("b", "rvos_nb.pipeline:take_member", {"source": "{b}", "out_dir": "{out}/b"}),
    small_stage(
        "swap",
        "rvos_nb.fuse:fuse",
        {"member_dirs": ["{out}/a", "{out}/b"], "out_dir": "{out}/swap", "groups": "{groups}"},
        link="{out}/published",
    ),
    small_stage(
        "walk",
        "rvos_nb.propagate:propagate",
        {"pred_dir": "{out}/swap", "out_dir": "{out}/walk", "direction": "{direction}"},
    ),
    small_stage(
        "final",
        "rvos_nb.fuse:fuse",
        {"member_dirs": ["{out}/walk", "{out}/b"], "out_dir": "{out}/final"},
    ),
    small_stage(
        "score",
        "rvos_nb.pipeline:score_runs",
        {"runs": {"walk": "{out}/walk", "final": "{out}/final"}, "out_dir": "{out}/scores"},
        when={"masks": "{data}"},
    ),
    small_stage(
        "submission",
        "rvos_nb.submit:submission",
        {"pred_dir": "{out}/final", "zip_path": "{out}/submission.zip"},
    ),
]
SMALL = {
    "name": "small",
    "threads": 1,
    "paths": ["data", "out", "a", "b"],
    "parameters": dict.fromkeys(["data", "out", "a", "b"])
    | {"groups": "pairs", "direction": "both"},
    "stages": SMALL_STAGES,
}
ALL = [s["name"] for s in SMALL["stages"]]


@pytest.fixture
def small(shapes, tmp_path):
    "Its parameters, on copies that may be spoilt."
    for name in ("data", "a", "b"):
        shutil.copytree(shapes / name, tmp_path / name)
    return {name: str(tmp_path / name) for name in ("data", "a", "b", "out")}


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    "What an undisturbed run leaves, with pairs and without, and where the first of them lies."
    found = {}
    for groups in ("none", "pairs"):
        root = tmp_path_factory.mktemp(groups)
        for name in ("data", "a", "b"):
            shutil.copytree(shapes / name, root / name)
        run_workflow(
            SMALL,
            {name: str(root / name) for name in ("data", "a", "b", "out")} | {"groups": groups},
        )
        found[groups] = tree(root / "out")
    return found | {"at": root / "out"}


@pytest.fixture
def finished(small, undisturbed):
    "The same, of a run that has ended; it was moved, which must not matter."
    shutil.copytree(undisturbed["at"], small["out"], symlinks=True)
    return small


def started(ends):
    return [e.name for e in ends if e.seconds]


def in_process(given, before=""):
    "The recipe in a process of its own, after some Python."
    code = (
        f"{before}\nfrom rvos_nb.pipeline import run_workflow\nrun_workflow({SMALL!r}, {given!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until_free(given):
    "Run again until the stage that outlived its recipe has let go."
    for _ in range(60):
        p = in_process(given)
        said = p.communicate()[0]
        if "another run at work" not in said:
            assert p.returncode == 0, said
            return
        time.sleep(0.5)
    raise AssertionError(said)


def test_killed_again_and_again(small, undisturbed):
    out = Path(small["out"])
    for sight in (
        "_run/b.json",
        "swap/run.json",
        "walk/Annotations/*/*",
        "final/Annotations",
        "scores",
    ):
        p = in_process(small)
        while p.poll() is None and not list(out.glob(sight)):
            time.sleep(0.002)
        p.kill()
        p.communicate()
        assert p.returncode == -signal.SIGKILL, sight
        while list(out.glob("*/.lock")) and any(
            "run at work" in c for c in [probe(f.parent) for f in out.glob("*/.lock")]
        ):
            time.sleep(0.05)
    until_free(small)
    assert tree(out) == undisturbed["pairs"]


def probe(folder):
    from rvos_nb.stage import locked

    try:
        with locked(folder):
            return ""
    except Problem as e:
        return str(e)


KILLS = {
    "half": """
def clear_half(out):
    shutil.rmtree(next((out / "Annotations").iterdir()))
    os.kill(os.getpid(), 9)
pipeline.clear = clear_half
""",
    "all": """
clear = pipeline.clear
def clear_all(out):
    clear(out)
    os.kill(os.getpid(), 9)
pipeline.clear = clear_all
""",
    "started": """
def die(*arguments):
    os.kill(os.getpid(), 9)
pipeline.run_stage_process = die
""",
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_while_stale_results_are_replaced(finished, undisturbed, where):
    other = dict(finished, groups="none")
    killed = in_process(other, f"import os, shutil\nfrom rvos_nb import pipeline\n{KILLS[where]}")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert set(states(SMALL, other).values()) != {"done"}
    ends = run_workflow(SMALL, other)
    assert (
        started(ends) == ["swap", "walk", "final", "score", "submission"]
        and tree(finished["out"]) == undisturbed["none"]
    )


def test_there_and_back_again(finished, undisturbed):
    assert stale(SMALL, dict(finished, groups="none")) == {
        "swap",
        "walk",
        "final",
        "score",
        "submission",
    }
    run_workflow(SMALL, dict(finished, groups="none"))
    assert tree(finished["out"]) == undisturbed["none"]
    assert stale(SMALL, dict(finished, direction="forward", groups="none")) == {
        "walk",
        "final",
        "score",
        "submission",
    }
    run_workflow(SMALL, finished)
    assert tree(finished["out"]) == undisturbed["pairs"]
    assert set(states(SMALL, finished).values()) == {"done"}


def test_other_masks_of_the_same_number_are_noticed(finished, undisturbed):
    one = sorted(Path(finished["b"]).rglob("*.png"))[0]
    two = sorted(Path(finished["b"]).rglob("*.png"))[-1]
    one.write_bytes(two.read_bytes())  # upstream, by somebody else
    assert stale(SMALL, finished) == set(ALL) - {"a"}
    assert (
        started(run_workflow(SMALL, finished)) == [n for n in ALL if n != "a"]
        and tree(finished["out"]) != undisturbed["pairs"]
    )
    mine = sorted(Path(finished["out"], "walk").rglob("*.png"))
    mine[0].write_bytes(mine[-1].read_bytes())  # within, by hand
    assert stale(SMALL, finished) == {"final", "score", "submission"}
    assert (
        started(run_workflow(SMALL, finished)) == ["final", "score", "submission"]
        and mine[0].read_bytes() == mine[-1].read_bytes()
    )


def test_other_key_frames_are_noticed(finished):
    path = Path(finished["out"], "swap/key_frame.json")
    keys = read_json(path)
    for es in keys.values():
        for e in es.values():
            e["index_info"]["class_index"] = 2 - e["index_info"]["class_index"]
    write_json(path, keys)
    assert stale(SMALL, finished) == {"walk", "final", "score", "submission"}
    with pytest.raises(Problem, match=r"key_frame\.json has changed since"):
        propagate(finished["data"], Path(finished["out"], "swap"), Path(finished["out"], "walk"))


def test_lost_results_are_made_again(finished, undisturbed):
    shutil.rmtree(Path(finished["out"], "swap"))
    next(Path(finished["out"], "final").rglob("*.png")).unlink()
    assert {n for n, s in states(SMALL, finished).items() if s != "done"} >= {"swap", "final"}
    ends = run_workflow(SMALL, finished)
    assert tree(finished["out"]) == undisturbed["pairs"] and "walk" not in started(ends)


def test_a_failed_video_costs_itself_only(small, undisturbed):
    frame = sorted(Path(small["data"]).rglob("*.jpg"))[1]
    whole = frame.read_bytes()
    frame.write_bytes(whole[:200])
    with pytest.raises(StageFailed, match="walk failed") as e:
        run_workflow(SMALL, small)
    assert (
        frame.name in str(e.value)
        and "stage final failed" in str(e.value)
        and "stage submission stopped" in str(e.value)
    )
    out = Path(small["out"])
    good = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert {p.name for p in (out / "final/Annotations").iterdir()} < {
        p.name for p in (out / "swap/Annotations").iterdir()
    } and good
    assert states(SMALL, small) | {
        "a": "done",
        "b": "done",
        "swap": "done",
        "walk": "to do",
        "final": "to do",
        "submission": "to do",
    } == states(SMALL, small)
    frame.write_bytes(whole)
    ends = run_workflow(SMALL, small)
    assert (
        started(ends) == ["walk", "final", "score", "submission"]
        and {p: p.stat().st_mtime_ns for p in good} == good
    )
    assert tree(out) == undisturbed["pairs"]


# What stands and was made from these inputs: a row is what happens to the files, the stages that
# run then, and those whose masks are written again.


def flip_bit(path):
    "Other bytes, as many as before."
    held = path.read_bytes()
    path.write_bytes(held[:-3] + bytes([held[-3] ^ 1]) + held[-2:])


def touch_data(given):
    for path in Path(given["data"]).rglob("*"):
        os.utime(path)


def change_frame(given):
    flip_bit(sorted(Path(given["data"]).rglob("*.jpg"))[0])


def change_sentence(given):
    path = Path(given["data"], "meta_expressions/valid/meta_expressions.json")
    path.write_text(path.read_text().replace("the ", "that ", 1))


def change_mask_of_an_input(given):
    "A mask turned upside down: a PNG without compression has as many bytes."
    path = sorted(Path(given["out"], "walk/Annotations").rglob("*.png"))[0]
    about = path.stat()
    mask = np.array(Image.open(path).convert("L"))
    held = []
    for turned in (mask, mask[::-1, ::-1]):
        Image.fromarray(turned).save(path, compress_level=0)
        held.append(path.stat().st_size)
    assert held[0] == held[1] and about.st_mtime_ns != path.stat().st_mtime_ns


def own_mask(given):
    return sorted(Path(given["out"], "final/Annotations").rglob("*.png"))[0]


def rename_mask(given):
    own_mask(given).rename(own_mask(given).with_stem("renamed"))


AFTER_DATA = {
    touch_data: (ALL, []),
    change_sentence: (ALL, []),
    change_frame: (["walk", "score", "submission"], ["walk"]),
    lambda given: own_mask(given).write_bytes(b""): (["final"], ["final"]),
    rename_mask: (["final"], ["final"]),
}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(pipeline, "run_stage_process", run_stage_here)


@pytest.mark.parametrize("change, rows", AFTER_DATA.items())
def test_what_changes_behind_a_recipe(finished, undisturbed, here, change, rows):
    run_workflow(SMALL, finished)
    out = Path(finished["out"])
    times = {p: p.stat().st_mtime_ns for p in out.rglob("Annotations/*/*/*.png")}
    change(finished)
    stages, again = rows
    assert started(run_workflow(SMALL, finished)) == stages
    assert started(run_workflow(SMALL, finished)) == []
    if change is not change_frame:
        found, expected = tree(out, "scores"), undisturbed["pairs"].items()
        assert found == {n: held for n, held in expected if not n.startswith("scores/")}
    written = {p.relative_to(out).parts[0] for p in times if p.stat().st_mtime_ns != times[p]}
    assert written == set(again)
    changed = {p.relative_to(out).parts[2] for p in times if p.stat().st_mtime_ns != times[p]}
    assert len(changed) == bool(again)  # one of two videos


def test_a_mask_of_an_input_is_changed_in_place(finished, here):
    change_mask_of_an_input(finished)  # of another size than the one that was there
    run_workflow(SMALL, finished)
    times = {p: p.stat().st_mtime_ns for p in Path(finished["out"], "final").rglob("*.png")}
    change_mask_of_an_input(finished)  # of the same
    found = states(SMALL, finished)
    assert found["walk"] == "done" and found["final"] == "to do"
    assert started(run_workflow(SMALL, finished)) == ["final", "score", "submission"]
    written = {p.parts[-3] for p in times if p.stat().st_mtime_ns != times[p]}
    assert len(written) == 1
    assert started(run_workflow(SMALL, finished)) == []


def test_a_data_set_without_masks_is_not_scored(small):
    shutil.rmtree(Path(small["data"], "valid/Annotations"))
    ends = run_workflow(SMALL, small)
    assert {e.name: e.state for e in ends} == dict.fromkeys(ALL, "done") | {"score": "skipped"}
    assert "not scored: walk, final" in pipeline.summarise_scores(SMALL, small)


def test_results_of_somebody_else_are_not_removed(small):
    Path(small["out"], "swap").mkdir(parents=True)
    write_json(Path(small["out"], "swap/run.json"), {"stage": "theirs", "params": {}})
    with pytest.raises(StageFailed, match="results of stage 'theirs'"):
        run_workflow(SMALL, small)
    assert read_json(Path(small["out"], "swap/run.json"))["stage"] == "theirs"


def test_two_at_once(small):
    from rvos_nb.stage import locked

    busy = pytest.raises(Problem, match="another run at work")
    with locked(Path(small["out"], "_run")), busy:
        run_workflow(SMALL, small)


# ---- what is named before anything runs


def faults(recipe, given=None):
    with pytest.raises(Problem) as e:
        plan_workflow(recipe, given)
    return str(e.value)


def changed(**stages):
    "The small recipe with parameters of some stages replaced."
    return dict(
        SMALL,
        stages=[
            dict(s, parameters=s["parameters"] | stages.get(s["name"], {})) for s in SMALL["stages"]
        ],
    )


def test_all_faults_at_once(small):
    wrong = changed(
        swap={"member_dirs": ["{out}/a", "{out}/bb"]},
        walk={"model": "aot-tny"},
        final={"member_dirs": ["/nowhere/x"]},
    )
    said = faults(
        wrong,
        {k: v for k, v in small.items() if k != "data"} | {"a": "/nowhere/a.pth", "gruops": "none"},
    )
    for words in (
        "no value for data",
        "parameter 'gruops'",
        f"{small['out']}/bb is not there",
        "is " + small["out"] + "/b meant?",
        "aot-tny",
        "/nowhere/x is not there",
        "/nowhere/a.pth is not there",
    ):
        assert words in said, words
    assert not Path(small["out"]).exists()
    with pytest.raises(WorkflowFaults) as e:
        plan_workflow(wrong, small)
    assert len(e.value.each) == 3 and all("\n" not in f for f in e.value.each)


@pytest.mark.parametrize(
    "stages, words",
    [
        (
            {"swap": {"member_dirs": ["{out}/a", "{out}/final"]}},
            "a circle: swap reads final reads walk reads swap",
        ),
        ({"final": {"member_dirs": ["{out}/final"]}}, "a circle: final reads final"),
        ({"a": {"source": "{out}/b"}}, "which stage b makes after it; put b before a"),
        ({"final": {"out_dir": "{out}/swap"}}, "stages swap and final both make"),
        ({"walk": {"mdel": "x"}}, ""),
    ],
)
def test_order(small, stages, words):
    if words:
        assert words in faults(changed(**stages), small)
    else:
        assert plan_workflow(
            changed(**stages), small
        )  # a function with options of any name finds this itself


def test_key_frames_after_their_reader(small):
    late = dict(
        SMALL,
        stages=[
            *SMALL["stages"],
            {
                "name": "keys",
                "function": "rvos_nb.keyframe:choose_key_frames",
                "writes": ["{out}/swap/key_frame.json"],
                "parameters": {"pred_dir": "{out}/swap"},
            },
        ],
    )
    assert "stage walk reads" in faults(late, small) and "put keys before walk" in faults(
        late, small
    )


def test_one_stage_alone_needs_what_it_reads(small):
    with pytest.raises(Problem, match="swap is not there, and no stage makes it"):
        plan_workflow(SMALL, small, only=["walk"])


@pytest.mark.parametrize("name, models", [("lsvos2022", 4), ("lsvos2023", 7)])
def test_the_winners_name_what_they_lack(name, models, small, tmp_path):
    empty = [k for k, v in load_workflow(name).parameters.items() if v is None]
    assert len(empty) == models + 1 and all(k in faults(name) for k in empty)
    _, stages = plan_workflow(
        name,
        {"data": small["data"], "out": str(tmp_path / "o")}
        | {k: "aot-tiny" if "aot" in k else "referformer-tiny" for k in empty if k != "data"},
    )
    assert all(s.parameters["split"] == "test" for s in stages if "split" in s.parameters)
    assert "missing.pth is not there" in faults(
        name, {"data": small["data"]} | {k: "/x/missing.pth" for k in empty if k != "data"}
    )


def test_the_published_rules():
    "Members, votes and key frames of both years, as the papers and scripts have them."

    def fusions(name):
        return {
            s.name: (
                [Path(m).relative_to("{out}").as_posix() for m in s.parameters["member_dirs"]],
                load_workflow(name).parameters[s.parameters["threshold"].strip("{}")],
                s.parameters["leftover"],
                s.parameters.get("key_frame_member"),
            )
            for s in load_workflow(name).stages
            if s.notebook == "fuse"
        }

    assert fusions("lsvos2023") == {
        "swap-1": (["soc", "mutr", "referformer_ft"], 3, "first", "soc"),
        "swap-2": (["vit-huge", "convnext", "soc"], 3, "first", "vit-huge"),
        "en2": (
            ["aot/soc_mutr_referft", "aot/soc", "aot/mutr", "aot/referformer_ft"],
            4,
            "majority",
            None,
        ),
        "final": (
            [
                "deaot/vit_convnext_soc",
                "deaot/vit-huge",
                "second_ensemble/en2",
                "deaot/referformer_ft",
            ],
            4,
            "majority",
            None,
        ),
    }
    assert fusions("lsvos2022") == {
        "swap": (["referformer_ft", "video_swin_b", "swin_l"], 3, "first", "referformer_ft"),
        "final": (
            ["aot/first_ensemble", "aot/swin_l", "aot/video_swin_b", "aot/referformer_ft"],
            4,
            "majority",
            None,
        ),
    }
    tiny, real = load_workflow("lsvos2023-tiny"), load_workflow("lsvos2023")
    policies = {
        s.name: real.parameters[s.parameters["policy"].strip("{}")]
        for s in real.stages
        if s.name.startswith("keys-")
    }
    assert policies.pop("keys-mutr") == "mask_score"  # its scores say nothing about frames
    assert len(policies) == 4 and set(policies.values()) == {"score"}
    assert (
        tiny.stages[1:] == real.stages
        and tiny.parameters["scales"] == [0.8, 1.0, 1.2]
        and tiny.parameters["flip"] is True
    )


@pytest.mark.parametrize(
    "recipe, words",
    [
        ({"name": "x", "extends": "lsvos2032"}, "no such file"),
        ({"name": "x", "extends": "demo", "stages": [{"nam": "final"}]}, "key 'nam'"),
        ({"name": "x", "extends": "demo", "extra": 1}, "key 'extra'"),
        (
            {"name": "x", "extends": "demo", "stages": [{"name": "final", "function": "a:b"}]},
            "either 'notebook' or 'function'",
        ),
    ],
)
def test_extends_what_is_not_there(recipe, words):
    with pytest.raises(Problem, match=words):
        load_workflow(recipe)


def test_a_recipe_that_extends_itself(tmp_path):
    for a, b in ("ab", "ba"):
        (tmp_path / f"{a}.yaml").write_text(
            yaml.safe_dump({"name": a, "extends": str(tmp_path / f"{b}.yaml")})
        )
    with pytest.raises(Problem, match="extends itself"):
        load_workflow(tmp_path / "a.yaml")


def test_given_results_stand_for_a_model(shapes, tmp_path):
    """A zip and a tree for two of three members:
    the graph goes on from them, with their own key frames or none."""
    from rvos_nb.submit import submission

    submission(shapes / "data", shapes / "a", tmp_path / "a.zip")
    made = {
        "data": str(shapes / "data"),
        "out": str(tmp_path / "out"),
        "split": "valid",
        "referformer_ft": str(shapes / "a"),
        "video_swin_b": str(tmp_path / "a.zip"),
        "swin_l": "referformer-tiny",
        "aot": "aot-tiny",
    }
    found = states("lsvos2022", made)
    assert found["keys-swin_l"] == "to do"
    ends = run_workflow(
        "lsvos2022",
        made,
        only=["referformer_ft", "video_swin_b", "keys-referformer_ft", "keys-video_swin_b"],
    )
    assert [e.state for e in ends] == ["done", "done", "skipped", "skipped"]
    assert (
        tree(tmp_path / "out/referformer_ft/Annotations")
        == tree(tmp_path / "out/video_swin_b/Annotations")
        == tree(shapes / "a/Annotations")
    )
    assert read_json(tmp_path / "out/referformer_ft/key_frame.json") == read_json(
        shapes / "a/key_frame.json"
    )
