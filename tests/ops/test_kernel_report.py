"""The kernel report on small kernels of its own: what it reads, what it flags. The whole report is a step of CI."""

import json
import os
import subprocess
import sys

import pytest

from mmkernels import kernel_report as report

triton = pytest.importorskip("triton")


# Compiled in workers without TRITON_INTERPRET: this file is imported there too, as a family's kernels.py would be.
SOURCE = """
import triton
import triton.language as tl
from mmkernels.ops._shared.kernels import ReportCase

@triton.jit
def product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(tl.bfloat16))

def cases():
    for name, size, capability in (("small", 64, 80), ("small", 64, 90), ("spilling", 128, 90)):
        signature = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "N": "constexpr"}
        options = dict(num_warps=2 if size == 128 else 4, num_stages=1)
        yield ReportCase(name, product, signature, {"N": size}, options, capability)
"""
MAIN = """
import json, pathlib, sys
sys.path.insert(0, {folder!r})
import tiny_kernels
from mmkernels import kernel_report
kernel_report.REPORT = pathlib.Path({folder!r}) / "kernels.json"
print(json.dumps([kernel_report.triton_result(case) for case in tiny_kernels.cases()]))
"""
BUDGETS = json.loads(report.BUDGETS.read_text())
STRICT = {"default": BUDGETS["default"] | {"stack": 0, "local": 0}, "rules": []}


def compile_tiny_kernels(folder) -> list:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, "-c", MAIN.format(folder=str(folder))]
    root = report.PACKAGE.parent
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True).stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "tiny_kernels.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    found = compile_tiny_kernels(folder)
    assert len(list(folder.glob("mmkernels/kernel-report/*"))) == len(found)  # cached by what they depend on
    return {(r["name"], r["arch"]): r for r in found}


def test_what_the_report_has_of_the_same_code_is_not_compiled_again(folder, results):
    rows = list(results.values())
    committed = [row | {"registers": 1} for row in rows]  # what no compiler would say
    committed[0]["key"] = "1"
    (folder / "kernels.json").write_text(json.dumps({"kernels": committed}))
    found = compile_tiny_kernels(folder)
    assert found[0] == rows[0]  # compiled from other code
    for own, row, known in zip(found[1:], rows[1:], committed[1:], strict=True):
        assert own == (row if row["key"].startswith("0") else known)  # one in sixteen is compiled all the same


def test_reads_the_machine_code(results):
    ampere, hopper = results["triton/small", 80], results["triton/small", 90]
    for result in (ampere, hopper):
        assert 16 <= result["registers"] <= 255 and result["threads"] == 128 and result["instructions"] > 50
        assert result["shared"] <= 64 * 1024 and result["blocks"] >= 1
    assert ampere["counts"]["HMMA"] and "HGMMA" not in ampere["counts"]
    assert hopper["counts"]["HGMMA"]
    assert report.violations([ampere, hopper], STRICT) == []


def test_flags_a_kernel_that_spills(results):
    spilling = results["triton/spilling", 90]
    assert spilling["stack"] > 0 and spilling["counts"]["STL"] > 0
    sentences = report.violations([spilling], STRICT)
    assert any("bytes of stack (spills), the budget is 0" in s for s in sentences)
    assert any("loads and stores of local memory" in s for s in sentences)
    assert all(s.startswith("triton/spilling on sm_90: ") for s in sentences)


def fake(**changes):
    facts = {"name": "triton/x bfloat16", "arch": 90, "registers": 128, "stack": 0, "static_shared": 0, "shared": 1024}
    facts |= {"threads": 128, "instructions": 100, "counts": {"HGMMA": 4}, "blocks": 4}
    return facts | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"counts": {"FFMA": 9}}, "no tensor-core instruction (HGMMA)"),
        ({"shared": 228 * 1024}, "233472 bytes of shared memory, a block may have 232448"),
        ({"arch": 80, "counts": {"HMMA": 1}, "shared": 164 * 1024}, "167936 bytes of shared memory, a block may have 166912"),
        ({"blocks": 0}, "a multiprocessor cannot hold one block of 128 threads"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
)
def test_every_budget_has_its_sentence(changes, sentence):
    result = fake(**changes)
    assert report.violations([result], STRICT) == [f"{result['name']} on sm_{result['arch']}: {sentence}"]


def test_rules_lie_over_the_default_in_their_order():
    rules = [
        {"kernel": "triton/*", "stack": 16, "why": "..."},
        {"kernel": "triton/x*", "arch": [90], "stack": 32, "tensor_core": None, "why": "..."},
    ]
    budgets = {"default": STRICT["default"], "rules": rules}
    assert report.violations([fake(stack=32, counts={})], budgets) == []
    assert len(report.violations([fake(stack=32, counts={}, arch=100)], budgets)) == 2
    assert all(rule.get("why") for rule in BUDGETS["rules"])


def test_occupancy():
    def blocks(arch, **facts):
        return report.resident_blocks(arch, {"registers": 32, "threads": 128, "shared": 0} | facts)

    assert blocks(90) == 16  # 2048 threads
    assert blocks(90, registers=255, threads=256) == 1  # 65536 registers
    assert blocks(90, registers=128, threads=256) == 2
    assert blocks(90, shared=100 * 1024) == 2 and blocks(80, shared=100 * 1024) == 1
    assert blocks(90, threads=None) is None


def test_names_of_cuda_kernels():
    symbol = (
        "_ZN3mmk6latent47_GLOBAL__N__4c3221b2_14_latent_cuda_cu_a9d9985914forward_kernelI13__nv_bfloat16NS1_4TileILi4ELi2ELi9E"
        "Li64EEEEEvNS0_7ProblemENS0_4PlanENS0_7ForwardEb"
    )
    if report.shutil.which("c++filt"):
        assert report.kernel_name(symbol) == "cuda/latent/forward_kernel<bf16, Tile<4, 2, 9, 64>>".removeprefix("cuda/")


def test_the_committed_report_is_whole():
    committed = json.loads(report.REPORT.read_text())
    architectures = {}
    for result in committed["kernels"]:
        architectures.setdefault(result["name"], set()).add(result["arch"])
    assert architectures and all(seen == set(report.LIMITS) for seen in architectures.values())
    assert report.violations(committed["kernels"], BUDGETS) == []
    assert f"`{committed['kernels'][0]['name']}`" in report.TABLE.read_text()
