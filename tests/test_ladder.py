"The ladder of the winners' graph: its steps, its table, its picture, and what ships of it."

import pytest
from PIL import Image

from rvos_nb.bench.ladder import (
    FUSED_FIRST,
    REFINED,
    STEPS,
    Trial,
    draw_ladder,
    gain_of_all,
    gather_ladder,
    list_steps,
    pad_table,
    publish_ladder,
    tabulate_ladder,
    write_cell,
)
from rvos_nb.core import find_shipped
from rvos_nb.data.shapes import LEVEL_SETTINGS
from rvos_nb.files import read_json, write_json
from rvos_nb.workflow import load_workflow

RUNS = [
    *(f"predict-{m}" for m in REFINED),
    *REFINED.values(),
    *FUSED_FIRST,
    *FUSED_FIRST.values(),
    "en2",
    "final",
]


@pytest.fixture
def table():
    "Run k scores 50 + k on every level, and a point more with each of three seeds."
    trials = [Trial(x, seed, 2, 4) for x in LEVEL_SETTINGS for seed in (11, 12, 13)]
    found = []
    for t in trials:
        scores = {n: 50.0 + k + t.seed - 11 for k, n in enumerate(RUNS)}
        worth = {m: 0.5 + k for k, m in enumerate(REFINED)}
        found.append({"scores": scores, "fusion of all": 70.0, "worth": worth})
    return gather_ladder(trials, found)


def test_the_runs_are_those_of_the_recipe():
    scored = next(s for s in load_workflow("lsvos2023-tiny").stages if s.name == "score")
    assert {*RUNS} <= scored.parameters["runs"].keys()
    for run in REFINED.values():
        assert scored.parameters["runs"][run] == "{out}/" + run.replace("-", "/", 1)


def test_the_steps(table):
    steps = list_steps(table, "easy")
    assert list(steps) == list(STEPS)
    first = {name: values[0] for name, values in steps.items()}
    assert first["best member"] == 54 and first["mean of members"] == 52
    assert first["best member, propagated"] == 59 and first["mean of members, propagated"] == 57
    assert first["first fusion"] == 61 and first["first fusion, propagated"] == 63
    assert first["second fusion"] == 64 and first["final"] == 65
    assert gain_of_all(table, "easy").tolist() == [11, 11, 11]


def test_the_best_member_is_the_same_for_all_seeds(table):
    "Chosen seed by seed it would look better than any member is."
    table["runs"]["predict-soc"]["hard"] = [90.0, 10.0, 10.0]
    assert list_steps(table, "hard")["best member"].tolist() == [54, 55, 56]
    table["runs"]["predict-soc"]["hard"] = [90.0, 80.0, 10.0]
    assert list_steps(table, "hard")["best member"].tolist() == [90, 80, 10]


def test_the_text(table):
    text = tabulate_ladder(table)
    assert "| best member                 | predict " in text and "55.0 ± 1.0" in text
    assert "+11.0 ± 0.0" in text and "referformer-tiny" in text
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1
    assert write_cell([1.0, 4.0], "+") == "+2.5 ± 1.5"
    assert pad_table([["a", "b"], ["long", ""]]).splitlines()[1] == "| ---- | - |"


def test_the_picture(table, tmp_path):
    "A panel for each level from zero, 1000 pixels wide, no text below 8 points."
    *steps, worth = figure_axes = draw_ladder(table).axes
    assert [ax.get_ylim()[0] for ax in steps] == [0] * len(LEVEL_SETTINGS)
    texts = [t for ax in figure_axes for t in (*ax.texts, *ax.get_xticklabels())]
    texts += worth.get_yticklabels()
    assert min(t.get_fontsize() for t in texts) >= 8
    for ax, level in zip(steps, LEVEL_SETTINGS):
        assert ax.get_title() == f"{level}; dotted: best member 55.0"
    write_json(tmp_path / "found.json", table)
    picture = publish_ladder(tmp_path / "found.json", tmp_path)
    assert Image.open(picture).size[0] == 1000
    assert read_json(tmp_path / "ladder.json") == table


def test_what_ships_is_what_the_readme_shows(root):
    path = find_shipped("notebooks", "images", "ladder.json")
    if not path.is_file():
        pytest.skip("no ladder ships yet")
    table = read_json(path)
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert path.with_suffix(".jpg").is_file()
    assert tabulate_ladder(table) in readme, "run nbs/index.ipynb again, then `make readme`"
