"""Installs rvos_nb. Every fact stands in settings.ini;
only the standard library is needed here, so an isolated build works.
RVOS_BUILD_OPS=1 builds the compiled implementations of deformable attention ahead;
otherwise they are built when they are first used."""

import os
import runpy
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="], default_section="DEFAULT")
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_name"]
pythons = ["3.11", "3.12", "3.13"]
build_ops = os.environ.get("RVOS_BUILD_OPS", "") not in ("", "0")

# what stands outside the package: its name in a wheel, its folder here
OUTSIDE = {"checkpoints": "data/checkpoints", "notebooks": "nbs", "kernels": "ops"}
LEFT_OUT = (".*", "_*", "__pycache__", "build", "dist", "*.egg-info", "*.so")


def split_words(key):
    return shlex.split(cfg.get(key, ""))


class BuildWithNotebooks(build_py):
    """Also puts what stands outside the package into a wheel:
    the small checkpoints, the notebooks that stages run, and the sources of compiled code."""

    def run(self):
        super().run()
        package = Path(self.build_lib) / lib
        if not self.editable_mode:
            for name, folder in OUTSIDE.items():
                copy_folder(root / folder, package / name)
        if build_ops:
            build = runpy.run_path(str(root / "ops" / "setup.py"))["build"]
            build(root / "ops" if self.editable_mode else package / "kernels")


def copy_folder(source, target):
    "`target` becomes what `source` holds; where there is no `source`, nothing."
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))


class PlatformDistribution(Distribution):
    "With compiled code a wheel is for this platform only."

    def has_ext_modules(self):
        return build_ops


readme = root / "README.md"
extras = {
    k.removesuffix("_requirements"): split_words(k) for k in cfg if k.endswith("_requirements")
}
extras["all"] = sorted({r for v in extras.values() for r in v})
setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        *(f"Programming Language :: Python :: {v}" for v in pythons),
    ],
    python_requires=">=" + cfg["min_python"],
    install_requires=split_words("requirements"),
    extras_require=extras,
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: split_words("package_data")},
    include_package_data=True,
    cmdclass={"build_py": BuildWithNotebooks},
    distclass=PlatformDistribution,
    zip_safe=False,
    entry_points={
        "console_scripts": split_words("console_scripts"),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
