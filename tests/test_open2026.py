"Today's graph: it plans, it runs on RefShapes, and it takes a SAM 3."

import json
from pathlib import Path

import pytest

from rvos_nb import pipeline, workflow
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.decompose import read_sentence_parts
from rvos_nb.fuse import fuse
from rvos_nb.models.sam3 import small_sam3
from rvos_nb.pipeline import plan_workflow, run_workflow
from rvos_nb.workflow import load_workflow

SIZE = (48, 72)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("open2026")
    refshapes.write(root / "data", "valid", "easy", 1, seed=5, frames=3, size=SIZE)
    for part in small_sam3(3):
        part.save_pretrained(root / "sam3")
    return root


def test_the_tiny_graph_runs_and_shows_what_each_stage_adds(tmp_path):
    given = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    ends = run_workflow("open2026-tiny", given)
    assert {e.name for e in ends} >= {"decompose", "prompted", "tracks", "review", "final", "score"}
    names = ("prompted", "first", "second", "follow-first", "tracks", "review", "final")
    scores = {
        n: json.loads((tmp_path / f"out/scores/{n}/scores.json").read_text())["J&F"] for n in names
    }
    assert min(scores.values()) > 50 and scores["prompted"] < scores["first"]
    assert sum(e.seconds for e in ends) < 180 * 4  # on two idle cores under three minutes


def test_a_small_sam3_goes_through_the_graph(small):
    "Random weights propose what they like; the mechanics hold up to the choice."
    given = {"data": str(small / "data"), "out": str(small / "out")}
    given |= {"prompted": str(small / "sam3"), "prompted_keys": "presence"}
    stages = ["decompose", "prompted", "first", "second"]
    stages += ["keys-prompted", "keys-first", "keys-second", "tracks"]
    ends = run_workflow("open2026-tiny", given, only=stages)
    assert [e.name for e in ends if e.seconds] == stages
    parts, data = read_sentence_parts(small / "out/parts.json"), open_dataset(small / "data")
    assert all(parts[e.video][e.id].phrase in e.text for e in data)
    record = json.loads((small / "out/tracks/run.json").read_text())
    assert record["params"]["voters"] == 2 and len(record["params"]["runs"]) == 3


def test_the_real_graph_names_what_it_lacks(small):
    empty = [k for k, v in load_workflow("open2026").parameters.items() if v is None]
    assert empty == ["data", "first", "second"]
    given = {"data": str(small / "data"), "first": "referformer-tiny", "second": "soc-tiny"}
    _, stages = plan_workflow("open2026", given)
    models = {s.name: s.parameters.get("model") for s in stages if "model" in s.parameters}
    assert models["prompted"] == "facebook/sam3" and "sam2" in models["follow-first"]
    tiny = [s.name for s in load_workflow("open2026-tiny").stages]
    assert tiny == ["generate", *(s.name for s in load_workflow("open2026").stages)]


def test_one_member_of_the_winners_replaced():
    old, new = load_workflow("lsvos2023"), load_workflow("lsvos2023-sam3")
    assert new.parameters["convnext"] == "facebook/sam3"
    before = {s.name: s for s in old.stages}
    changed = [s.name for s in new.stages if s != before.get(s.name)]
    assert changed == ["decompose", "convnext"]
    assert new.stages[[s.name for s in new.stages].index("convnext")].parameters["phrases"]


def test_recipes_are_listed_with_a_line_each():
    for name in ("open2026", "open2026-tiny", "lsvos2023-sam3"):
        assert name in workflow.list_workflows() and load_workflow(name).about
        assert Path(workflow.find_recipe(name)).is_file()


@pytest.mark.parametrize("layout, split", [("revos", "valid"), ("long-rvos", "valid")])
def test_sentences_that_do_not_pair_are_not_pooled(tmp_path, layout, split):
    refshapes.write(tmp_path / "d", split, "easy", 1, seed=3, frames=2, size=SIZE, layout=layout)
    data = open_dataset(tmp_path / "d", split)
    run = tmp_path / "run"
    for e in data:
        from rvos_nb.data.masks import write_tree

        folder = run / "Annotations" / e.video / e.id
        folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, data.masks(e))
    with pytest.raises(Problem, match="do not mean the same"):
        fuse(tmp_path / "d", [run, run], tmp_path / "out", split, groups="pairs")
    if layout == "revos":
        with pytest.raises(Problem, match="do not mean the same"):
            fuse(tmp_path / "d", [run, run], tmp_path / "out", split, groups="objects")
    else:
        assert not fuse(tmp_path / "d", [run], tmp_path / "o", split, groups="objects").failed
    assert not fuse(tmp_path / "d", [run], tmp_path / "out", split, groups="none").failed
    assert pipeline.score_runs(tmp_path / "d", {"a": tmp_path / "out"}, tmp_path / "s", split)
