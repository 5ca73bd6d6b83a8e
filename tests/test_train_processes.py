"""Training on several processes joined by gloo: the same steps, a resume, a process killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = """
import json, sys
from dataclasses import replace
from rvos_nb.data.clips import Stream
from rvos_nb.train.loop import draw_batches
from rvos_nb.train.recipe import read_recipe
from rvos_nb.train.trainer import Trainer, load_newest, save_newest

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
given = {"stages.0.clips": 4, "stages.0.micro": 2, "stages.0.steps": 20}
recipe = read_recipe("train-toy", given)
trainer = Trainer(recipe)
here = trainer.accelerator
if first:
    load_newest(trainer, folder)
stages = recipe.stages
stream = Stream("refer", recipe.seed, stages, here.process_index, here.num_processes)
told = []
for batches in draw_batches(stream, first):
    said = trainer.one_step(batches)
    told.append([float(said["loss"]), float(said["norm"])])
    if trainer.step == last:
        break
if here.is_main_process:
    save_newest(trainer, folder, 1)
    print("TOLD", json.dumps(told))
here.wait_for_everyone()
here.end_training()
"""


def launch(command, processes, **more):
    "Start a command on some processes, as a user does."
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    head += ["--master-port", "0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        head + command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def told_by(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    line = next(line for line in out.splitlines() if line.startswith("TOLD"))
    return json.loads(line[5:])


def test_two_processes_make_the_steps_of_one(tmp_path):
    "Twenty steps with dropout; the two are stopped after ten and go on."
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    alone = told_by(launch([str(script), str(tmp_path / "one"), "0", "20"], 1))
    both = told_by(launch([str(script), str(tmp_path / "two"), "0", "10"], 2))
    both += told_by(launch([str(script), str(tmp_path / "two"), "10", "20"], 2))
    assert len(alone) == len(both) == 20
    for step, (one, two) in enumerate(zip(alone, both)):
        assert one[0] == pytest.approx(two[0], rel=1e-5), (step, one, two)
        assert one[1] == pytest.approx(two[1], rel=1e-4), (step, one, two)


def children_of(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_process_ends_the_run_and_it_goes_on(tmp_path):
    out = tmp_path / "out"
    changes = {"stages.0.steps": 100000, "save_minutes": 0, "watch.every": 10**6}
    rvos = str(Path(sys.executable).parent / "rvos")
    command = [rvos, "train", "train-toy", "--device", "cpu", "--out", str(out)]
    for name, value in changes.items():
        command += ["-p", name, str(value)]
    running = launch(command, 2)
    end = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*.pt")) and time.monotonic() < end:
        time.sleep(0.2)
    workers = children_of(running.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "it goes on from the last checkpoint" in said + errors, errors[-3000:]
    assert "Traceback" not in said
    reached = max(int(path.stem[5:]) for path in out.glob("checkpoints/step-*.pt"))
    again = launch([*command, "--minutes", "0"], 2)
    said, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors[-3000:]
    assert "find_unused_parameters" not in errors  # asked for only where there are some
    assert f"stopped after {reached + 1} of" in said


ALONE = """
import os, sys
from pathlib import Path
from rvos_nb.core import Problem
from rvos_nb.train.recipe import read_recipe
from rvos_nb.train.trainer import Trainer, load_newest, save_newest

trainer = Trainer(read_recipe("train-toy"))
own = Path(sys.argv[1]) / os.environ["RANK"]
if trainer.accelerator.is_main_process:
    trainer.step = 3
    save_newest(trainer, own, 1)
    trainer.step = 0
try:
    load_newest(trainer, own)
    print("WENT ON")
except Problem as p:
    print("REFUSED", p)
trainer.accelerator.end_training()
"""


def test_processes_that_see_different_folders_are_refused(tmp_path):
    "Each as on a machine of its own; all of them end."
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    out, errors = launch([str(script), str(tmp_path)], 2).communicate(timeout=120)
    assert out.count("REFUSED") == 2 and "WENT ON" not in out, errors[-3000:]
    assert "step 3 here, another elsewhere" in out and "step 0 here, another elsewhere" in out
    assert out.count("let all machines write to one shared folder") == 2
