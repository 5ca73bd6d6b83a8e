"""Rules of the house: one notebook is one module, nothing stale,
nothing heavy, nothing of one machine; and the command."""

import ast
import configparser
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import is_running

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.name[0].isdigit()]
name = {"ids": lambda p: p.stem}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return bool(re.search(r"^#\|\s*export", source(cell), re.M))


def code_cells(path):
    return [c for c in load(path)["cells"] if c["cell_type"] == "code"]


def module(path):
    return path.stem.split("_", 1)[1]


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_default_exp_is_the_file_name(path):
    found = [
        m[1]
        for c in load(path)["cells"]
        if c["cell_type"] == "code"
        for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)
    ]
    assert found == [module(path)]


@pytest.mark.parametrize("path", NOTEBOOKS, **name)
def test_notebook_form(path):
    nb = load(path)
    first = source(nb["cells"][0])
    assert re.match(r"# .+\n> .+", first), "a title and one line"
    assert nb["metadata"].get("kernelspec", {}).get("name") == "python3", (
        "papermill needs the kernelspec"
    )
    text = path.read_text(encoding="utf-8")
    assert "papermill" not in nb["metadata"] and "injected-parameters" not in text
    assert path.stat().st_size <= 1_000_000, "more than 1 MB"
    for c in nb["cells"]:
        assert set(c["metadata"]) <= {"tags"} and c.get("execution_count") is None


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_exported_cells_are_short(path):
    "A cell fits on a screen; one class, which cannot be cut, may have a hundred lines."
    for c in code_cells(path):
        if is_exported(c):
            body = ast.parse(source(c)).body
            limit = 100 if len(body) == 1 and isinstance(body[0], ast.ClassDef) else 70
            assert len(source(c).splitlines()) <= limit, source(c)[:80]


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_prose_comes_before_imports(path):
    "A title, then plain facts, then the first import."
    prose = 0
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] == "markdown":
            prose += 1
        elif "default_exp" not in source(c) and re.search(r"(?m)^(import|from) ", source(c)):
            break
    assert prose >= 2, "move what the chapter is, takes and gives above its imports"


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_bars_start_at_zero(path):
    "A bar's length is its value; an axis cut off below makes small differences look large."
    for c in code_cells(path):
        if re.search(r"\.barh?\(", source(c)) and '"log"' not in source(c):
            cut = re.findall(r"[xy]lim\(?=?\(?\s*(?:0\.0*[1-9]|[1-9])", source(c))
            assert not cut, source(c)[:200]


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_import_cells_only_import(path):
    "Building the pages runs exported cells and every cell that imports, nothing else."
    for c in code_cells(path):
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(source(c)).body}
        assert kinds != {True, False}, source(c)[:120]


# One order: listing = reading = imports


def find_imports(text):
    "Chapters that a piece of Python imports, inside its functions too: {'fuse', 'models.zoo'}."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {m for m in map(module, CHAPTERS) if f"rvos_nb.{m}" in found}


def earlier(path):
    return {module(p) for p in CHAPTERS[: CHAPTERS.index(path)]}


def test_the_table_of_chapters_has_the_order_of_the_folder():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"^\| \[.*\]\(nbs/(.+\.ipynb)\)", readme, re.M)
    assert links == [p.name for p in CHAPTERS]


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_a_module_imports_earlier_chapters_only(path):
    for c in code_cells(path):
        if is_exported(c):
            assert find_imports(source(c)) <= earlier(path), source(c)[:120]


@pytest.mark.parametrize("path", CHAPTERS, **name)
def test_a_lesson_imports_earlier_chapters_only(path):
    "And its own module, as a stage does."
    for c in code_cells(path):
        if not is_exported(c):
            assert find_imports(source(c)) <= {*earlier(path), module(path)}, source(c)[:120]


CHAPTER_NUMBER = re.compile(r"(?<!nbs/)\b\d\d[a-z]?\d?_[a-z]+|\bchapters? `?\d\d")


