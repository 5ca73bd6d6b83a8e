"""An option is spelled once: the command, the function and the notebook's parameters agree with
the dataclass that declares it."""

import json
import re

import pytest
from typer.testing import CliRunner

from rvos_nb.cli import app
from rvos_nb.commands.app import ALSO_CALLED, RECORDS, find_options, value_type
from rvos_nb.commands.stages import fuse_command, predict_command, propagate_command
from rvos_nb.core import Problem
from rvos_nb.fuse import Rule
from rvos_nb.options import describe_options, option, read_options
from rvos_nb.predict import PredictOptions
from rvos_nb.propagate import SentencePropagation
from rvos_nb.stage import Execution, ModelPlace
from rvos_nb.workflow import find_notebook, find_parameters_cell, notebook_parameters

WIDTH = 100
NOTEBOOKS = {
    "predict": (PredictOptions, ModelPlace, Execution),
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
