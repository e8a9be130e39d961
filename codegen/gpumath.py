"""Elementwise functions of generated Triton kernels: float32 or float64 in, the same out, with torch's values at the edges.

Only operations that Triton's interpreter knows are used, so one text runs on a CPU and compiles for NVIDIA and AMD. What
Triton itself offers in float32 flushes denormals or loses digits away from zero, hence own polynomials, fitted as those of
simd.h were. Where a float64 libdevice function lies behind an operation of Triton's, it is taken as it is.

Two traps: older Triton rounds a literal inside tl.fma to float32, and so do all versions where both branches of tl.where
are literals. Beside a tensor in plain arithmetic a literal has the tensor's type. So tl.fma has literals in float32 only.
It is written out in exp, sigmoid and tanh because whether a * b + c is contracted is a default that differs by version.
Triton 3.6's interpreter, unlike 3.9's, rounds between: there the far tail of sigmoid has 50 ulp, and fmod is not exact.
"""
# mypy: ignore-errors
# What the names mean here, only Triton's compiler knows.

import triton
import triton.language as tl

# f(x) = x + x s P(s) with s = x^2; left over, in half an ulp on [0, 1]: 0.08 (tanh), 0.28 and 1.5 (atan)
_TANH_32 = tl.constexpr((-0.33333296, 0.13332348, -0.05387999, 0.021487199, -0.007946894, 0.0023019298, -0.00035861123))
_ATAN_32 = tl.constexpr((-0.33333153, 0.19993764, -0.14210975, 0.106656946, -0.07551609, 0.0432056, -0.016364673, 0.0029200285))
_ATAN_64 = tl.constexpr((
    -0.33333333333325166, 0.19999999998772652, -0.14285714220597268, 0.11111109343803356, -0.09090880157136663, 0.07691993825691962,
    -0.06664270834403037, 0.05868941031984835, -0.052064287380551896, 0.0457646886145371, -0.03870824078090891, 0.030187065203657274,
    -0.020617430584408687, 0.01166159540718409, -0.005134855178898257, 0.0016269974459423456, -0.0003269217067396236,
    3.10958097282999e-05,
))  # fmt: skip
# exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2)/2, and log((1+s)/(1-s)) = 2s + s z Q(z), z = s^2: SP_P and SP_Q of simd.h
_EXP_32 = tl.constexpr((0.49999997, 0.166665435, 0.0416675061, 0.00836654194, 0.0013864222))
_EXP_64 = tl.constexpr((
    0.50000000000000056, 0.16666666666666605, 0.041666666666573732, 0.0083333333333790258, 0.0013888888932340753, 0.00019841269742901311,
    2.4801504484183776e-05, 2.7557385416115257e-06, 2.7626315619860908e-07, 2.5060983471542381e-08,
))  # fmt: skip
_LOG_32 = tl.constexpr((0.666667759, 0.399775714, 0.298713505))
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _polynomial(x, c: tl.constexpr, n: tl.constexpr):
    """Horner's scheme over n coefficients, from the lowest power up."""
    p = x * c[n - 1] + c[n - 2]
    for k in tl.static_range(3, n + 1):
        p = tl.fma(p, x, tl.full([], c[n - k], x.dtype))
    return p


@triton.jit
def _bits(x):
    return x.to(tl.int64, bitcast=True) if x.dtype == tl.float64 else x.to(tl.int32, bitcast=True)


@triton.jit
def _signed(y, x):
    """y with the sign bit of x put to its own: for y >= 0 or y of x's sign."""
    sign = (_bits(x) & -9223372036854775808) if x.dtype == tl.float64 else (_bits(x) & -2147483648)
    return (sign | _bits(y)).to(x.dtype, bitcast=True)


