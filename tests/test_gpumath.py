"""The functions of Triton kernels: their values under Triton's interpreter, and that they compile for every target, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqparc.ops import OPS

pytest.importorskip("triton")

COMPOSED = ("add", "sub", "mul", "div", "neg", "reciprocal", "square", "held")  # plain arithmetic in the generated text
NAMES = tuple(name for name in OPS if name not in COMPOSED)
TYPES = ("float32", "float64")

#: Most units in the last place from torch in the next wider type: float32, float64.
FAST = {"tanh": (2, 4), "sigmoid": (2.5, 4), "exp": (1.5, 2), "log": (1.5, 2), "sqrt": (0.51, 1.01), "rsqrt": (2, 3)}
FUSED = ("sigmoid", "fmod", "remainder")  # rely on tl.fma rounding once, which older interpreters do not
EXACT = "fmod remainder abs relu maximum minimum sign floor ceil round trunc lt le gt ge eq ne where".split()
BOUND = {name: FAST.get(name, (0, 0) if name in EXACT else (4, 8)) for name in NAMES} | {"pow": (0.51, 450)}
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 1e-45, -1e-45, 1e-40, 1e30, -1e30, 100.0)
#: Where a function is tried beyond the table's domain; elsewhere it is tried over every binade.
RANGE = {"sin": 1e4, "cos": 1e4, "tan": 1e4, "asin": 1.0, "acos": 1.0, "atanh": 1.0}


def _kernels() -> str:
    """One kernel per function, and one that uses all."""
    text = "import triton\nimport triton.language as tl\nfrom seqparc.codegen import gpumath as m\n"
    every = []
    for name in NAMES:
        loads = [f"tl.load({p} + i)" for p in "abc"[: OPS[name].arity]]
        call = f"m.{name}({', '.join(loads)})"
        text += f"\n@triton.jit\ndef k_{name}(a, b, c, y, N: tl.constexpr):\n    i = tl.program_id(0) * N + tl.arange(0, N)\n"
        text += f"    tl.store(y + i, {call})\n"
        every.append(f"    tl.store(y + {len(every)} * N + i, {call})\n")
    text += "\n@triton.jit\ndef k_fused(a, y, N: tl.constexpr):\n    i = tl.arange(0, N)\n    x = tl.load(a + i)\n"
    text += "    tl.store(y + i, tl.fma(x, x, -x * x))\n"
    return text + "\n@triton.jit\ndef k_all(a, b, c, y, N: tl.constexpr):\n    i = tl.arange(0, N)\n" + "".join(every)


def _wide_arguments(name: str, dtype: type, rng: np.random.Generator) -> np.ndarray:
    info = np.finfo(dtype)
    if name in RANGE:
        most = RANGE[name]
        x = np.concatenate([rng.uniform(-most, most, 2000), most * np.exp2(rng.uniform(-60, 0, 1000)) * rng.choice([-1, 1], 1000)])
    else:
        low, high = np.log2(float(info.smallest_subnormal)), np.log2(float(info.max))
        edge = high * np.log(2)
        x = np.concatenate([np.exp2(rng.uniform(low, high, 2000)) * rng.choice([-1, 1], 2000), rng.normal(0, 3, 1000)])
        x = np.concatenate([x, rng.uniform(-1.1 * edge, 1.1 * edge, 1000), 1 + rng.normal(0, 0.01, 500)])
    return np.concatenate([x, SPECIAL]).astype(dtype)


def _arguments(name: str, dtype: type) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    domains = OPS[name].domains
    cases = {"domain": [rng.uniform(*d, 4000).astype(dtype) for d in domains]}
    if OPS[name].arity == 1:
        cases["wide"] = [_wide_arguments(name, dtype, rng)]
    else:
        some = np.concatenate([SPECIAL, rng.normal(0, 3, 30), np.arange(-4, 5)]).astype(dtype)
        grids = np.meshgrid(*[some] * 2)
        pair = [g.ravel() for g in grids]
        cases["wide"] = pair if OPS[name].arity == 2 else [rng.choice(some, pair[0].size), *pair]
    return cases


def _defined(name: str, arguments: list[np.ndarray]) -> list[np.ndarray]:
    """Without what fmod does not promise, and divisors for which torch's vector loop, unlike its scalar one, gives NaN."""
    if name not in ("fmod", "remainder"):
        return arguments
    a, b = (np.abs(x.astype(np.float64)) for x in arguments)
    keep = (b == 0) | ~np.isfinite(a) | (b >= np.finfo(arguments[0].dtype).smallest_normal) & (a < b * 2.0**100) | np.isnan(b)
    return [x[keep] for x in arguments]


