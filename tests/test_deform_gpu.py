"""Deformable attention for GPUs, without one: the Triton kernels through their interpreter,
the CUDA sources compiled for the CPU by a small stand-in for CUDA (tests/cuda_on_cpu.h)
and, where nvcc is there, for a GPU. With a GPU, the same tests run on it."""

import ctypes
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from rvos_nb.ops import native
from rvos_nb.ops.deform_attn import read_points, sampling_points

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "ops"
GPU = torch.cuda.is_available()
ALLOWED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Emulated(native.CompiledKernel):
    "A CUDA source that runs on the CPU, with all of its types."

    def _plain(self, *tensors):
        return [x if x is None else x.contiguous() for x in tensors]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    "Compile a CUDA source for the CPU; a function of its name."
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda")
    for header in ("cuda_runtime", "cuda_fp16", "cuda_bf16"):
        (folder / f"{header}.h").write_text(f'#include "{ROOT / "tests" / "cuda_on_cpu.h"}"\n')
    loaded = {}

    def compiled(name):
        if name not in loaded:
            library = folder / f"{name}.so"
            subprocess.run(
                [
                    "g++",
                    "-O1",
                    "-std=c++17",
                    "-shared",
                    "-fPIC",
                    "-w",
                    f"-I{folder}",
                    "-x",
                    "c++",
                    str(OPS / f"{name}.cu"),
                    "-o",
                    str(library),
                ],
                check=True,
            )
            loaded[name] = native._LOADED[f"{name} on the CPU"] = ctypes.CDLL(str(library))
        return Emulated(f"{name} on the CPU", "cpu")

    yield compiled
    for name in loaded:
        native._LOADED.pop(f"{name} on the CPU")


class OnGpu:
    "An implementation for CUDA tensors, given and returning CPU tensors."

    def __init__(self, home):
        self.home = home

    def forward(self, *args):
        return self.home.forward(*map(self.to, args)).cpu()

    def backward(self, *args):
        return [x.cpu() for x in self.home.backward(*map(self.to, args))]

    @staticmethod
    def to(x):
        return x.cuda() if isinstance(x, torch.Tensor) else x


def triton_module():
    return pytest.importorskip("rvos_nb.ops.triton_kernel")


def triton_kernel():
    return triton_module().TritonKernel


KINDS = ["triton", "cuda"] + ["triton on a GPU", "cuda on a GPU"] * GPU


@pytest.fixture(params=KINDS)
def kernel(request):
    "Each implementation, as far as this machine can run it."
    kind = request.param
    if kind == "cuda":
        return request.getfixturevalue("emulate")("ms_deform_attn")
    if kind == "triton":
        return triton_kernel()
    home = triton_kernel() if kind.startswith("triton") else native.cuda_kernel
    if why := home.why_unavailable(torch.device("cuda"), torch.float32):
        pytest.skip(why)
    return OnGpu(home)


def example(
    levels,
    queries,
    heads=2,
    dim=8,
    points=2,
    images=2,
    dtype=torch.float32,
    between=(-0.3, 1.3),
):
    "Random gradient, values, places (`between` two bounds, in units of a map) and weights."
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rng = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in levels)
    value = torch.randn(images, cells, heads, dim, generator=rng, dtype=real).to(dtype)
    samples = (images, queries, heads, len(levels), points)
    low, high = between
    locations = torch.rand(*samples, 2, generator=rng, dtype=real) * (high - low) + low
    weights = torch.randn(samples, generator=rng, dtype=real).to(dtype)
    grad = torch.randn(images, queries, heads * dim, generator=rng, dtype=real).to(dtype)
    return grad, value, levels, locations, weights


def reference(grad, value, shapes, locations, weights, softmax=False, around=None):
    """Output and gradients (of value, places, weights) in float64 by the plain form;
    places that are not finite count as far outside."""
    value, weights = value.double().requires_grad_(), weights.double().requires_grad_()
    places = (
        sampling_points(around.double(), locations.double(), shapes)
        if around is not None
        else locations.double()
    )
    places = (
        torch.where(places.isfinite().all(-1, keepdim=True), places, torch.full_like(places, -9.0))
        .detach()
        .requires_grad_()
    )
    out = read_points(
        value,
        shapes,
        places,
        weights.flatten(3).softmax(-1).view(weights.shape) if softmax else weights,
    )
    return out, *torch.autograd.grad(out, (value, places, weights), grad.double())