def numbered_texts():
    "Where chapters go by their modules: the package, recipes, tests and pages beside the book."
    folder = ROOT / "rvos_nb"
    pages = [*ROOT.glob("data/**/*.md"), *ROOT.glob("ops/*.md")]
    tests = ROOT.glob("tests/*.py")
    for p in [*folder.rglob("*.py"), *folder.glob("recipes/*.yaml"), *tests, *pages]:
        if p.name != "_modidx.py":
            yield p


def test_nothing_names_a_chapter_by_its_number():
    "Numbers are for reading order alone; only papermill takes nbs/06_fuse.ipynb, a file."
    for p in numbered_texts():
        text = re.sub(r"(?m)^# (%%|AUTOGENERATED).*", "", p.read_text(encoding="utf-8"))
        found = CHAPTER_NUMBER.findall(text)
        assert not found, f"{p.relative_to(ROOT)}: {found}"


# Style, as `.ci/style` measures it


STYLE = SimpleNamespace(**runpy.run_path(str(ROOT / ".ci/style")))


def over(sizes, most):
    return {what: n for what, n in sizes.items() if n > most}


def test_modules_are_short():
    assert not over(STYLE.measure_modules(ROOT), 600)


def test_functions_are_short():
    assert not over(STYLE.measure_functions(ROOT), 60)


def test_functions_take_few_parameters():
    assert STYLE.quantile95(STYLE.measure_parameters(ROOT).values()) <= 6


def test_lines_are_short_and_do_one_thing():
    assert not STYLE.find_long_lines(ROOT)
    assert not STYLE.find_semicolons(ROOT)


def test_one_word_means_one_thing():
    assert len(STYLE.find_homonyms(ROOT)) <= 3, STYLE.find_homonyms(ROOT)


def test_nobody_asks_a_model_what_it_has():
    assert not [call for _, call, on_model in STYLE.find_hasattr(ROOT) if on_model]


def test_every_module_has_its_notebook():
    modules = {
        p.relative_to(ROOT / "rvos_nb").with_suffix("").as_posix().replace("/", ".")
        for p in (ROOT / "rvos_nb").rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py") and ".ipynb_checkpoints" not in p.parts
    }
    assert modules <= {module(p) for p in CHAPTERS}, "stale modules: delete them"
    exporting = {
        module(p) for p in CHAPTERS if re.search(r'"#\|\s*export', p.read_text(encoding="utf-8"))
    }
    assert exporting <= modules, "not exported: run nbdev_export"


def test_exports_are_fresh(tmp_path):
    "Exported again into a temporary folder, each module is what is committed."
    from nbdev.export import nb_export

    for p in CHAPTERS:
        nb_export(str(p), lib_path=str(tmp_path / "rvos_nb"))

    def body(p):
        return re.sub(r"(?m)^#.*\.ipynb.*$", "", p.read_text(encoding="utf-8"))

    for new in (tmp_path / "rvos_nb").rglob("*.py"):
        old = ROOT / "rvos_nb" / new.relative_to(tmp_path / "rvos_nb")
        if new.name in ("__init__.py", "_modidx.py"):
            continue
        assert old.exists() and body(old) == body(new), f"{old} is stale: run nbdev_export"


def tracked():
    "Text files of the project."
    skip = {
        ".git",
        ".venv",
        "__pycache__",
        ".pytest_cache",
        ".ruff_cache",
        "runs",
        "build",
        "dist",
        "_docs",
        "_proc",
        ".ipynb_checkpoints",
    }
    for p in ROOT.rglob("*"):
        rel = p.relative_to(ROOT)
        if (
            not p.is_file()
            or skip & set(rel.parts)
            or any(x.endswith(".egg-info") for x in rel.parts)
        ):
            continue
        if rel.parts[0] == "data" and rel.parts[1] not in ("README.md", "checkpoints"):
            continue
        if (
            p.suffix
            in (
                ".py",
                ".ipynb",
                ".md",
                ".yaml",
                ".yml",
                ".toml",
                ".ini",
                ".txt",
                ".json",
                ".in",
                ".lock",
                "",
            )
            and p.stat().st_size < 2_000_000
        ):
            yield p


