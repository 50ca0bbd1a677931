"""The emulator of CUDA kernels: it runs a right kernel rightly and notices what is wrong with a broken one."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("pipelined_matmul.cu", "hopper_matmul.cu", "cluster_matmul.cu")
KERNEL, HOPPER, CLUSTER = (Path(__file__).with_name(name) for name in NAMES)
FLAGS = ["-std=c++20", "-DMMK_EMULATOR", f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas", "-pthread"]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")


# In the order of `enum Fault`.
FAULTS = ["NONE", "NO_WAIT", "NO_BARRIER", "WRONG_FRAGMENT", "DIVERGENT_SHUFFLE", "PARTIAL_BARRIER", "MISALIGNED_COPY"]
FAULTS += ["MISALIGNED_LDMATRIX", "PAST_THE_END", "UNINITIALISED"]
HOPPER_FAULTS = ["NONE", "NO_FENCE_AFTER_COPY", "NO_FENCE_AFTER_STORE", "NO_WGMMA_FENCE", "NO_WGMMA_WAIT", "SWAPPED_STRIDES"]
HOPPER_FAULTS += ["SWAPPED_STRIDES_BY_COLUMNS", "WRONG_MAJOR", "EARLY_RELEASE", "WRONG_PARITY", "NO_FULL_WAIT"]
HOPPER_FAULTS += ["MISSING_ARRIVAL", "UNINITIALISED_BARRIER", "WRONG_THREADS", "PAST_THE_END"]
CLUSTER_FAULTS = ["NONE", "NO_SWIZZLE", "TOO_MANY_BYTES", "TOO_FEW_BYTES", "NO_FULL_WAIT", "EARLY_RELEASE"]
CLUSTER_FAULTS += ["RELEASE_TO_ITSELF", "RELEASE_TO_NOBODY", "MISALIGNED_BOX", "NO_CLUSTER_SYNC"]


def build(kernel, faults, folder):
    """run(fault, copies, seed): what the program of a kernel prints with one of its faults in one mode of copies."""
    program = folder / "matmul"
    sources = [str(kernel), str(ROOT / "csrc/emulator/emulator.cpp")]
    subprocess.run(["g++", *FLAGS, "-O1", "-x", "c++", *sources, "-o", str(program)], check=True)

    def run(fault, copies, seed=0):
        env = os.environ | {"MMKERNELS_EMULATOR_COPIES": copies, "MMKERNELS_EMULATOR_SEED": str(seed)}
        command = [str(program), str(faults.index(fault))]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout.strip()

    return run


@pytest.fixture(scope="module")
def matmul(tmp_path_factory):
    return build(KERNEL, FAULTS, tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def hopper_matmul(tmp_path_factory):
    return build(HOPPER, HOPPER_FAULTS, tmp_path_factory.mktemp("hopper"))


@pytest.fixture(scope="module")
def cluster_matmul(tmp_path_factory):
    return build(CLUSTER, CLUSTER_FAULTS, tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize("copies", ["early", "late", "random"])
def test_a_right_kernel_is_right(matmul, copies):
    assert [matmul("NONE", copies, seed) for seed in range(5)] == ["right"] * 5


@pytest.mark.parametrize(
    "fault, copies, message",
    [
        ("NO_WAIT", "late", "nan, it must be"),
        ("NO_BARRIER", "early", ", it must be"),
        ("NO_BARRIER", "late", "nan, it must be"),
        ("UNINITIALISED", "early", "nan, it must be"),
        ("WRONG_FRAGMENT", "early", ", it must be"),
        ("DIVERGENT_SHUFFLE", "early", "Threads 16 to 31 have returned"),
        ("PARTIAL_BARRIER", "early", "Threads 0 to 95 wait at __syncthreads"),
        ("MISALIGNED_COPY", "early", "not a multiple of 16"),
        ("MISALIGNED_LDMATRIX", "early", "ldmatrix.x4 at shared offset"),
        ("PAST_THE_END", "early", "wrote past the end of its 16384 bytes of shared memory"),
    ],
)
def test_a_fault_is_noticed(matmul, fault, copies, message):
    assert message in matmul(fault, copies)


def test_copies_that_land_at_once_hide_a_missing_wait(matmul):
    """Why the tests of kernels run in both modes."""
    assert matmul("NO_WAIT", "early") == "right"


# Every tile walk of every family, with edges in each direction; as a script, because the sanitizer must be loaded first.
SANITIZED = """
import sys
import torch