def off(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def check(kernel, inputs, allowed, softmax=False, around=None):
    found = kernel.forward(*inputs[1:], softmax, around), *kernel.backward(*inputs, softmax, around)
    exact = reference(*inputs, softmax, around)
    assert (
        found[0].dtype == found[1].dtype == inputs[1].dtype
        and found[2].dtype == inputs[3].dtype
        and found[3].dtype == inputs[4].dtype
    )
    errors = [off(a, b) for a, b in zip(found, exact)]
    assert all(e < allowed for e in errors), errors
    return found, exact


def test_published(kernel, emulate, root):
    with np.load(root / "tests/golden/referformer/deform_attn.npz") as a:
        given = {k: torch.from_numpy(a[k]) for k in a.files if "core/" in k}
    shapes = [tuple(s) for s in given["in/core/spatial_shapes"].tolist()]
    inputs = (
        given["in/core/value"],
        shapes,
        given["in/core/sampling_locations"],
        given["in/core/attention_weights"],
    )
    for home in (kernel, emulate("ms_deform_attn_simple")):
        found = home.forward(*inputs), *home.backward(given["in/core/grad_output"], *inputs)
        for x, key in zip(
            found, ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
        ):
            torch.testing.assert_close(x, given[f"out/core/{key}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", list(ALLOWED), ids=lambda d: str(d)[6:])
def test_types(kernel, dtype):
    check(kernel, example([(4, 5), (2, 3)], 7, dim=16, points=3, dtype=dtype), ALLOWED[dtype])


@pytest.mark.parametrize(
    "levels,queries,heads,dim,points,images",
    [
        (
            [(9, 10), (5, 5), (3, 3)],
            124,
            1,
            4,
            1,
            1,
        ),  # queries are the cells, in tiles that stick out
        ([(1, 1)], 1, 1, 1, 1, 1),  # the smallest
        ([(1, 7), (7, 1), (1, 1)], 3, 3, 5, 3, 2),  # lines, and a level of one cell; odd sizes
        ([(3, 3)], 65, 2, 24, 1, 1),  # one query more than a tile; a head that is no power of two
        ([(2, 2)] * 6, 2, 1, 8, 5, 1),  # 30 samples
        ([(2, 3)], 2, 2, 160, 2, 2),  # a head wider than a warp
        ([(4, 4), (2, 2)], 3, 8, 2, 2, 2),  # narrower than a load
    ],
)
def test_sizes(kernel, levels, queries, heads, dim, points, images):
    check(kernel, example(levels, queries, heads, dim, points, images), 1e-6)


def test_random_sizes(kernel):
    rng = np.random.default_rng(7)
    for turn in range(4 if isinstance(kernel, (OnGpu, native.CompiledKernel)) else 2):
        levels = [tuple(map(int, rng.integers(1, 7, 2))) for _ in range(rng.integers(1, 4))]
        queries = sum(h * w for h, w in levels) if rng.random() < 0.4 else int(rng.integers(1, 30))
        dtype = [torch.float32, torch.float16][turn % 2]
        heads, dim, points, images = map(int, rng.integers(1, (4, 40, 4, 4)))
        inputs = example(levels, queries, heads, dim, points, images, dtype)
        check(kernel, inputs, ALLOWED[dtype])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("kind", ["points", "boxes", "one point for all"])
def test_offsets_and_logits(kernel, softmax, kind):
    inputs = example([(4, 5), (2, 3)], 5, points=3, between=(-2.0, 2.0))
    around = torch.rand(
        *{"points": (2, 5, 2, 2), "boxes": (2, 5, 1, 4), "one point for all": (1, 5, 1, 2)}[kind],
        generator=torch.Generator().manual_seed(3),
    )
    found, _ = check(kernel, inputs, 2e-6, softmax, around)
    if softmax:
        assert found[3].sum((3, 4)).abs().max() < 1e-5


def test_images_never_mix(kernel):
    """Many images, few queries:
    a kernel whose blocks span images reads the wrong one's values for two queries in three here."""
    inputs = example([(3, 4), (2, 2)], 5, heads=2, images=9)
    found, _ = check(kernel, inputs, 1e-6)
    alone = [x[4:5] if isinstance(x, torch.Tensor) else x for x in inputs]
    assert torch.equal(found[0][4:5], kernel.forward(*alone[1:]))


def test_outside_leaves_nothing_behind(kernel):
    """Samples outside or not finite: no share in the output,
    and zeros as gradients whatever stood in memory before."""
    grad, value, shapes, locations, weights = example([(4, 5), (2, 3)], 6, between=(0.2, 0.8))
    outside = torch.rand(weights.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 3.0])
    locations[outside] = bad[torch.arange(int(outside.sum())) % 6][:, None]
    locations[0, 0, 0, 0, 0], outside[0, 0, 0, 0, 0] = torch.tensor([0.5, math.nan]), True
    weights[0, 0, 0, 0, 0] = math.inf  # may not meet a zero
    for softmax in (False, True):
        given = weights if not softmax else weights.nan_to_num(posinf=1.0)
        with (
            patch("torch.empty", lambda *size, **kw: torch.full(*size, math.nan, **kw)),
            patch(
                "torch.Tensor.new_empty",
                lambda self, *size, **kw: self.new_full(
                    size if isinstance(size[0], int) else size[0], math.nan, **kw
                ),
            ),
        ):
            out, (dvalue, dlocations, dweights) = (
                kernel.forward(value, shapes, locations, given, softmax),
                kernel.backward(grad, value, shapes, locations, given, softmax),
            )
        clean = torch.where(outside, 0, given) if not softmax else given
        exact = reference(grad, value, shapes, locations, clean, softmax)
        assert all(x.isfinite().all() for x in (out, dvalue, dlocations, dweights))
        assert (dlocations[outside] == 0).all() and (softmax or (dweights[outside] == 0).all())
        assert all(off(a, b) < 2e-6 for a, b in zip((out, dvalue, dlocations, dweights), exact))


def test_everything_outside(kernel):
    grad, value, shapes, locations, weights = example([(2, 2)], 3)
    out = kernel.forward(value, shapes, locations + 5, weights)
    assert (out == 0).all() and all(
        (x == 0).all() for x in kernel.backward(grad, value, shapes, locations + 5, weights)
    )


def test_border(kernel):
    "Places on cell centres, edges, and corners of the map."
    h, w = 2, 4
    x, y = torch.meshgrid(
        torch.tensor([0.0, 0.5 / w, 1 / w, 0.5, (w - 0.5) / w, 1.0]),
        torch.tensor([0.0, 0.5 / h, 0.5, (h - 0.5) / h, 1.0]),
        indexing="xy",
    )
    places = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2)
    n = places.shape[1]
    rng = torch.Generator().manual_seed(2)
    inputs = (
        torch.randn(1, n, 4, generator=rng),
        torch.randn(1, 8, 1, 4, generator=rng),
        [(h, w)],
        places,
        torch.rand(1, n, 1, 1, 1, generator=rng),
    )
    check(kernel, inputs, 1e-6)