def test_no_path_of_one_machine():
    bad = re.compile(r"(?<![\w.}])/(work|root|home|Users|tmp|mnt|opt)/\w")
    for p in tracked():
        for line in p.read_text(encoding="utf-8", errors="replace").splitlines():
            if (m := bad.search(line)) and "bad = re.compile" not in line:
                pytest.fail(f"{p.relative_to(ROOT)}: {line[max(0, m.start() - 40) : m.end() + 40]}")


def test_nothing_unfinished():
    word = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|HA" + r"CK)\b|raise NotImplemented" + "Error")
    for p in tracked():
        if p.suffix in (".py", ".ipynb") and (m := word.search(p.read_text(encoding="utf-8"))):
            pytest.fail(f"{p.relative_to(ROOT)}: {m[0]}")


def test_readme_is_what_the_index_says():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/readme", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for p in CHAPTERS:
        assert f"nbs/{p.name}" in readme, (
            f"{p.name} is missing from the table: run nbs/index.ipynb again"
        )
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert target.startswith("http") or (ROOT / target).exists(), f"README points to {target}"


LIGHT = [
    "core",
    "data.masks",
    "data.video",
    "data.refshapes",
    "data.datasets",
    "keyframe",
    "results",
    "members",
    "fuse",
    "metrics",
    "evaluate",
    "ballots",
    "search",
    "pipeline",
    "cli",
    "benchmarks",
]


def test_light_modules_import_no_torch():
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("rvos_nb." + name)
    assert "torch" not in sys.modules, name