torch.ops.load_library(sys.argv[1])
ops = torch.ops.mmkernels_emulator
for dtype, n, m, d, e in ((torch.bfloat16, 1, 97, 5, 17), (torch.float32, 63, 65, 17, 40), (torch.float16, 17, 33, 261, 20)):
    q, k, v = (torch.randn(2, 1, *size, dtype=dtype) for size in ((n, d), (m, d), (m, e)))
    mask, bias, seed = torch.rand(2, m) < 0.7, torch.randn(1, 1, 1, m, dtype=dtype), torch.tensor([1])
    out, lse = ops.attention_fwd(q, k, v, mask, bias, None, seed, 0.3, 0.2)
    ops.attention_bwd(torch.randn_like(out), lse, q, k, v, out, lse, mask, bias, None, seed, 0.3, 0.2, 7)
for dtype, d, e in ((torch.bfloat16, 5, 17), (torch.float32, 17, 40), (torch.float16, 261, 20)):
    # Two segments of queries, the first of which counts in part, and of keys; then one of each.
    sizes = ((63, d), (5, d), (97, d), (97, e), (3, d), (3, e), (17, d), (33, d), (33, e))
    tensors = [torch.randn(2, rows, 1, 1, width, dtype=dtype) for rows, width in sizes]
    masks, seed = [torch.rand(2, 97) < 0.7, torch.rand(2, 3) < 0.7], torch.tensor([1])
    problems = [31, 0, 0, 1, 0, 2, 0, 4, 0, 3, 0, 5, 0, 0, 1, -1, 6, 0, -1, -1, 7, 0, -1, -1, 8, 0, -1, -1, -1, -1]
    out, lse = ops.attention_list_fwd(tensors, problems, masks, seed, 0.3, 0.2)
    dout, dlse = [torch.randn_like(t) for t in out], [torch.randn_like(t) for t in lse]
    ops.attention_list_bwd(dout, dlse, tensors, problems, masks, out, lse, seed, 0.3, 0.2, [1] * 9)
for dtype, batch, n, m, content, shared in (
    (torch.bfloat16, 1, 1, 97, 5, 0),
    (torch.float32, 2, 17, 65, 3, 34),
    (torch.float16, 2, 33, 40, 3, 258),
    (torch.bfloat16, 1, 19, 35, 600, 1),
    (torch.bfloat16, 2, 40, 100, 512, 0),
    (torch.bfloat16, 1, 65, 100, 601, 96),
    (torch.float32, 1, 5, 33, 323, 0),
):
    q, x = torch.randn(1, n, content + shared, dtype=dtype), torch.randn(batch, m, content, dtype=dtype)
    position, mask = torch.randn(m, shared, dtype=dtype) if shared else None, torch.rand(batch, m) < 0.7
    out, lse = ops.latent_fwd(q, x, position, mask, 0.3, 1e-5)
    ops.latent_bwd(torch.randn_like(out), lse, q, x, position, mask, out, lse, 0.3, 1e-5, 7)
for dtype, rows, fan_in, fan_out, grid, index, per_gate in (
    (torch.bfloat16, 74, 48, 24, (2, 3, 3), None, 37),
    (torch.float32, 33, 45, 66, (3, 5, 6), torch.randint(3, (33,)), 1),
    (torch.float16, 100, 63, 97, (1, 7, 1), None, 100),
    (torch.bfloat16, 576, 96, 200, (3, 1, 25), None, 192),
    (torch.float16, 640, 72, 33, (4, 9, 3), torch.randint(4, (5,)), 128),
    (torch.bfloat16, 640, 264, 136, (4, 33, 17), torch.randint(4, (5,)), 128),
):
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((rows, fan_in), (fan_out, fan_in), (fan_out,)))
    gate, seed = torch.rand(grid), torch.tensor([1])
    for activation, p, one in ((1, 0.0, None), (2, 0.2, seed)):
        y = ops.hypergrid_fwd(x, weight, gate, bias, index, per_gate, True, activation, p, one)
        ops.hypergrid_bwd(y, x, weight, gate, index, per_gate, True, activation, p, one, True, True, True, True)
