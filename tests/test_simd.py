"""The vector header of generated kernels against the same functions in more digits, at the native and at the portable width."""

from __future__ import annotations

import ctypes
import importlib.resources
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

HEADER = importlib.resources.files("seqparc.codegen").joinpath("simd.h").read_text()
CC = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc")
FLAGS = ("-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
POLYNOMIAL = ("exp", "tanh", "sigmoid", "log")
LIBM = (
    "expm1", "log1p", "sin", "cos", "tan", "sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos", "atan", "erf", "sqrt", "rsqrt",
)  # fmt: skip
EXACT = ("abs", "neg", "sign", "floor", "ceil", "round", "trunc")
BINARY = ("max", "min", "pow", "fmod", "remainder", "atan2", "lt", "le", "gt", "ge", "eq", "ne")
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 1e-45, -1e-45, 5e-324, 1e-40, 1e30, -1e30)


def _source(double: bool) -> str:
    def define(name: str, arguments: int) -> str:
        names = "abc"[:arguments]
        loads = ", ".join(f"sp_load({x} + i)" for x in names)
        given = ", ".join(f"const real *{x}" for x in names)
        return f"void v_{name}({given}, real *y, long n) {{ for (long i = 0; i < n; i += W) sp_store(y + i, sp_{name}({loads})); }}\n"

    text = f"#define SP_DOUBLE {int(double)}\n{HEADER}\n"
    text += "".join(define(name, 1) for name in POLYNOMIAL + LIBM + EXACT)
    text += "".join(define(name, 2) for name in BINARY) + define("where", 3)
    text += "int width(void) { return W; }\nvoid v_set1(real x, real *y) { sp_store(y, sp_set1(x)); }\n"
    text += "void v_gather(const real *p, const int64_t *o, real *y) { sp_store(y, sp_gather(p, o)); }\n"
    for part in ("halves", "quarters"):
        text += f"void v_load_{part}(const real *p, const int64_t *o, real *y) {{ sp_store(y, sp_load_{part}(p, o)); }}\n"
        text += f"void v_store_{part}(real *p, const int64_t *o, const real *x) {{ sp_store_{part}(p, o, sp_load(x)); }}\n"
    return text + "void v_scatter(real *p, const int64_t *o, const real *x) { sp_scatter(p, o, sp_load(x)); }\n"


