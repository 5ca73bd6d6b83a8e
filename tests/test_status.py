"A run is looked at from outside: by its files alone, while it works and after it was killed."

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.events import EVENTS_NAME, read_events
from rvos_nb.files import write_bytes
from rvos_nb.pipeline import run_workflow
from rvos_nb.stage import Execution, StageWork, locked, run_stage
from rvos_nb.status import describe_run, read_status, write_status_page

RECIPE = {
    "name": "two",
    "parameters": {"data": "", "out": ""},
    "paths": ["data", "out"],
    "stages": [
        {
            "name": "look",
            "notebook": "predict",
            "parameters": {"data_dir": "{data}", "out_dir": "{out}/look"},
        },
        {
            "name": "score",
            "notebook": "evaluate",
            "parameters": {
                "data_dir": "{data}",
                "pred_dir": "{out}/look",
                "out_dir": "{out}/scores",
            },
        },
    ],
}


class Toy(StageWork):
    "Writes a file a unit; some fail, and some take long."

    stage = "toy"

    def results(self, unit):
        return [self.out / f"{unit}.txt"]

    def do(self, unit, prepared):
        if unit == "bad" and not (self.out.parent / "mended").exists():
            raise Problem("bad.jpg", "no such file", "a frame", "copy it")
        if unit == "long":
            time.sleep(60)
        write_bytes(self.out / f"{unit}.txt", unit.encode())


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("executor", ["local", "processes:2"])
def test_events_of_a_stage(tmp_path, executor):
    out = tmp_path / "run"
    import test_status

    toy = test_status.Toy(out, {}, ["a", "bad", "b"])
    assert list(run_stage(toy, Execution(executor)).failed) == ["bad"]
    events = list(read_events(out / EVENTS_NAME))
    assert [e["event"] for e in events] == ["start", *[e["event"] for e in events[1:-1]], "end"]
    ended = {e["unit"]: e for e in events if "unit" in e}
    assert {u: e["event"] for u, e in ended.items()} == {"a": "done", "b": "done", "bad": "failed"}
    assert "bad.jpg" in ended["bad"]["why"]
    assert all(re.fullmatch(r".+:\d+", e["worker"]) for e in events)
    inside = all(e["worker"].endswith(f":{os.getpid()}") for e in ended.values())
    assert inside == (executor == "local")
    run = read_status(out)
    assert [s.state for s in run.stages] == ["failed"] and run.stages[0].done == 2
    (tmp_path / "mended").touch()
    run_stage(toy, Execution(executor))
    assert not (out / EVENTS_NAME).exists()
    run = read_status(out)
    assert (run.stages[0].state, run.stages[0].done, run.stages[0].errors) == ("done", 3, [])


def start_toy(out, units):
    "A process at work on the toy."
    code = f"""
import test_status
from rvos_nb.stage import run_stage
run_stage(test_status.Toy(test_status.Path({str(out)!r}), {{}}, {units!r}))
"""
    places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": places})


def wait_for_events(path, count):
    deadline = time.monotonic() + 120
    while len(list(read_events(path))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_at_work_killed_and_stopped(tmp_path):
    out = tmp_path / "run"
    for number, state in ((signal.SIGKILL, "killed"), (signal.SIGINT, "stopped")):
        process = start_toy(out, ["a", "b", "bad", "long", "c"])
        had = len(list(read_events(out / EVENTS_NAME)))
        wait_for_events(out / EVENTS_NAME, had + 2 + (state == "killed") * 2)
        before = files(out)
        run = read_status(out)
        assert files(out) == before, "looking changes nothing"
        stage = run.stages[0]
        assert run.alive and (stage.state, stage.units) == ("running", 5)
        assert (stage.done, stage.failed) == (2, 1)
        assert "bad.jpg" in describe_run(run) and str(process.pid) in describe_run(run)
        process.send_signal(number)
        process.wait()
        assert read_status(out).stages[0].state == state
        assert not read_status(out).alive


def run_command(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code


def test_a_recipe(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    refshapes.write(data, "valid", "easy", videos=2, seed=4, frames=2, size=(48, 64))
    run_workflow(RECIPE, {"data": str(data), "out": str(out)})
    run = read_status(out)
    assert [(s.name, s.state, s.done) for s in run.stages] == [
        ("look", "done", 2),
        ("score", "done", 0),
    ]
    units = [e.get("unit") for e in read_events(out / "_run/look.events.jsonl")]
    assert len(set(units) - {None}) == 2
    capsys.readouterr()
    assert run_command("status", out) == 0
    table = capsys.readouterr().out
    assert "nobody works on it" in table and re.search(r"look +done +2 +0 +2", table)
    with locked(out / "_run"):
        assert run_command("status", out, "--html", tmp_path / "page.html") == 0
        assert f"pid {os.getpid()}" in (tmp_path / "page.html").read_text()


def test_names_cannot_write_html(tmp_path):
    out = tmp_path / "run"
    run_stage(Toy(out, {}, ["bad"]))
    log = out / EVENTS_NAME
    log.write_text(log.read_text().replace("bad.jpg", "<script>alert(1)</script>"))
    write_status_page(read_status(out), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page


def test_what_is_no_run(tmp_path, capsys):
    assert run_command("status", tmp_path) == 1
    assert "no run.json and no _run" in capsys.readouterr().err
    (tmp_path / EVENTS_NAME).write_text('{"time": "yesterday"}\n[]\n\x00\n')
    assert read_status(tmp_path).stages[0].state == "to do"
