"""An option is spelled once: the command, the function and the notebook's parameters agree with
the dataclass that declares it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rvos_nb.cli import app, main
from rvos_nb.commands.app import ALSO_CALLED, RECORDS, find_options, value_type
from rvos_nb.commands.stages import fuse_command, predict_command, propagate_command
from rvos_nb.core import Problem
from rvos_nb.decompose import PhraseOptions
from rvos_nb.fuse import Rule
from rvos_nb.options import describe_options, option, read_options
from rvos_nb.predict import PredictOptions
from rvos_nb.presence import PresenceGate
from rvos_nb.propagate import SentencePropagation
from rvos_nb.stage import Execution, ModelPlace, Report, read_record
from rvos_nb.workflow import (
    find_notebook,
    find_parameters_cell,
    load_workflow,
    notebook_parameters,
)

WIDTH = 100
NOTEBOOKS = {
    "predict": (PredictOptions, PresenceGate, PhraseOptions, ModelPlace, Execution),
    "protocols": (PredictOptions, ModelPlace, Execution),
    "propagate": (SentencePropagation, ModelPlace, Execution),
    "fuse": (Rule, Execution),
}
UNSET = ("", 0, [], None, False)  # what a notebook says for an option that is not given


def parameter_lines(notebook) -> dict[str, str]:
    "Name of each parameter → its line."
    nb = json.loads(find_notebook(notebook).read_text(encoding="utf-8"))
    lines = "".join(nb["cells"][find_parameters_cell(nb)]["source"]).splitlines()
    return {line.split(":")[0]: line for line in lines}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_takes_its_options_from_the_dataclass(notebook):
    defaults = notebook_parameters(find_notebook(notebook))
    lines = parameter_lines(notebook)
    options = [o for record in NOTEBOOKS[notebook] for o in describe_options(record)]
    shared = [o for o in options if o.name in defaults]
    assert len(shared) > 5
    for o in shared:
        code, _, comment = lines[o.name].partition("  # ")
        if len(f"{code}  # {o.help}") <= WIDTH:
            assert comment == o.help, o.name
        else:
            assert comment.split()[:3] == o.help.split()[:3], o.name
        usual = list(o.default) if isinstance(o.default, tuple) else o.default
        assert defaults[o.name] in (usual, *UNSET), o.name


@pytest.mark.parametrize("command", [predict_command, propagate_command, fuse_command])
def test_a_command_has_the_options_of_its_dataclasses(command):
    name = command.__name__.removesuffix("_command")
    said = CliRunner().invoke(app, [name, "--help"], prog_name="rvos").output
    words = " ".join(said.split())
    options = find_options(command)
    assert len(options) > 8 and RECORDS[command]
    for o in options:
        assert "--" + o.name.replace("_", "-") in words
        assert " ".join(o.help.split()[:6]) in words


def test_a_command_passes_on_what_was_given_and_nothing_else(monkeypatch, tmp_path):
    from rvos_nb import fuse as stage

    asked = {}

    def note(*args, **options):
        asked.update(options)
        raise Problem("here", "this", "that", "none")

    monkeypatch.setattr(stage, "fuse", note)
    line = ["fuse", "d", "a", "b", "--weight", "2", "--weight", "1.5", "--union", "0", "--force"]
    CliRunner().invoke(app, line)
    assert asked == {"weights": (2.0, 1.5), "union": 0.0, "force": True}


@pytest.mark.parametrize("name, also", ALSO_CALLED.items())
def test_lists_have_the_name_of_published_scripts(name, also):
    owner = {"scales": propagate_command, "weights": fuse_command}[name]
    [found] = [o for o in find_options(owner) if o.name == name]
    assert value_type(found.type) is list and re.fullmatch(r"--[a-z]+", also)


def test_options_that_there_are_not():
    with pytest.raises(Problem, match="colour"):
        read_options({"colour": "red"}, Rule, Execution)


def test_an_option_explains_itself():
    assert option(3, "How many.").metadata["help"] == "How many."
    for record in (PredictOptions, SentencePropagation, Rule, Execution, ModelPlace):
        for o in describe_options(record):
            assert o.help.endswith("."), o


# Values that are typed

WRONG = {
    "predict {clip} it --fps nan": "fps: found nan",
    "predict {clip} it --fps -3": "fps: found -3.0",
    "predict {clip} it --device meta": "device: found 'meta'",
    "predict {clip} it --device cpu:-1": "device: found 'cpu:-1'",
    "predict {clip} it --threshold nan": "threshold: found nan",
    "predict {clip} it --short-side 999999999999999999999": "short side: found 9999",
    "predict {clip} it --clip-length -1": "clip length: found -1",
    "predict --data {data} --memory -1": "memory: found '-1'",
    "predict --data {data} --memory nanGB": "memory: found 'nanGB'",
    "predict --data {data} --executor processes:0": "executor: found 'processes:0'",
    "predict {long} it": "File name too long",
    "propagate {clip} --mask {mask} --frame -3": "frame: found -3",
    "propagate {clip} --mask {mask} --frame 99999999999999999999999": "frame: found 9999",
    "propagate {clip} --mask {mask} --scales nan": "scales: found (nan,)",
    "propagate {clip} --mask {mask} --scales 99": "scales: found (99.0,)",
    "propagate {data} {data} --sentences-at-once 0": "sentences_at_once: found 0",
    "fuse {data} {data} {data} --weights a,b": "--weights: found a,b",
    "fuse {data} {data} {data} --weights nan,1": "weights: found (nan, 1.0)",
    "fuse {data} {data} {data} --weights 1e308,1e308": "weights: found (1e+308",
    "train train-aot-tiny --workers -1": "workers: found -1",
    "train train-aot-tiny --workers 99999999999": "workers: found 99999999999",
    "train train-aot-tiny --minutes nan": "minutes: found nan",
    "train train-aot-tiny --steps 0": "steps: found 0",
    "train train-aot-tiny --device meta": "device: found 'meta'",
    "train train-aot-tiny -p seed x": "train-aot-tiny, seed: found 'x'; expected a valid integer",
    "train train-aot-tiny -p seed -1": "seed: found -1",
    "train train-aot-tiny -p seed 9999999999999999999": "seed: found 9999999999999999999",
    "train train-aot-tiny -p seed 99999999999999999999999": "a number of 77 bits",
    "train train-aot-tiny -p tuning.lr .nan": "tuning, lr: found nan",
    "train train-aot-tiny -p tuning 3": "tuning: found 3",
    "train train-aot-tiny -p save_minutes .nan": "save_minutes: found nan",
    "train train-aot-tiny -p watch.every 0": "watch, every: found 0",
    "train train-aot-tiny -p watch.clips 0": "watch, clips: found 0",
    "train train-aot-tiny -p stages.²x.y 3": "parameter stages.²x.y",
    "train train-aot-tiny -p stages.².x 3": "parameter stages.².x",
    "train train-aot-tiny -p name [a]": "name: found ['a']",
    "run demo -p videos x": "found videos = 'x' (str); expected int",
    "run demo -p out {{out}}": "parameter 'out' that mentions itself",
    "run {recipe} --dry": "split = ['a', 'b'] (list)",
}


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    "A clip, a mask, a data set, and a recipe with a list for a name."
    from rvos_nb.data import refshapes

    root = tmp_path_factory.mktemp("brought")
    refshapes.write(root / "data", "valid", "easy", videos=1, seed=4, frames=3, size=(64, 96))
    Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 255).save(root / "mask.png")
    (root / "clip").mkdir()
    for t in range(3):
        Image.new("RGB", (96, 64)).save(root / f"clip/{t}.png")
    stage = {"name": "a", "notebook": "fuse", "parameters": {"split": ["a", "b"]}}
    (root / "recipe.yaml").write_text(json.dumps({"name": "x", "stages": [stage]}))
    places = {name: root / name for name in ("data", "clip")}
    return places | {
        "mask": root / "mask.png",
        "recipe": root / "recipe.yaml",
        "long": 300 * "a",
    }


@pytest.mark.parametrize("line", WRONG)
def test_a_value_of_the_wrong_kind_is_one_line(line, brought, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(line.format(**brought).split())
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 1 and len(said) == 1, said
    assert said[0].startswith("rvos: ") and WRONG[line] in said[0]


RECIPES = {
    "3": "a mapping",
    "{name: x, stages: 3}": "stages: found 3",
    "{name: x, stages: {a: 1}}": "stages: found {'a': 1}",
    "{name: x, stages: [{name: [a], notebook: fuse}]}": "name, str: found ['a']",
    "{name: x, stages: [{name: a, notebook: 3}]}": "notebook: found 3",
    "{name: x, parameters: [a], stages: [{name: a, notebook: fuse}]}": "parameters: found ['a']",
    "{name: x, paths: 3, stages: [{name: a, notebook: fuse}]}": "paths: found 3",
    "{name: x, threads: many, stages: [{name: a, notebook: fuse}]}": "threads: found 'many'",
    "{name: x, threads: -4, stages: [{name: a, notebook: fuse}]}": "threads: found -4",
    "{name: x, stages: [{name: a, notebook: fuse, parameters: [3]}]}": "parameters: found [3]",
    "{name: x, stages: [{name: a, notebook: fuse, when: [3]}]}": "when: found [3]",
    "{name: x, stages: [{name: a, notebook: fuse, writes: 3}]}": "writes: found 3",
    "{name: x, extends: [demo]}": "extends, str: found ['demo']",
    "{name: x, extends: demo, paths: 7}": "paths: found 7",
    "{name: x, stages: [{name: a, function: 3}]}": "function: found 3",
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_of_wrong_types_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(Problem) as e:
        load_workflow(tmp_path / "x.yaml")
    assert str(e.value).startswith(f"{tmp_path}/x.yaml") and RECIPES[text] in str(e.value)


# Ends from outside

ENDED = """
import os, signal, sys
from rvos_nb import cli
from rvos_nb.predict import PredictWork