def _compile(folder, double: bool, *flags: str) -> str:
    source, made = folder / "simd.c", folder / "simd.so"
    source.write_text(_source(double))
    done = subprocess.run([CC, *FLAGS, *flags, "-shared", "-fPIC", source, "-o", made, "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(made)


class Library:
    """The compiled functions over numpy arrays of one type."""

    def __init__(self, path: str, dtype: type):
        self.dtype, self.c = dtype, ctypes.CDLL(path)
        self.width: int = self.c.width()

    def __call__(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        n = arrays[0].size
        room = -(-n // self.width) * self.width
        given = [np.concatenate([np.asarray(a, self.dtype), np.ones(room - n, self.dtype)]) for a in arrays]
        out = np.empty(room, self.dtype)
        getattr(self.c, f"v_{name}")(*(ctypes.c_void_p(a.ctypes.data) for a in (*given, out)), ctypes.c_long(room))
        return out[:n]


@pytest.fixture(scope="module", params=["native", "portable"])
def width(request) -> tuple[str, ...]:
    return ("-O3", "-march=native") if request.param == "native" else ("-O3",)


@pytest.fixture(scope="module", params=[np.float32, np.float64], ids=["float32", "float64"])
def simd(request, width, tmp_path_factory) -> Library:
    return Library(_compile(tmp_path_factory.mktemp("simd"), request.param is np.float64, *width), request.param)


def _wide(name: str, x: np.ndarray) -> np.ndarray:
    """The function in the next wider format."""
    x = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    if name == "sigmoid":
        e = np.exp(-np.abs(x))  # so that neither side overflows
        return np.where(x < 0, e, 1) / (1 + e)
    if name == "rsqrt":
        return 1 / np.sqrt(x)
    return getattr(np, f"arc{name[1:]}" if name.startswith("a") else name)(x)


def _ulp(got: np.ndarray, wide: np.ndarray) -> float:
    """The largest distance from the correctly rounded value, in units of its last place (denormals included)."""
    right = wide.astype(got.dtype)
    normal = np.isfinite(right)
    np.testing.assert_array_equal(got[~normal], right[~normal])  # NaN and inf where they should be, and only there
    assert np.isfinite(got[normal]).all()
    last = np.spacing(np.abs(right[normal])).astype(wide.dtype)
    return float(np.max(np.abs(got[normal].astype(wide.dtype) - right[normal].astype(wide.dtype)) / last))


def _arguments(dtype: type, every: int = 1) -> np.ndarray:
    """Every binade with both signs, dense where functions bend, and the ends of the range of exp."""
    rng, info = np.random.default_rng(0), np.finfo(dtype)
    small, large = np.log2(float(info.smallest_subnormal)), np.log2(float(info.max))
    edge = large * np.log(2)
    spread = np.exp2(rng.uniform(small, large, 20000)) * rng.choice([-1, 1], 20000)
    near = np.concatenate([rng.normal(0, s, 40000) for s in (0.1, 1, 4)] + [rng.uniform(-1.1 * edge, 1.1 * edge, 40000)])
    ends = np.concatenate([e + rng.uniform(-1, 1, 4000) for e in (edge, -edge, small * np.log(2), 1, 9.02, 19.1)])
    return np.concatenate([np.concatenate([spread, near, ends])[::every], SPECIAL]).astype(dtype)


@pytest.mark.parametrize("name", POLYNOMIAL)
def test_polynomials_are_within_two_ulp(simd, name):
    x = _arguments(simd.dtype)
    with np.errstate(all="ignore"):
        got, wide = simd(name, x), _wide(name, x)
        assert _ulp(got, wide) <= 2
    zero = wide == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(wide[zero]))


@pytest.mark.parametrize("name", [n for n in LIBM if n != "erf"])
def test_libm_is_called_right(simd, name):
    x = _arguments(simd.dtype, every=8)
    if name in ("sin", "cos", "tan"):
        x = x[np.abs(x) < 1e4]
    with np.errstate(all="ignore"):
        assert _ulp(simd(name, x), _wide(name, x)) <= 3  # glibc's own bound for the worst of these is 2


def test_erf(simd):
    x = _arguments(simd.dtype, every=50)
    right = np.array([math.erf(v) for v in x.tolist()])
    info = np.finfo(simd.dtype)
    np.testing.assert_allclose(simd("erf", x), right.astype(simd.dtype), rtol=3 * info.eps, atol=2 * info.smallest_subnormal)


@pytest.mark.parametrize("name", EXACT)
def test_exact_functions_are_torch_to_the_bit(simd, name):
    x = np.concatenate([_arguments(simd.dtype, every=20), np.arange(-20, 20, 0.5).astype(simd.dtype)])
    got, right = simd(name, x), getattr(torch, name)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, right)
    number = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(right[number]))


@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_are_torch(simd, name):
    rng = np.random.default_rng(1)
    some = np.concatenate([np.array(SPECIAL, simd.dtype), rng.normal(0, 3, 20).astype(simd.dtype)])
    a, b = (m.ravel() for m in np.meshgrid(some, some))
    torch_name = {"max": "maximum", "min": "minimum"}.get(name, name)
    if name in ("fmod", "remainder"):  # torch's vector loop, unlike its scalar one and C, gives NaN for a denormal divisor
        keep = (b == 0) | ~(np.abs(b) < np.finfo(simd.dtype).smallest_normal)
        a, b = a[keep], b[keep]
    right = getattr(torch, torch_name)(torch.from_numpy(a), torch.from_numpy(b)).numpy().astype(simd.dtype)
    rounded = 4 * np.finfo(simd.dtype).eps if name in ("pow", "atan2") else 0  # torch's own are not the last bit's either
    np.testing.assert_allclose(simd(name, a, b), right, rtol=rounded, atol=rounded * float(np.finfo(simd.dtype).smallest_normal))


def test_where_selects_bits_and_takes_nan_for_true(simd):
    c = np.array([0.0, -0.0, 1.0, np.nan, 1e-45, -2.0, np.inf, 0.0], simd.dtype)
    c[4] = np.finfo(simd.dtype).smallest_subnormal  # a denormal is not zero
    a, b = np.full(8, np.nan, simd.dtype), np.full(8, -0.0, simd.dtype)
    got = simd("where", c, a, b)
    np.testing.assert_array_equal(np.isnan(got), [False, False, True, True, True, True, True, False])
    assert np.signbit(got[[0, 1, 7]]).all()


def test_data_moves(simd):
    w, rng = simd.width, np.random.default_rng(2)
    place = rng.permutation(100)[:w].astype(np.int64)
    p, y, x = rng.normal(size=100).astype(simd.dtype), np.empty(w, simd.dtype), np.arange(w, dtype=simd.dtype)

    def at(a: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(a.ctypes.data)

    simd.c.v_gather(at(p), at(place), at(y))
    np.testing.assert_array_equal(y, p[place])
    right = p.copy()
    right[place] = x
    simd.c.v_scatter(at(p), at(place), at(x))
    np.testing.assert_array_equal(p, right)
    for part, n in (("halves", 2), ("quarters", 4)):
        each = max(1, w // n)
        place = np.repeat(rng.permutation(6)[:n] * 16 + 1, each)[:w] + np.tile(np.arange(each), n)[:w]
        getattr(simd.c, f"v_load_{part}")(at(p), at(place), at(y))
        np.testing.assert_array_equal(y, p[place])
        right[place] = x
        getattr(simd.c, f"v_store_{part}")(at(p), at(place), at(x))
        np.testing.assert_array_equal(p, right)
    scalar = ctypes.c_double if simd.dtype is np.float64 else ctypes.c_float
    for number in (-0.0, 1.5, np.nan, -np.inf):
        simd.c.v_set1(scalar(number), at(y))
        np.testing.assert_array_equal(y, np.full(w, number, simd.dtype))
        assert np.isnan(number) or (np.signbit(y) == np.signbit(number)).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("machine", [(), ("-march=native",)], ids=["portable", "native"])
def test_compiles_without_a_warning(tmp_path, double, machine):
    _compile(tmp_path, double, "-O2", "-Wall", "-Wextra", "-Werror", *machine)