assert not {{"nbdev", "fastcore"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_propagation_imports_no_text_model():
    "transformers' models take seconds to import, and a propagator reads no sentence."
    code = "import sys, rvos_nb.propagate; assert 'transformers.modeling_utils' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_fcntl():
    "As on Windows."
    code = f"""
import importlib, sys
sys.modules["fcntl"] = None
for name in {[module(p) for p in CHAPTERS if any(map(is_exported, code_cells(p)))]}:
    importlib.import_module("rvos_nb." + name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_is_quick():
    t = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "from rvos_nb.cli import main; main(['--help'])",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "demo" in done.stdout and not re.search(
        r"\| +(torch|transformers|papermill|matplotlib|pandas|cv2)$", done.stderr, re.M
    )
    assert time.monotonic() - t < 10  # a second on an idle machine


def test_recipes_are_sound():
    "Every shipped pipeline names notebooks and parameters that exist."
    from rvos_nb import pipeline, workflow

    for r in workflow.list_workflows():
        asked = [k for k, v in workflow.load_workflow(r).parameters.items() if v is None]
        given = {
            k: str(ROOT / "nbs")
            if k == "data"
            else "aot-tiny"
            if "aot" in k
            else "referformer-tiny"
            for k in asked
        }
        assert pipeline.plan_workflow(r, given)[1]


def test_settings_reach_the_metadata(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split()[-2:] == ["rvos_nb", "0.1.0"], done.stderr


LOCKED = re.compile(r"([a-z0-9-]+)==([\w.+!]+)( ; .+)?")


def locked() -> dict[str, set[str]]:
    "The versions of `requirements.lock`: more than one where platforms or Pythons differ."
    versions = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            found = LOCKED.fullmatch(line)
            assert found, f"requirements.lock: {line!r} is no 'name==version ; marker'"
            versions.setdefault(found[1], set()).add(found[2])
    return versions


def test_the_lock_keeps_within_the_settings():
    "Each requirement is locked, at versions in its range; `make lock` renews the file."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    settings = configparser.ConfigParser(delimiters="=", interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    asked = f"{settings['DEFAULT']['requirements']} {settings['DEFAULT']['dev_requirements']}"
    versions = locked()
    for requirement in map(Requirement, asked.split()):
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not in requirements.lock: run `make lock`"
        for version in versions[name]:
            assert version in requirement.specifier, f"{name} {version}, not {requirement}"


def test_notebook_tools_are_limited():
    "Later execnb or fastcore break `import nbdev`, and any install can pull them in."
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    for pin in ("nbdev==2.4.14", "execnb>=0.1.12,<0.2", "fastcore>=1.12,<2", "ghapi>=1.0.3,<2.1"):
        assert f" {pin} " in settings


def test_workflows_are_yaml():
    for p in [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(p.read_text())


# The command and the pipeline, on bad input and on sudden death


def rvos(*argv, **kw):
    return subprocess.run(
        [sys.executable, "-c", "from rvos_nb.cli import main; main()", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=kw.pop("cwd", ROOT),
        **kw,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "nothing"],
        ["run", "demo", "-p", "vidoes", "3"],
        ["run", "demo", "-p", "videos", "many"],
        ["predict", "nowhere.mp4", "the dog"],
        ["predict", "clip.mp4"],
        ["keyframe", "nowhere"],
        ["evaluate", "nowhere", "nowhere"],
        ["bench", "nothing"],
        ["fuse", "nowhere", "nowhere"],
        ["propagate", "nowhere", "nowhere"],
        ["train", "nothing"],
        ["verify", "nowhere.npz"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(argv, tmp_path):
    done = rvos(*argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if argv[0] != "verify":
        lines = [x for x in done.stderr.splitlines() if "Warning" not in x and x.strip()]
        assert len(lines) == 1 and done.stderr.startswith("rvos: "), done.stderr


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: [", "YAML"),
        ("- a", "mapping"),
        ("name: x", "'stages'"),
        ("{name: x, stages: []}", "no stages"),
        ("{name: x, stages: [{name: ../up, notebook: fuse}]}", "../up"),
        (
            "{name: x, stages: [{name: a, notebook: fuse}, {name: a, notebook: fuse}]}",
            "two stages named 'a'",
        ),
        ("{name: x, stages: [{name: a, notebook: none}]}", "no such notebook"),
        ("{name: x, stages: [{name: a, notebook: fuse, parameters: {split: 3}}]}", "split = 3"),
        ("{name: x, stages: [{name: a, notebook: fuse, parameters: {speed: 3}}]}", "'speed'"),
        ("{name: x, stages: [{name: a, notebook: fuse, when: {sunny: x}}]}", "'sunny'"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(text, says, tmp_path):
    from rvos_nb.core import Problem
    from rvos_nb.pipeline import run_workflow

    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(Problem) as e:
        run_workflow(tmp_path / "r.yaml")
    assert says in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="the tie to the parent is a system call of Linux"
)
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill -9", "kill", "Ctrl-C"]
)
def test_a_dead_pipeline_leaves_no_kernel(how, tmp_path):
    import nbformat

    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("pid_file: str = ''", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "import os, time\nopen(pid_file, 'w').write(str(os.getpid()))\ntime.sleep(120)"
            ),
        ]
    )
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, tmp_path / "sleep.ipynb")
    recipe = {
        "name": "sleep",
        "parameters": {"out": str(tmp_path / "out")},
        "paths": ["out"],
        "stages": [
            {
                "name": "sleep",
                "notebook": str(tmp_path / "sleep.ipynb"),
                "parameters": {"pid_file": str(tmp_path / "pid")},
            }
        ],
    }
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # a background job ignores Ctrl-C
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"from rvos_nb.pipeline import run_workflow; run_workflow({recipe!r})",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        kernel = int((tmp_path / "pid").read_text())
        driver.send_signal(how)
        driver.wait(30)
        for _ in range(300):
            if not is_running(kernel):
                break
            time.sleep(0.1)
        assert not is_running(kernel)
    finally:
        driver.kill()