@triton.jit
def _power_of_two(n):
    """2^n for an integer n as wide as the result; what does not fit an exponent is shifted out."""
    wide: tl.constexpr = n.dtype == tl.int64
    return ((n + 1023) << 52).to(tl.float64, bitcast=True) if wide else ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reduce(x):
    """exp(x) = 2^n (1 + m): n, in the low bits of an integer, and m, for |x| < 1000."""
    # Adding 1.5 * 2^mantissa rounds to a whole number and leaves it in the lowest bits, without a conversion. The first
    # part of ln 2 is short, so that its product with n is exact, fused or not.
    if x.dtype == tl.float64:
        t = x * 1.4426950408889634 + 6755399441055744.0
        n = t.to(tl.int64, bitcast=True)
        t = t - 6755399441055744.0
        r = (x - t * 0.6931471805601177) + t * 1.7239444525614835e-13
        m = r + (r * r) * _polynomial(r, _EXP_64, 10)
    else:
        t = tl.fma(x, 1.44269504, 12582912.0)
        n = t.to(tl.int32, bitcast=True)
        t = t - 12582912.0
        r = tl.fma(t, -1.42860677e-06, tl.fma(t, -0.693145751953125, x))
        m = tl.fma(r * r, _polynomial(r, _EXP_32, 5), r)
    return n, m


@triton.jit
def _atan_unit(x):
    """atan on [0, 1]."""
    s = x * x
    p = _polynomial(s, _ATAN_64, 18) if x.dtype == tl.float64 else _polynomial(s, _ATAN_32, 8)
    return x + (x * s) * p


@triton.jit
def exp(x):
    """In float32 polynomial and two powers of two: tl.exp errs by |x| / 2 ulp, and one factor cannot be denormal."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        x = tl.minimum(tl.maximum(x, -110.0, propagate_nan=_ALL), 90.0, propagate_nan=_ALL)
        n, m = _reduce(x)
        half = n >> 1
        a = _power_of_two(half)
        y = tl.fma(a, m, a) * _power_of_two(n - half)
    return y


@triton.jit
def sigmoid(x):
    """sm_90, float32: 17 instructions, two of them MUFU; 1 / (1 + tl.exp(-x)) has 12 and errs by |x| / 2 ulp below zero."""
    if x.dtype == tl.float64:
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        t = x * -1.44269504
        e = tl.exp2(t)
        # What rounding took from t, to be added as e^lost = 1 + lost. Where e overflows, e * lost must not be NaN.
        lost = tl.fma(t, 1.90465421e-09, tl.fma(t, -0.693147182, -x))
        lost = tl.where(tl.abs(x) < 88.72, lost, 1e-9)
        y = 1.0 / (tl.fma(e, lost, e) + 1.0)
    return y


@triton.jit
def tanh(x):
    """sm_90, float32: 22 instructions, two of them MUFU. The polynomial runs beside the exponential."""
    z = tl.abs(x)
    if x.dtype == tl.float64:
        m = expm1(tl.where(z > 20.0, 20.0, z) * 2.0)
        y = m / (m + 2.0)
    else:
        s = z * z
        near = tl.fma(z * s, _polynomial(s, _TANH_32, 7), z)
        y = tl.fma(1.0 / (tl.exp2(z * 2.88539008) + 1.0), -2.0, 1.0)
        y = tl.where(z < 1.0, near, y)
    return _signed(y, x)


@triton.jit
def expm1(x):
    n, m = _reduce(tl.minimum(tl.maximum(x, -40.0), 40.0))
    s = _power_of_two(n)
    return _signed(tl.where(tl.abs(x) < 40.0, s * m + (s - 1.0), exp(x) - 1.0), x)


@triton.jit
def sinh(x):
    z = tl.abs(x)
    m = expm1(z)
    w = exp(z * 0.5)  # exp(z) overflows before sinh does
    return _signed(tl.where(z < 20.0, (m + m / (m + 1.0)) * 0.5, (w * 0.5) * w), x)


@triton.jit
def cosh(x):
    w = exp(tl.abs(x) * 0.5)
    a = (w * 0.5) * w
    return a + 0.25 / a


@triton.jit
def log(x):
    """In float32 as in simd.h: tl.log may take denormals for zero."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        tiny = x < 1.17549435e-38
        bits = tl.abs(tl.where(tiny, x * 8388608.0, x)).to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2)
        k = (bits >> 23).to(tl.float32)
        k = tl.where(tiny, k - 23.0, k)
        f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        s = f / (f + 2.0)
        h = f * f * 0.5
        z = s * s
        y = k * 0.693145751953125 - ((h - (s * (h + z * _polynomial(z, _LOG_32, 3)) + k * 1.42860677e-06)) - f)
        y = tl.where(x == 0.0, float("-inf"), y)
        y = tl.where(x < 0.0, float("nan"), y)
        y = tl.where(x < float("inf"), y, x)  # inf and NaN are their own logarithms
    return y


