"""What compiled kernels use, read from their machine code on a machine with no GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from seqparc.codegen import resources
from seqparc.codegen.resources import KINDS, TARGETS, Resources, bound, check, compile_for, find_target, measure, occupancy
from seqparc.errors import ToolchainError

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

NVIDIA, ALL = ("sm_80", "sm_90"), tuple(TARGETS)
FUSED = {"enable_fp_fusion": True}  # said, as triton's own default is about to change
WARPS = 4


# Made JITFunction by hand: under TRITON_INTERPRET, which other tests set, @triton.jit gives functions with no machine code.
@JITFunction
def gated(inputs, start, states, steps, lanes, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(start + i)
    for t in range(steps):
        x = tl.load(inputs + t * lanes + i)
        gate = 1.0 / (1.0 + tl.exp(-(x + 0.5 * state)))
        state = state + gate * (x - state)
        tl.store(states + t * lanes + i, state)


@JITFunction
def product(a, b, c, depth, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for k in range(0, depth, BLOCK):
        left = tl.load(a + i[:, None] * depth + k + i[None, :])
        right = tl.load(b + (k + i[:, None]) * BLOCK + i[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * BLOCK + i[None, :], total)


@JITFunction
def nested(inputs, states, steps, terms, lanes, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(inputs + i)
    for t in range(steps):
        position = i
        while tl.max(position, 0) < terms:  # integers only, so the step around it is the hotter
            position = position * 3 + 1
        state = tl.exp(state * 0.5) * tl.exp(state + 1.0) / (state + tl.load(inputs + position))
        tl.store(states + t * lanes + i, state)


@JITFunction
def straight(a, b, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + i) + 1.0)


POINTERS = {"inputs": "*fp32:16", "start": "*fp32:16", "states": "*fp32:16"}
GATED = (gated, {**POINTERS, "steps": "i32", "lanes": "i32"})
PRODUCT = (product, {"a": "*fp16:16", "b": "*fp16:16", "c": "*fp32:16", "depth": "i32:16"})


def used(kernel: tuple[Any, dict[str, str]], target: str, block: int, warps: int = WARPS, **options: Any) -> Resources:
    function, signature = kernel
    return measure(compile_for(function, signature, {"BLOCK": block}, target, warps, {**FUSED, **options}), target)


def counted(opcodes: dict[str, int], start: str) -> int:
    return sum(n for name, n in opcodes.items() if name.startswith(start))


@pytest.mark.parametrize("target", NVIDIA)
def test_a_step_holds_what_its_source_says(target: str) -> None:
    r = used(GATED, target, 32 * WARPS)
    assert 0 < r.registers <= 255 and r.spills == 0 and r.shared == 0
    steps = counted(r.loop_opcodes, "STG")  # one store a step
    assert steps >= 1
    assert counted(r.loop_opcodes, "LDG") == counted(r.loop_opcodes, "MUFU.EX2") == counted(r.loop_opcodes, "MUFU.RCP") == steps
    assert r.loop["special"] == r.loop["memory"] == 2 * steps
    assert r.loop["fma"] >= 5 * steps  # two sums of the gate, its scale, the difference and the update
    assert r.loop["integer"] > 0 and r.loop["control"] > 0
    assert r.loop["tensor"] == r.loop["shuffle"] == r.loop["convert"] == 0
    assert tuple(r.loop) == tuple(r.instructions) == KINDS
    assert all(r.loop[kind] <= r.instructions[kind] for kind in KINDS)
    assert check(r, target, WARPS) == []


@pytest.mark.parametrize("target", NVIDIA)
def test_elements_of_a_lane_multiply_the_work(target: str) -> None:
    r = used(GATED, target, 4 * 32 * WARPS)
    steps = counted(r.loop_opcodes, "MUFU.EX2") // 4
    assert r.loop["special"] == 8 * steps
    assert r.registers > used(GATED, target, 32 * WARPS).registers


def test_amd_gives_the_same_kinds() -> None:
    r = used(GATED, "gfx942", 64 * WARPS)
    assert 0 < r.registers <= 512 and r.spills == 0 and r.shared == 0
    steps = counted(r.loop_opcodes, "global_store")
    assert steps >= 1
    assert counted(r.loop_opcodes, "v_exp_f32") == counted(r.loop_opcodes, "v_rcp_f32") == counted(r.loop_opcodes, "global_load") == steps
    assert r.loop["special"] == r.loop["memory"] == 2 * steps
    assert r.loop["fma"] >= 5 * steps and r.loop["integer"] > 0 and r.loop["control"] > 0
    assert tuple(r.loop) == KINDS and r.loop["tensor"] == 0
    assert check(r, "gfx942", WARPS) == []


@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")])
def test_matrix_products_are_on_tensor_cores(target: str, name: str) -> None:
    r = used(PRODUCT, target, 64)
    assert r.loop["tensor"] == counted(r.loop_opcodes, name) > 0
    assert 0 < r.shared <= find_target(target).shared_per_block and r.shared % 1024 == 0
    assert r.spills == 0 and check(r, target, WARPS) == []


def test_the_systems_share_of_shared_memory_is_not_the_kernels() -> None:
    compiled = compile_for(*PRODUCT, {"BLOCK": 64}, "sm_90", WARPS, FUSED)
    assert measure(compiled, "sm_90").shared == compiled.metadata.shared


def test_spills_are_seen() -> None:
    r = used(GATED, "sm_80", 2048, warps=1, maxnreg=40)
    assert r.spills > 0 and counted(r.loop_opcodes, "LDL") + counted(r.loop_opcodes, "STL") > 0
    (problem,) = check(r, "sm_80", 1)
    assert f"{r.spills} bytes" in problem and "local memory" in problem


@pytest.mark.skipif(not isinstance(tl.max, JITFunction), reason="triton's own library is interpreted in this process")
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_step_is_hotter_than_a_small_loop_inside(target: str) -> None:
    signature = {"inputs": "*fp32:16", "states": "*fp32:16", "steps": "i32", "terms": "i32", "lanes": "i32"}
    r = used((nested, signature), target, 128)
    inner = [loop for loop in r.loops if loop.depth == 2]
    assert inner and r.loops[0].depth == 1
    assert r.loop["special"] >= 3 and all(loop.instructions["special"] == 0 for loop in inner)
    assert sum(r.loops[0].own.values()) < sum(r.loop.values())
    assert r.loop["shuffle"] > 0  # the maximum over a warp


def test_a_kernel_with_no_loop() -> None:
    r = used((straight, {"a": "*fp32:16", "b": "*fp32:16"}), "sm_80", 128)
    assert r.loops == () and r.loop_opcodes == {} and set(r.loop.values()) == {0}
    assert r.instructions["memory"] == 2 and r.instructions["fma"] == 1


def _resources(registers: int = 32, shared: int = 0, spills: int = 0) -> Resources:
    return Resources(registers, spills, shared, {}, {}, {}, ())


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "resident"),
    [
        ("sm_80", 32, 0, 4, 64),  # all there are
        ("sm_80", 32, 0, 1, 32),  # as many blocks as there can be
        ("sm_80", 33, 0, 4, 48),  # 40 registers a lane when rounded: 12 warps in each of the four parts
        ("sm_80", 255, 0, 4, 8),
        ("sm_80", 255, 0, 16, 0),  # 16 warps at once do not fit
        ("sm_80", 32, 40 * 1024, 4, 16),  # the system's kilobyte makes four blocks exactly
        ("sm_90", 32, 227 * 1024, 4, 4),
        ("sm_90", 32, 228 * 1024, 4, 0),
        ("gfx942", 64, 0, 4, 32),
        ("gfx942", 128, 0, 4, 16),
        ("gfx942", 32, 20 * 1024, 4, 12),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, resident: int) -> None:
    assert occupancy(_resources(registers, shared), target, warps) == resident


def test_problems_are_in_words() -> None:
    assert check(_resources(), "sm_90", 4) == []
    assert "shared memory" in check(_resources(shared=164 * 1024), "sm_80", 4)[0]
    assert check(_resources(shared=164 * 1024), "sm_90", 4) == []
    assert "256 registers" in check(_resources(registers=256), "sm_80", 4)[0]
    assert "more than a multiprocessor" in check(_resources(registers=255), "sm_80", 16)[0]
    assert "lanes per block" in check(_resources(), "gfx942", 32)[0]


def test_bound_names_the_unit() -> None:
    h100 = find_target("sm_90")
    lanes = h100.multiprocessors * h100.clock * 1e9
    assert bound({"fma": 10}, 1, 100.0, "sm_90") == ("memory", pytest.approx(100 / h100.bandwidth))
    assert bound({"fma": 1000}, 1, 0.0, "sm_90") == ("fma", pytest.approx(1000 / (128 * lanes)))
    assert bound({"fma": 1000}, 2, 0.0, "sm_90", double=True) == ("fma", pytest.approx(1000 / (64 * lanes) / 2))
    assert bound({"fma": 10, "special": 10}, 1, 0.0, "sm_90")[0] == "special"
    assert bound({"fma": 10, "integer": 10, "compare": 10}, 1, 0.0, "sm_90")[0] == "integer"
    assert bound({"fma": 100, "integer": 40, "other": 100}, 1, 0.0, "sm_90")[0] == "issue"


def test_an_unknown_target_is_said() -> None:
    with pytest.raises(ToolchainError, match=r"sm_70.*sm_80, sm_90, gfx942"):
        compile_for(gated, {}, {}, "sm_70", WARPS)


def test_a_missing_argument_is_said() -> None:
    with pytest.raises(ToolchainError, match=r"differ in \['lanes'\]"):
        compile_for(gated, {**POINTERS, "steps": "i32"}, {"BLOCK": 128}, "sm_80", WARPS)


def test_a_kernel_that_cannot_compile_is_said() -> None:
    with pytest.raises(ToolchainError, match=r"(?s)cannot compile product for sm_80.*smaller blocks") as caught:
        compile_for(product, PRODUCT[1], {"BLOCK": 63}, "sm_80", WARPS, FUSED)
    assert "power of 2" in caught.value.output and caught.value.command


def test_a_kernel_of_another_target_is_said() -> None:
    compiled = compile_for(*GATED, {"BLOCK": 128}, "gfx942", WARPS, FUSED)
    with pytest.raises(ToolchainError, match=r"no cubin. Compile it for sm_80"):
        measure(compiled, "sm_80")


def test_a_plain_function_is_said() -> None:
    with pytest.raises(ToolchainError, match="TRITON_INTERPRET"):
        compile_for(lambda: None, {}, {}, "sm_80", WARPS)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ToolchainError, match="pip install triton"):
        compile_for(gated, {}, {}, "sm_80", WARPS)


def test_without_cuobjdump(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        @property
        def path(self) -> str:
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(triton.knobs, "nvidia", SimpleNamespace(cuobjdump=Nothing()))
    with pytest.raises(ToolchainError, match="TRITON_CUOBJDUMP_PATH"):
        resources._cuobjdump(b"")


def test_a_cubin_that_is_none() -> None:
    with pytest.raises(ToolchainError, match="failed"):
        resources._cuobjdump(b"not a cubin")