@pytest.mark.parametrize("images,queries", [(0, 3), (2, 0)])
def test_empty(kernel, images, queries):
    inputs = example([(2, 2)], queries, images=images)
    assert kernel.forward(*inputs[1:]).shape == (images, queries, 16)
    for x, like in zip(kernel.backward(*inputs), (inputs[1], inputs[3], inputs[4])):
        assert x.shape == like.shape and (x == 0).all()


def test_not_contiguous(kernel):
    grad, value, shapes, locations, weights = example([(4, 5), (2, 3)], 6)
    spread = [
        x.transpose(0, 1).contiguous().transpose(0, 1) for x in (grad, value, locations, weights)
    ]
    assert torch.equal(
        kernel.forward(spread[1], shapes, *spread[2:]),
        kernel.forward(value, shapes, locations, weights),
    )
    for a, b in zip(
        kernel.backward(spread[0], spread[1], shapes, *spread[2:]),
        kernel.backward(grad, value, shapes, locations, weights),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # NumPy, in the interpreter, about the infinity
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_deterministic(kernel, dtype):
    grad, value, shapes, locations, weights = example(
        [(3, 4), (1, 2)], 40, heads=1, points=1, dtype=dtype
    )
    exact = reference(grad, value, shapes, locations, weights)[1]
    broken = grad.clone()
    broken[0, 0, 0] = math.inf
    with patch("torch.are_deterministic_algorithms_enabled", lambda: True):
        once = kernel.backward(grad, value, shapes, locations, weights)
        again = kernel.backward(
            grad.flip(1), value, shapes, locations.flip(1), weights.flip(1)
        )  # rows come in another order
        small = kernel.backward(grad * 2**-10, value, shapes, locations, weights)[0]
        assert kernel.backward(broken, value, shapes, locations, weights)[0].isnan().any()
        assert (kernel.backward(grad * 0, value, shapes, locations, weights)[0] == 0).all()
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1].flip(1))
    assert (
        off(once[0], exact) < 10 * ALLOWED[dtype]
        and off(small.double() * 2**10, exact) < 10 * ALLOWED[dtype]
    )


