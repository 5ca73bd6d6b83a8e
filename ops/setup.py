"""Builds the compiled implementations of deformable attention ahead, as a package `rvos_nb_ops` of their own:

    cd ops && python setup.py build install

Without it they are built when they are first used. Needs a C++ compiler, and `nvcc` for the CUDA ones, but no PyTorch and no GPU.
RVOS_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST say for which GPUs ("8.0 9.0+PTX"); otherwise those of this machine, or ARCHITECTURES."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"  # of those, what nvcc knows: Ampere, Ada, Hopper, Blackwell, and what comes after


def native():
    """The module that knows compilers and their options;
    it stands beside this folder in a checkout, and above it in an installed package."""
    for base in (HERE.parent, HERE.parent.parent):
        if (base / "rvos_nb" / "ops" / "native.py").exists():
            sys.path.insert(0, str(base))
            break
    import rvos_nb.ops.native

    return rvos_nb.ops.native


def asked(command, *options):
    "What a program prints, or '' where it cannot run."
    try:
        return subprocess.run(
            [command, *options], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def architectures(nvcc):
    "GPUs to compile for: [('90', with PTX), ...]."
    said = os.environ.get("RVOS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    here = sorted(
        set(asked("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split())
    )
    found = []
    for word in (
        (said or " ".join(here) or ARCHITECTURES).replace(";", " ").replace(",", " ").split()
    ):
        if not (m := re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)(a?)(\+PTX)?", word, re.I)):
            sys.exit(
                f'{word!r} is no GPU architecture: RVOS_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST want numbers like "8.0 9.0+PTX"'
            )
        found.append((m[1] + m[2] + m[3], bool(m[4])))
    if said or here:
        return found
    known = asked(nvcc, "--list-gpu-arch")
    found = [f for f in found if f"compute_{f[0]}\n" in known + "\n"]
    return [*found[:-1], (found[-1][0], True)]


def build(folder):
    """Build what can be built into `folder`;
    ends the program where a compiler fails, or where there is none at all."""
    tools, built = native(), []
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.cu")]):
        command = tools.compiler(source)
        if not command:
            print(
                f"{source.name} is left out: no {'nvcc' if source.suffix == '.cu' else 'C++ compiler'} on the path",
                file=sys.stderr,
            )
            continue
        options = tools.flags(source, "portable")
        if source.suffix == ".cu":
            options = [o for o in options if not o.startswith("-arch")] + ["--threads=0"]
            for arch, ptx in architectures(command[0]):
                options += [
                    f"-gencode=arch=compute_{arch},code="
                    + (f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}")
                ]
        library = Path(folder) / tools.library_name(source)
        for old in Path(folder).glob(f"{source.stem}-*.so"):
            old.unlink()
        print("building", library.name, *options, file=sys.stderr, flush=True)
        tmp = library.with_suffix(".part")
        done = subprocess.run([*command, *options, str(source), "-o", str(tmp)])
        if done.returncode:
            sys.exit(
                f"{source.name} did not compile; what {Path(command[0]).name} said stands above. rvos_nb works without it, more slowly"
            )
        os.replace(tmp, library)
        built.append(library)
    if not built:
        sys.exit(
            """nothing can be built here: neither a C++ compiler (g++, c++,
            clang++ or CXX) nor nvcc is on the path. rvos_nb works without them, more slowly"""
        )
    return built


if __name__ == "__main__":
    from setuptools import Distribution, setup
    from setuptools.command.build_py import build_py
    from setuptools.command.install import install

    class BuildLibraries(build_py):
        "The package is a folder of libraries."

        def run(self):
            package = Path(self.build_lib) / "rvos_nb_ops"
            shutil.rmtree(package, ignore_errors=True)
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(
                '"Compiled implementations of deformable attention for rvos_nb, found by their names."\n'
            )
            self.outputs = [str(package / "__init__.py"), *map(str, build(package))]

        def get_outputs(self, include_bytecode=1):
            return self.outputs

    class PlainInstall(install):
        "As files in site-packages, not as an egg."

        def finalize_options(self):
            super().finalize_options()
            self.single_version_externally_managed, self.record = True, self.record or os.devnull

    class WithLibraries(Distribution):
        def has_ext_modules(self):
            return True

    os.chdir(HERE)
    setup(
        name="rvos_nb_ops",
        version="0.1.0",
        description="Compiled implementations of deformable attention for rvos_nb",
        license="Apache-2.0",
        packages=["rvos_nb_ops"],
        package_dir={"rvos_nb_ops": "."},
        distclass=WithLibraries,
        cmdclass={"build_py": BuildLibraries, "install": PlainInstall},
        zip_safe=False,
    )