@triton.jit
def log1p(x):
    u = x + 1.0
    y = log(u)
    lost = (x - (u - 1.0)) / u
    y = tl.where(tl.abs(lost) < 1.0, y + lost, y)  # not at the pole and at inf, where it is NaN
    return tl.where(x == 0.0, x, y)


@triton.jit
def asinh(x):
    z = tl.abs(x)
    s = z * z
    large = z > 1e18
    y = log1p(tl.where(large, z, z + s / (sqrt(s + 1.0) + 1.0)))
    return _signed(tl.where(large, y + 0.6931471805599453, y), x)


@triton.jit
def acosh(x):
    t = x - 1.0
    large = x > 1e18
    y = log1p(tl.where(large, x, t + sqrt(t * (t + 2.0))))
    y = tl.where(large, y + 0.6931471805599453, y)
    return tl.where(x < 1.0, float("nan"), y)


@triton.jit
def atanh(x):
    z = tl.abs(x)
    return _signed(log1p((z + z) / (1.0 - z)) * 0.5, x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):
    if x.dtype == tl.float64:
        y = 1.0 / tl.sqrt(x)  # rsqrt.approx.f64 promises less
    else:
        tiny = tl.abs(x) < 1.17549435e-38  # flushed to zero otherwise
        y = tl.rsqrt(tl.where(tiny, x * 16777216.0, x))
        y = tl.where(tiny, y * 4096.0, y)
    return y


@triton.jit
def pow(a, b):
    """C's pow. In float64 also for float32: the error of the logarithm is multiplied by the result's."""
    x, p = a.to(tl.float64), b.to(tl.float64)
    z = tl.abs(x)
    logarithm = tl.log(z)
    t = p * logarithm
    y = tl.exp(t)
    if a.dtype == tl.float64:
        lost = tl.fma(p, logarithm, -t)
        y = tl.where((tl.abs(lost) < 1.0) & (y < float("inf")), tl.fma(y, lost, y), y)
    whole = tl.floor(p) == p
    odd = whole & (tl.floor(p * 0.5) != p * 0.5)
    y = tl.where((z == 1.0) & (p == p), 1.0, y)  # log is 0, which times inf is NaN
    y = tl.where(odd, _signed(y, x), y)
    y = tl.where((x < 0.0) & (x > float("-inf")) & (whole == 0), float("nan"), y)
    return tl.where((x == 1.0) | (p == 0.0), 1.0, y).to(a.dtype)


@triton.jit
def sin(x):
    return tl.where(tl.abs(x) < 1e-8, x, tl.sin(x))  # tl.sin may flush a denormal


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def tan(x):
    return sin(x) / tl.cos(x)


@triton.jit
def asin(x):
    return atan2(x, sqrt((1.0 - x) * (1.0 + x)))


@triton.jit
def acos(x):
    return atan2(sqrt((1.0 - x) * (1.0 + x)), x)


@triton.jit
def atan(x):
    z = tl.abs(x)
    steep = z > 1.0
    y = _atan_unit(tl.where(steep, 1.0 / z, z))
    return _signed(tl.where(steep, 1.5707963267948966 - y, y), x)


@triton.jit
def atan2(a, b):
    y, x = tl.abs(a), tl.abs(b)
    low, high = minimum(x, y), maximum(x, y)
    r = tl.where(low == high, 1.0, low / high)  # inf / inf too
    t = _atan_unit(tl.where(high == 0.0, 0.0, r))
    t = tl.where(y > x, 1.5707963267948966 - t, t)
    return _signed(tl.where(_bits(b) < 0, 3.141592653589793 - t, t), a)


