"""Installs rvos_nb. Every fact stands in settings.ini; only the standard library is needed here, so an isolated build works.
RVOS_BUILD_OPS=1 builds the compiled implementations of deformable attention ahead; otherwise they are built when they are first used."""

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
AHEAD = os.environ.get("RVOS_BUILD_OPS", "") not in ("", "0")
lib, pythons = cfg["lib_name"], ["3.11", "3.12", "3.13"]


def words(key):
    return shlex.split(cfg.get(key, ""))


class WithNotebooks(build_py):
    """Also puts what stands outside the package into a wheel:
    the small checkpoints, the notebooks that stages run, and the sources of compiled code."""

    outside = {"checkpoints": "data/checkpoints", "notebooks": "nbs", "kernels": "ops"}

    def run(self):
        super().run()
        if not self.editable_mode:
            for name, folder in self.outside.items():
                to = Path(self.build_lib) / lib / name
                shutil.rmtree(to, ignore_errors=True)
                if (root / folder).is_dir():
                    shutil.copytree(
                        root / folder,
                        to,
                        ignore=shutil.ignore_patterns(
                            ".*", "_*", "__pycache__", "build", "dist", "*.egg-info", "*.so"
                        ),
                    )
        if AHEAD:
            runpy.run_path(str(root / "ops" / "setup.py"))["build"](
                root / "ops" if self.editable_mode else Path(self.build_lib) / lib / "kernels"
            )


class WithLibraries(Distribution):
    def has_ext_modules(self):
        return AHEAD  # then a wheel is for this platform only


readme = root / "README.md"
extras = {k.removesuffix("_requirements"): words(k) for k in cfg if k.endswith("_requirements")}
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
    install_requires=words("requirements"),
    extras_require=extras,
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: words("package_data")},
    include_package_data=True,
    cmdclass={"build_py": WithNotebooks},
    distclass=WithLibraries,
    zip_safe=False,
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{lib}={lib}._modidx:d"]},
)