row, column = torch.randn(5, 33), torch.randn(1, 7)
ops.hypergrid_gate_bwd(ops.hypergrid_gate_fwd(row, column), row, column)
print("clean")
"""


@pytest.mark.parametrize("copies", ["early", "late", "random"])
def test_a_right_hopper_kernel_is_right(hopper_matmul, copies):
    assert [hopper_matmul("NONE", copies, seed) for seed in range(8)] == ["right"] * 8


@pytest.mark.parametrize("copies", ["early", "late", "random"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("NO_FENCE_AFTER_COPY", "wgmma reads b at offset 8192, which thread 128 has written without fence.proxy.async"),
        ("NO_FENCE_AFTER_STORE", "wgmma reads a at offset"),
        ("NO_WGMMA_FENCE", "wgmma.mma_async without a wgmma.fence since the last wait"),
        ("NO_WGMMA_WAIT", "nan, it must be"),
        ("SWAPPED_STRIDES", ", it must be"),
        ("SWAPPED_STRIDES_BY_COLUMNS", ", it must be"),
        ("WRONG_MAJOR", ", it must be"),
        ("WRONG_PARITY", "wait at mbarrier.try_wait"),
        ("MISSING_ARRIVAL", "wait at mbarrier.try_wait"),
        ("UNINITIALISED_BARRIER", "on an mbarrier that nobody has initialised"),
        ("WRONG_THREADS", "Threads 0 to 127 wait at bar.sync"),
        ("PAST_THE_END", "outside of shared memory"),
    ],
)
def test_a_fault_of_hopper_is_noticed(hopper_matmul, fault, copies, message):
    assert message in hopper_matmul(fault, copies)


@pytest.mark.parametrize("fault", ["EARLY_RELEASE", "NO_FULL_WAIT"])
def test_a_race_of_hopper_is_noticed_in_some_order(hopper_matmul, fault):
    """Races that some orders of the threads hide: why the tests of kernels run with several seeds."""
    results = {hopper_matmul(fault, "late", seed) for seed in range(12)}
    assert any("it must be" in result for result in results)


@pytest.mark.parametrize("copies", ["early", "late", "random"])
def test_a_right_cluster_is_right(cluster_matmul, copies):
    assert [cluster_matmul("NONE", copies, seed) for seed in range(8)] == ["right"] * 8


@pytest.mark.parametrize(
    "fault, copies, message",
    [
        ("NO_SWIZZLE", "early", ", it must be"),
        ("TOO_MANY_BYTES", "early", "wait at mbarrier.try_wait"),
        ("NO_FULL_WAIT", "late", "nan, it must be"),
        ("RELEASE_TO_NOBODY", "early", "wait at mbarrier.try_wait"),
        ("MISALIGNED_BOX", "early", "which must be a multiple of 1024"),
    ],
)
def test_a_fault_of_a_cluster_is_noticed(cluster_matmul, fault, copies, message):
    assert message in cluster_matmul(fault, copies)


@pytest.mark.parametrize("fault", ["TOO_FEW_BYTES", "EARLY_RELEASE", "RELEASE_TO_ITSELF", "NO_CLUSTER_SYNC"])
def test_a_race_of_a_cluster_is_noticed_in_some_order(cluster_matmul, fault):
    results = {cluster_matmul(fault, copies, seed) for seed in range(12) for copies in ("early", "late")}
    assert results != {"right"}


@pytest.mark.slow
def test_kernels_under_address_sanitizer(tmp_path):
    """Plain reads and writes outside any tensor, or past the end of shared memory, end the program."""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_file():
        pytest.skip("g++ has no AddressSanitizer")
    torch_folder = Path(torch.__file__).parent
    flags = [*FLAGS, "-O1", "-g1", "-fPIC", "-fsanitize=address", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = [path for kind in ("*/*_cuda.cu", "*/*_cuda.cpp", "emulator/*.cpp") for path in (ROOT / "csrc").glob(kind)]
    assert {"attention", "hypergrid", "latent", "common", "emulator"} <= {source.parent.name for source in sources}

    def compiled(source):
        built = tmp_path / f"{source.name}.o"
        include = ["-I", str(torch_folder / "include")] if source.suffix == ".cpp" else []
        subprocess.run(["g++", *flags, *include, "-x", "c++", "-c", str(source), "-o", str(built)], check=True)
        return str(built)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = tmp_path / "emulator.so"
    link = ["g++", "-shared", "-fsanitize=address", *objects, "-L", str(torch_folder / "lib")]
    subprocess.run([*link, "-lc10", "-ltorch_cpu", "-pthread", "-o", str(library)], check=True)

    env = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(library)]
    # One multiprocessor walks over all keys, many split them and merge.
    for multiprocessors in ("1", "64"):
        env["MMKERNELS_EMULATOR_MULTIPROCESSORS"] = multiprocessors
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == "clean", done.stderr[-3000:]