def _right(name: str, arguments: list[np.ndarray]) -> np.ndarray:
    """torch's values, in float64 where the arguments are float32 and rounding is to be measured."""
    if name in ("sinh", "cosh"):  # torch's vector loop is infinite from 710 on, before the result is
        return getattr(np, name)(arguments[0].astype(np.float64))
    given = [torch.from_numpy(a) for a in arguments]
    if given[0].dtype == torch.float32 and name not in EXACT:
        given = [a.double() for a in given]
    return OPS[name].torch(*given).numpy()


def _distance(name: str, got: np.ndarray, right: np.ndarray) -> float:
    """The largest error in ulp; infinite where a NaN, an infinity or the sign of a zero differs."""
    rounded = right.astype(got.dtype)
    if name == "sigmoid":  # 1 / (1 + inf) where the result is denormal, in torch's float32 too
        denormal = np.abs(rounded) < np.finfo(got.dtype).smallest_normal
        got = np.where(denormal & (got == 0), rounded, got)
    finite, zero = np.isfinite(rounded), rounded == 0
    top = np.isinf(rounded) & (np.abs(got) > 0.999 * np.finfo(got.dtype).max)
    same = np.where(finite, np.isfinite(got), (got == rounded) | top | (np.isnan(got) & np.isnan(rounded)))
    signs = zero & (got == 0) & (np.signbit(got) != np.signbit(rounded))
    if not same.all() or (signs.any() and name not in ("relu", "maximum", "minimum")):
        return float("inf")
    return float(np.max(np.abs(got[finite].astype(right.dtype) - right[finite]) / np.spacing(np.abs(rounded[finite])), initial=0))


def _measure() -> dict[str, float]:
    """function/type/case -> error in ulp. To be run with TRITON_INTERPRET=1."""
    import gpumath_kernels as kernels

    np.seterr(all="ignore")
    n = 1024
    x = torch.linspace(1, 2, n)
    y = torch.empty_like(x)
    kernels.k_fused[(1,)](x, y, n)
    found = {"fused": float((y != 0).any())}
    for name in NAMES:
        for kind in TYPES:
            for case, arguments in _arguments(name, getattr(np, kind)).items():
                arguments = _defined(name, arguments)
                size = arguments[0].size
                padded = [torch.from_numpy(np.concatenate([a, np.ones(-size % n, a.dtype)])) for a in arguments]
                y = torch.empty_like(padded[0])
                getattr(kernels, f"k_{name}")[(y.numel() // n,)](*(padded * 3)[:3], y, n)
                found[f"{name}/{kind}/{case}"] = _distance(name, y.numpy()[:size], _right(name, arguments))
    return found


def _compile() -> dict[str, list[str]]:
    """target/type -> the forms the kernel of all functions was brought to. To be run without TRITON_INTERPRET."""
    import gpumath_kernels as kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for backend, arch, width in (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)):
        for kind, short in zip(TYPES, ("fp32", "fp64"), strict=True):
            signature = dict.fromkeys("abcy", f"*{short}") | {"N": "constexpr"}
            made = triton.compile(ASTSource(kernels.k_all, signature, {"N": 64}), target=GPUTarget(backend, arch, width))
            found[f"{arch}/{kind}"] = list(made.asm)
    return found


def _run(folder: Path, what: str) -> dict[str, Any]:
    """In a process of its own: triton asks when it is imported whether it interprets."""
    (folder / "gpumath_kernels.py").write_text(_kernels())
    changes = {
        "TRITON_INTERPRET": str(int(what == "measure")),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, env=os.environ | changes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    return _run(tmp_path_factory.mktemp("gpumath"), "measure")


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_values_are_torchs(measured, name):
    if name in FUSED and not measured["fused"]:
        pytest.skip("this interpreter rounds twice in tl.fma")
    for kind, bound in zip(TYPES, BOUND[name], strict=True):
        for case in ("domain", "wide"):
            assert measured[f"{name}/{kind}/{case}"] <= bound, (kind, case)


def test_compiles_for_every_target_without_a_gpu(tmp_path):
    made = _run(tmp_path, "compile")
    assert all(("hsaco" if target.startswith("gfx") else "cubin") in forms for target, forms in made.items())
    assert len(made) == 6


if __name__ == "__main__":
    print(json.dumps({"measure": _measure, "compile": _compile}[sys.argv[1]]()))