def test_gradcheck(kernel):
    _, value, shapes, locations, weights = example(
        [(3, 2), (2, 2)],
        2,
        heads=1,
        dim=2,
        images=1,
        dtype=torch.float64,
        between=(0.05, 0.95),
    )

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, at, w):
            ctx.save_for_backward(v, at, w)
            return kernel.forward(v, shapes, at, w, True)

        @staticmethod
        def backward(ctx, g):
            v, at, w = ctx.saved_tensors
            return kernel.backward(g.contiguous(), v, shapes, at, w, True)

    assert torch.autograd.gradcheck(
        Attention.apply,
        [x.clone().requires_grad_() for x in (value, locations, weights)],
        eps=1e-6,
        atol=1e-6,
        fast_mode=True,
    )


def test_simple(emulate):
    simple = emulate("ms_deform_attn_simple")
    for dtype in (torch.float64, torch.float32):
        check(simple, example([(4, 5), (1, 1)], 7, dim=12, points=3, dtype=dtype), ALLOWED[dtype])
    inputs = example([(4, 5)], 3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="knows float32 and float64"):
        simple.forward(*inputs[1:])
    with pytest.raises(RuntimeError, match="no offsets or logits"):
        simple.forward(*example([(4, 5)], 3)[1:], True)


def test_refusals(emulate):
    _, value, shapes, locations, weights = example([(1, 1)] * 65, 1)
    with pytest.raises(RuntimeError, match="more than 64 levels"):
        emulate("ms_deform_attn").forward(value, shapes, locations, weights)


def test_large_offsets(root):
    """A level beyond 2^31 elements needs 64-bit offsets,
    and the kernels take them; smaller ones do not."""
    import triton.language as tl

    plan = triton_module().plan_launch

    def index(cells):
        shape = 1, cells, 8, 32
        return plan(shape, 4, 4, ((1, cells),), False, (1, 1, 0), torch.bfloat16, False)[1]["index"]

    assert index(2**23) == tl.int64 and index(2**23 - 1) == tl.int32
    inputs = example([(3, 4)], 5)

    def wide(*args):
        grid, sizes = plan(*args)
        return grid, sizes | {"index": tl.int64}

    with patch("rvos_nb.ops.triton_kernel.plan_launch", wide):
        check(triton_kernel(), inputs, 1e-6)


