"""Builds the compiled implementations of deformable attention ahead,
as a package `rvos_nb_ops` of their own:

    cd ops && python setup.py build install

Without it they are built when they are first used.
Needs a C++ compiler, and `nvcc` for the CUDA ones, but no PyTorch and no GPU.
RVOS_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST say for which GPUs ("8.0 9.0+PTX");
otherwise those of this machine, or ARCHITECTURES."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIABLES = ("RVOS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
# Ampere, Ada, Hopper, Blackwell, and what comes after; of those, what nvcc knows
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
ABOUT = "Compiled implementations of deformable attention for rvos_nb"


def import_native():
    """The module that knows compilers and their options;
    it stands beside this folder in a checkout, and above it in an installed package."""
    for base in (HERE.parent, HERE.parent.parent):
        if (base / "rvos_nb" / "ops" / "native.py").exists():
            sys.path.insert(0, str(base))
            break
    import rvos_nb.ops.native

    return rvos_nb.ops.native


def read_output(command, *options):
    "What a program prints, or '' where it cannot run."
    try:
        done = subprocess.run([command, *options], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def parse_architectures(text):
    "'8.0 sm_90a+PTX' -> [('80', False), ('90a', True)]: number, and whether PTX goes with it."
    parsed = []
    for word in re.findall(r"[^;,\s]+", text):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)(a?)(\+PTX)?", word, re.I)
        if not match:
            sys.exit(
                f"{word!r} is no GPU architecture: {' or '.join(VARIABLES)} "
                'want numbers like "8.0 9.0+PTX"'
            )
        major, minor, suffix, ptx = match.groups()
        parsed.append((major + minor + suffix, bool(ptx)))
    return parsed


def architectures(nvcc):
    "GPUs to compile for: [('90', with PTX), ...]."
    wanted = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    present = read_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if wanted or present:
        return parse_architectures(wanted or " ".join(sorted(set(present.split()))))
    known = read_output(nvcc, "--list-gpu-arch").split()
    supported = [a for a, _ in parse_architectures(ARCHITECTURES) if f"compute_{a}" in known]
    return [(a, a == supported[-1]) for a in supported]


def compiler_options(tools, source, nvcc):
    "Options for machines other than this one too."
    options = tools.compiler_flags(source, "portable")
    if source.suffix != ".cu":
        return options
    options = [o for o in options if not o.startswith("-arch")] + ["--threads=0"]
    for architecture, ptx in architectures(nvcc):
        code = f"[sm_{architecture},compute_{architecture}]" if ptx else f"sm_{architecture}"
        options.append(f"-gencode=arch=compute_{architecture},code={code}")
    return options


def compile_source(tools, source, command, folder):
    "Compile `source` to a library in `folder`, in the place of older ones."
    library = Path(folder) / tools.library_name(source)
    for old in Path(folder).glob(f"{source.stem}-*.so"):
        old.unlink()
    options = compiler_options(tools, source, command[0])
    print("building", library.name, *options, file=sys.stderr, flush=True)
    temporary = library.with_suffix(".part")
    done = subprocess.run([*command, *options, str(source), "-o", str(temporary)])
    if done.returncode:
        sys.exit(
            f"{source.name} did not compile; what {Path(command[0]).name} said stands above. "
            "rvos_nb works without it, more slowly"
        )
    os.replace(temporary, library)
    return library


def build(folder):
    """Build what can be built into `folder`;
    ends the program where a compiler fails, or where there is none at all."""
    tools, libraries = import_native(), []
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.cu")]):
        command = tools.find_compiler(source)
        if command:
            libraries.append(compile_source(tools, source, command, folder))
            continue
        missing = "nvcc" if source.suffix == ".cu" else "C++ compiler"
        print(f"{source.name} is left out: no {missing} on the path", file=sys.stderr)
    if not libraries:
        sys.exit(
            "nothing can be built here: neither a C++ compiler (g++, c++, clang++ or CXX) "
            "nor nvcc is on the path. rvos_nb works without them, more slowly"
        )
    return libraries


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
            init = package / "__init__.py"
            init.write_text(f'"{ABOUT}, found by their names."\n')
            self.outputs = [str(init), *map(str, build(package))]

        def get_outputs(self, include_bytecode=1):
            return self.outputs

    class PlainInstall(install):
        "As files in site-packages, not as an egg."

        def finalize_options(self):
            super().finalize_options()
            self.single_version_externally_managed = True
            self.record = self.record or os.devnull

    class PlatformDistribution(Distribution):
        "What is built runs on this platform only."

        def has_ext_modules(self):
            return True

    os.chdir(HERE)
    setup(
        name="rvos_nb_ops",
        version="0.1.0",
        description=ABOUT,
        license="Apache-2.0",
        packages=["rvos_nb_ops"],
        package_dir={"rvos_nb_ops": "."},
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildLibraries, "install": PlainInstall},
        zip_safe=False,
    )