do = PredictWork.do

def end_after_one(self, unit, *prepared):
    if os.listdir(self.out / "Annotations") if (self.out / "Annotations").exists() else []:
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    return do(self, unit, *prepared)

PredictWork.do = end_after_one
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("how, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stage_that_is_ended_says_what_is_kept(how, code, tmp_path):
    from rvos_nb.data import refshapes

    refshapes.write(tmp_path / "data", "valid", "easy", videos=4, seed=4, frames=3, size=(64, 96))
    argv = ["predict", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-c", ENDED, how, *argv], capture_output=True, text=True
    )
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("rvos: ended by ") and "the same command goes on" in last
    units = read_record(tmp_path / "run/run.json")["units"]
    assert {"done", "to do"} == set(units.values())
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert not e.value.code
    assert set(read_record(tmp_path / "run/run.json")["units"].values()) == {"done"}


def test_hidden_characters_are_shown():
    odd = "v\x1b[2J\n\u202e\ud800" + 10_000 * "w"
    shown = Report("toy", Path("runs"), failed={odd: str(Problem(odd, odd, "a name", "mend it"))})
    assert len(shown.table()) < 6000 and r"\x1b[2J\n\u202e\ud800" in shown.table()
    assert all(c.isprintable() or c == "\n" for c in shown.table())
    assert "\x1b" not in str(Problem(odd, odd, odd, odd))