@triton.jit
def hypot(a, b):
    x, y = tl.abs(a), tl.abs(b)
    low, high = minimum(x, y), maximum(x, y)
    r = tl.where(low == high, 1.0, low / high)
    h = tl.where(high == 0.0, high, high * sqrt(1.0 + r * r))
    return tl.where((x == float("inf")) | (y == float("inf")), float("inf"), h)


@triton.jit
def erf(x):
    return tl.where(tl.abs(x) < 1e-8, x * 1.1283791670955126, tl.erf(x))  # tl.erf may flush a denormal


@triton.jit
def fmod(a, b):
    """Exact while |a / b| < 2^100: the first quotient leaves 2^-52 of a, the second less than b, or a b too little."""
    z, m = tl.abs(a).to(tl.float64), tl.abs(b).to(tl.float64)
    r = tl.fma(-tl.floor(z / m), m, z)
    r = tl.fma(-tl.floor(r / m), m, r)
    r = tl.where(r < 0.0, r + m, r)
    r = tl.where((m == float("inf")) & (z < m), z, r)
    return _signed(r.to(a.dtype), a)


@triton.jit
def remainder(a, b):
    """fmod moved by b where its sign is the other."""
    m = fmod(a, b)
    return tl.where((m != 0.0) & ((m < 0.0) ^ (b < 0.0)), m + b, m)


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def maximum(a, b):
    """One instruction in float32; in float64 there is none, and tl.maximum becomes three times as many as the comparison."""
    return tl.where((a > b) | (a != a), a, b) if a.dtype == tl.float64 else tl.maximum(a, b, propagate_nan=_ALL)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b) if a.dtype == tl.float64 else tl.minimum(a, b, propagate_nan=_ALL)


@triton.jit
def sign(x):
    """0 for NaN and both zeros, as torch."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def ceil(x):
    return tl.ceil(x)


@triton.jit
def trunc(x):
    return _signed(tl.floor(tl.abs(x)), x)


@triton.jit
def round(x):
    """Halves to even: that is how the addition rounds."""
    z = tl.abs(x)
    whole = tl.full([], 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0, x.dtype)  # from here on all numbers are
    return _signed(tl.where(z < whole, (z + whole) - whole, z), x)


@triton.jit
def to_float32(x):
    return x.to(tl.float32).to(x.dtype)


@triton.jit
def _to_16(x, drop: tl.constexpr):
    """A float without so many of its bits, the rest rounded, halves to even."""
    u = x.to(tl.int32, bitcast=True)
    u = (u + ((1 << (drop - 1)) - 1) + ((u >> drop) & 1)) & -(1 << drop)
    return tl.where(x == x, u.to(tl.float32, bitcast=True), x)


@triton.jit
def to_float16(x):
    """Denormals by an addition whose last bit is theirs."""
    y = x.to(tl.float32)
    z = tl.abs(y)
    r = tl.where(z < 6.103515625e-05, (z + 0.5) - 0.5, _to_16(z, 13))
    r = tl.where(r > 65504.0, float("inf"), r)
    return _signed(r, y).to(x.dtype)


@triton.jit
def to_bfloat16(x):
    return _to_16(x.to(tl.float32), 16).to(x.dtype)


@triton.jit
def lt(a, b):
    return (a < b).to(a.dtype)


@triton.jit
def le(a, b):
    return (a <= b).to(a.dtype)


@triton.jit
def gt(a, b):
    return (a > b).to(a.dtype)


@triton.jit
def ge(a, b):
    return (a >= b).to(a.dtype)


@triton.jit
def eq(a, b):
    return (a == b).to(a.dtype)


@triton.jit
def ne(a, b):
    return (a != b).to(a.dtype)


@triton.jit
def where(c, a, b):
    return tl.where(c != 0.0, a, b)