@pytest.mark.skipif(GPU, reason="launches are real here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_launches_compile(dtype, monkeypatch):
    """What `forward` and `backward` hand to Triton compiles for an H200,
    loads 16 bytes of values at a time, and adds four floats at once; the driver is a stand-in."""
    home = triton_kernel()
    nvidia, target = (
        pytest.importorskip("triton.backends.nvidia.driver"),
        pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32),
    )
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            pass

        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    made = []
    monkeypatch.setattr(
        "rvos_nb.ops.triton_kernel.launch_kernel",
        lambda kernel, device, grid, *tensors, **sizes: made.append(
            kernel.warmup(*tensors, grid=grid, **sizes).asm["ptx"]
        ),
    )
    for name in ("_active", "_default"):
        monkeypatch.setattr(driver, name, Driver())  # also where somebody resets the active one
    for queries, softmax, around in ((124, False, None), (5, True, torch.zeros(1, 5, 1, 4))):
        grad, value, shapes, locations, weights = example(
            [(10, 12), (2, 2)], queries, heads=8, dim=32, dtype=dtype
        )
        home.forward(value, shapes, locations, weights, softmax, around)
        home.backward(grad, value, shapes, locations, weights, softmax, around)
        with patch("torch.are_deterministic_algorithms_enabled", lambda: True):
            home.backward(grad, value, shapes, locations, weights, softmax, around)
        forward, backward, exact = made[-3:]
        assert (
            forward.count("ld.global.v4") >= 8
            and "add.v4.f32" in backward
            and "add.u64" in exact
            and ".local." not in forward + backward
        )


@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_simple"])
def test_nvcc(name, tmp_path):
    """Compiles without warnings, spills no registers (the fast one),
    exports two functions, and without a GPU they say so."""
    command = native.find_compiler(OPS / f"{name}.cu")
    if not command:
        pytest.skip("no nvcc")
    library = tmp_path / f"{name}.so"
    done = subprocess.run(
        [
            *command,
            *native.compiler_flags(OPS / f"{name}.cu", "sm_90"),
            "-Xptxas",
            "-v",
            str(OPS / f"{name}.cu"),
            "-o",
            str(library),
        ],
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in output and "Used" in output, output
    spills = [line for line in output.splitlines() if "spill" in line]
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    loaded = ctypes.CDLL(str(library))
    if not GPU:
        loaded.forward.restype = ctypes.c_char_p
        sizes, memory = native.Sizes(1, 1, 1, 1, 4, 1, 1, 0, 1, 1), ctypes.create_string_buffer(64)
        assert loaded.forward(
            0,
            ctypes.byref(sizes),
            (ctypes.c_int64 * 2)(1, 1),
            0,
            ctypes.c_int64(0),
            memory,
            memory,
            memory,
            None,
            memory,
        )


@pytest.fixture
def setup():
    with patch.object(sys, "path", list(sys.path)):
        yield runpy.run_path(str(OPS / "setup.py"))


def test_built_ahead(setup, tmp_path, capfd):
    tools = setup["import_native"]()
    if not tools.find_compiler(OPS / "a.cpp"):
        pytest.skip("no C++ compiler")
    quick = ["-O0", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    compiler = tools.find_compiler

    def without_nvcc(source):
        return compiler(source) if source.suffix == ".cpp" else []

    with (
        patch.object(tools, "compiler_flags", lambda *args: quick),
        patch.object(tools, "find_compiler", without_nvcc),
    ):
        built = setup["build"](tmp_path)
    assert [p.name for p in built] == [tools.library_name(OPS / "ms_deform_attn_cpu.cpp")]
    assert "ms_deform_attn.cu is left out: no nvcc" in capfd.readouterr().err
    assert ctypes.CDLL(str(built[0])).backward
    with (
        patch.object(tools, "find_compiler", lambda source: []),
        pytest.raises(SystemExit, match="nothing can be built here"),
    ):
        setup["build"](tmp_path)


def test_architectures(setup, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("RVOS_CUDA_ARCHS", "8.0;sm_86 9.0a+PTX")
    assert setup["architectures"]("nvcc") == [("80", False), ("86", False), ("90a", True)]
    monkeypatch.setenv("RVOS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="'hopper' is no GPU architecture"):
        setup["architectures"]("nvcc")
    monkeypatch.delenv("RVOS_CUDA_ARCHS")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert setup["architectures"]("nvcc") == [("75", False)]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setitem(
        setup["architectures"].__globals__,
        "read_output",
        lambda command, *options: "compute_80\ncompute_90\n" if "list" in options[0] else "",
    )
    assert setup["architectures"]("nvcc") == [("80", False), ("90", True)]
