/* Vectors for generated kernels: one hardware register of floats or doubles, and the functions torch has on them.
 *
 * Pasted at the top of a kernel, after a line that defines SP_DOUBLE as 0 (float) or 1 (double). C11 with the vector types
 * of gcc >= 9 and clang >= 11, no intrinsics: both compilers turn a bit select into blend (or ternlog, or bsl), and a loop
 * over lanes that calls floorf or sqrtf into the vector instruction. <immintrin.h> alone would double the compile time.
 * Right under -ffp-contract=fast and without fused multiply-add; wrong under -ffast-math, which forgets NaN and reassociates
 * the rounding trick below. Rounding to nearest is assumed; denormals are kept, in arguments and in results.
 *
 * The inlined functions: error in ulp, the largest distance from the correctly rounded value (float: every argument with
 * 1e-5 < |x| < 110; double: 6 million random ones); "flow", ns per element of a long array; "wait", ns per vector in a chain
 * where each call needs the one before, one multiply-add between them included. AVX2 with fma / SSE2, gcc 12 -O3, AMD EPYC
 * at 2.45 GHz, a core of a shared machine.
 *
 *              float                                  double
 *              ulp      flow         wait             ulp      flow         wait
 *   exp        1 / 1    0.53 / 1.7   14 / 18          1 / 1    1.3 / 3.7    16 / 21
 *   sigmoid    2 / 2    0.59 / 1.9   17 / 21          2 / 2    1.5 / 4.2    20 / 25
 *   tanh       2 / 2    0.65 / 2.0   18 / 22          2 / 2    1.5 / 4.3    21 / 26
 *   log        1 / 1    0.82 / 2.2   22 / 25          1 / 1    2.0 / 5.6    27 / 30
 */
#include <math.h>
#include <stdint.h>

#define SP_FN static inline __attribute__((always_inline, unused))
#define SP_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define SP_BYTES 64
#elif defined(__AVX__)
#define SP_BYTES 32
#else
#define SP_BYTES 16
#endif

/* What differs between the two types: names, the format's numbers, and the coefficients. SP_P is exp(r) = 1 + r + r^2 P(r)
 * on |r| <= 1.0005 ln(2)/2, weighted for the relative error of exp(r) - 1; SP_Q is log((1+s)/(1-s)) = 2s + s z Q(z), z = s^2,
 * on |s| <= 3 - 2 sqrt(2). Both are our own minimax fits (least squares at 160 Chebyshev nodes in 50 digits, reweighted by
 * Lawson's iteration; coefficients rounded from the lowest up, the rest fitted again after each). Left over, in units of
 * half an ulp: 0.23 and 0.014 (float), 0.17 and 0.011 (double). */
#if SP_DOUBLE
#define SP_SIZE 8
typedef double real;
typedef int64_t sp_int;
typedef uint64_t sp_uint;
#define SP_LIBM(name) name
#define SP_MANTISSA 52
#define SP_EXP_MOST 710.0    /* exp of more is inf */
#define SP_EXP_LEAST (-746.0) /* exp of less is 0 */
#define SP_TANH_ONE 19.1     /* tanh of more is 1 */
#define SP_NORMAL 0x1p-1022
#define SP_ROOT_HALF 0x3fe6a09e667f3bcdLL /* the bits of sqrt(1/2) */
#define SP_LN2_HI 0x1.62e42fefa4p-1       /* short, so that n * SP_LN2_HI is exact for every exponent n */
#define SP_LN2_LO -1.7239444525614835e-13
static const double SP_P[10] = {0.50000000000000056, 0.16666666666666605, 0.041666666666573732, 0.0083333333333790258,
                                0.0013888888932340753, 0.00019841269742901311, 2.4801504484183776e-05,
                                2.7557385416115257e-06, 2.7626315619860908e-07, 2.5060983471542381e-08};
static const double SP_Q[7] = {0.66666666666667351, 0.39999999999409858, 0.28571428743495852, 0.22222198454872322,
                               0.18183570732005247, 0.15313879905189726, 0.14797725087632543};
#else
#define SP_SIZE 4
typedef float real;
typedef int32_t sp_int;
typedef uint32_t sp_uint;
#define SP_LIBM(name) name##f
#define SP_MANTISSA 23
#define SP_EXP_MOST 89.0f
#define SP_EXP_LEAST (-104.0f)
#define SP_TANH_ONE 9.02f
#define SP_NORMAL 0x1p-126f
#define SP_ROOT_HALF 0x3f3504f3
#define SP_LN2_HI 0.693145751953125f
#define SP_LN2_LO 1.42860677e-06f
static const float SP_P[5] = {0.49999997f, 0.166665435f, 0.0416675061f, 0.00836654194f, 0.0013864222f};
static const float SP_Q[3] = {0.666667759f, 0.399775714f, 0.298713505f};
#endif

#define W (SP_BYTES / SP_SIZE)
typedef real vf __attribute__((vector_size(SP_BYTES)));
typedef sp_int vi __attribute__((vector_size(SP_BYTES)));
typedef sp_uint sp_vu __attribute__((vector_size(SP_BYTES)));
typedef real vuf __attribute__((vector_size(SP_BYTES), aligned(sizeof(real)), may_alias));

/* ---- Moving data ---- */

SP_FN vf sp_set1(real x) { return x - (vf){0}; } /* not x + 0, which loses the sign of -0 */
SP_FN vf sp_load(const real *p) { return *(const vuf *)p; }
SP_FN void sp_store(real *p, vf x) { *(vuf *)p = x; }

SP_FN vf sp_gather(const real *p, const int64_t *off) {
  vf y = {0};
  for (int l = 0; l < W; l++) y[l] = p[off[l]];
  return y;
}

SP_FN void sp_scatter(real *p, const int64_t *off, vf x) {
  for (int l = 0; l < W; l++) p[off[l]] = x[l];
}

/* The same where the places of a vector's halves, or quarters, are each side by side: the first of each has its offset. */
#define SP_AT(s, e) (e)
#define SP_2(f, s, e) f(s, e), f(s, (e) + 1)
#define SP_4(f, s, e) SP_2(f, s, e), SP_2(f, s, (e) + 2)
#define SP_8(f, s, e) SP_4(f, s, e), SP_4(f, s, (e) + 4)
#define SP_16(f, s, e) SP_8(f, s, e), SP_8(f, s, (e) + 8)
#if SP_BYTES / SP_SIZE == 16
#define SP_HALF(e) SP_8(SP_AT, 0, e)
#define SP_QUARTER(e) SP_4(SP_AT, 0, e)
#elif SP_BYTES / SP_SIZE == 8
#define SP_HALF(e) SP_4(SP_AT, 0, e)
#define SP_QUARTER(e) SP_2(SP_AT, 0, e)
#else
#define SP_HALF(e) SP_2(SP_AT, 0, e)
#endif
#if SP_BYTES / SP_SIZE > 2 && (defined(__clang__) || __GNUC__ >= 12)
typedef real sp_half __attribute__((vector_size(SP_BYTES / 2), aligned(sizeof(real)), may_alias));
SP_FN vf sp_load_halves(const real *p, const int64_t *off) {
  return __builtin_shufflevector(*(const sp_half *)(p + off[0]), *(const sp_half *)(p + off[W / 2]), SP_HALF(0), SP_HALF(W / 2));
}
SP_FN void sp_store_halves(real *p, const int64_t *off, vf x) {
  *(sp_half *)(p + off[0]) = __builtin_shufflevector(x, x, SP_HALF(0));
  *(sp_half *)(p + off[W / 2]) = __builtin_shufflevector(x, x, SP_HALF(W / 2));
}
#else
#define sp_load_halves sp_gather
#define sp_store_halves sp_scatter
#endif
#if SP_BYTES / SP_SIZE > 4 && (defined(__clang__) || __GNUC__ >= 12)
typedef real sp_quarter __attribute__((vector_size(SP_BYTES / 4), aligned(sizeof(real)), may_alias));
#define SP_PAIR(p, a, b) __builtin_shufflevector(*(const sp_quarter *)((p) + (a)), *(const sp_quarter *)((p) + (b)), SP_HALF(0))
SP_FN vf sp_load_quarters(const real *p, const int64_t *off) {
  return __builtin_shufflevector(SP_PAIR(p, off[0], off[W / 4]), SP_PAIR(p, off[W / 2], off[3 * W / 4]), SP_HALF(0), SP_HALF(W / 2));
}
SP_FN void sp_store_quarters(real *p, const int64_t *off, vf x) {
  *(sp_quarter *)(p + off[0]) = __builtin_shufflevector(x, x, SP_QUARTER(0));
  *(sp_quarter *)(p + off[W / 4]) = __builtin_shufflevector(x, x, SP_QUARTER(W / 4));
  *(sp_quarter *)(p + off[W / 2]) = __builtin_shufflevector(x, x, SP_QUARTER(W / 2));
  *(sp_quarter *)(p + off[3 * W / 4]) = __builtin_shufflevector(x, x, SP_QUARTER(3 * W / 4));
}
#else
#define sp_load_quarters sp_gather
#define sp_store_quarters sp_scatter
#endif

/* W x W numbers turned: element e of r[i] becomes element i of r[e]. log2(W) stages, each exchanging bit s of i and e. */
#define SP_STAY(s, e) ((e) & (s) ? W + (e) - (s) : (e))
#define SP_GO(s, e) ((e) & (s) ? W + (e) : (e) + (s))
#if SP_BYTES / SP_SIZE == 2
#define SP_ROW SP_2
#elif SP_BYTES / SP_SIZE == 4
#define SP_ROW SP_4
#elif SP_BYTES / SP_SIZE == 8
#define SP_ROW SP_8
#else
#define SP_ROW SP_16
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define SP_EXCHANGE(s)                                         \
  for (int i = 0; i < W; i++)                                  \
    if (!(i & (s))) {                                          \
      vf a = r[i], b = r[i + (s)];                             \
      r[i] = SP_SHUFFLE(a, b, SP_ROW(SP_STAY, s, 0));          \
      r[i + (s)] = SP_SHUFFLE(a, b, SP_ROW(SP_GO, s, 0));      \
    }
SP_FN void sp_turn(vf *r) {
  SP_UNROLL SP_EXCHANGE(1)
#if SP_BYTES / SP_SIZE > 2
  SP_UNROLL SP_EXCHANGE(2)
#endif
#if SP_BYTES / SP_SIZE > 4
  SP_UNROLL SP_EXCHANGE(4)
#endif
#if SP_BYTES / SP_SIZE > 8
  SP_UNROLL SP_EXCHANGE(8)
#endif
}

/* ---- Bits, selection, comparison ---- */

/* Masks are vi, all ones or all zeros in a lane: what a comparison of vectors gives. */
SP_FN vf sp_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
SP_FN vf sp_keep(vi mask, vf a) { return (vf)(mask & (vi)a); }
SP_FN vi sp_sign_bits(vf x) { return (vi)x & (vi)sp_set1((real)-0.0); }
SP_FN vf sp_abs(vf x) { return (vf)((vi)x & ~(vi)sp_set1((real)-0.0)); }
SP_FN vf sp_neg(vf x) { return -x; }

SP_FN vf sp_where(vf c, vf a, vf b) { return sp_select((vi)(c != sp_set1(0)), a, b); } /* NaN is true, as in torch */
SP_FN vf sp_lt(vf a, vf b) { return sp_keep((vi)(a < b), sp_set1(1)); }
SP_FN vf sp_le(vf a, vf b) { return sp_keep((vi)(a <= b), sp_set1(1)); }
SP_FN vf sp_gt(vf a, vf b) { return sp_keep((vi)(a > b), sp_set1(1)); }
SP_FN vf sp_ge(vf a, vf b) { return sp_keep((vi)(a >= b), sp_set1(1)); }
SP_FN vf sp_eq(vf a, vf b) { return sp_keep((vi)(a == b), sp_set1(1)); }
SP_FN vf sp_ne(vf a, vf b) { return sp_keep((vi)(a != b), sp_set1(1)); }

SP_FN vf sp_sign(vf x) { return sp_gt(x, sp_set1(0)) - sp_lt(x, sp_set1(0)); } /* 0 for NaN and both zeros, as torch */
SP_FN vf sp_max(vf a, vf b) { return sp_select((vi)(a > b) | (vi)(a != a), a, b); } /* a NaN b fails a > b: b is taken */
SP_FN vf sp_min(vf a, vf b) { return sp_select((vi)(a < b) | (vi)(a != a), a, b); }

/* ---- exp and what is made of it ----
 *
 * exp(x) = 2^n exp(r) with n = round(x / ln 2) and r = x - n ln 2, ln 2 in two parts. Adding SP_MAGIC = 1.5 * 2^mantissa
 * rounds to an integer and leaves n in the lowest bits of the sum, whose own exponent and the 1.5 are shifted out when
 * those bits are moved up to become an exponent. All that is done to n runs beside the polynomial and costs no latency.
 * Arguments out of range run through as garbage, and the last instruction, not the first, puts the limit in their place:
 * one blend on the critical path instead of a clamp. */
#define SP_MAGIC ((real)((sp_uint)3 << (SP_MANTISSA - 1)))
#define SP_ONE_BITS ((sp_int)(sizeof(real) == 8 ? 1023 : 127) << SP_MANTISSA)
#define SP_LOG2E ((real)1.4426950408889634)

SP_FN vf sp_exp2_bits(sp_vu n) { return (vf)((vi)(n << SP_MANTISSA) + SP_ONE_BITS); } /* 2^n, n modulo the high bits */

/* (exp(c r) - 1) / c for a power of two c, which scales the coefficients exactly. Estrin's scheme. */
SP_FN vf sp_expm1_core(vf r, real c) {
#define SP_C(k) (SP_P[k] * c * (real)((sp_int)c == 2 ? 1 << (k) : 1))
  vf r2 = r * r, r4 = r2 * r2;
  vf low = r2 * (SP_C(0) + SP_C(1) * r);
#if SP_DOUBLE
  vf p = (SP_C(2) + SP_C(3) * r) + r2 * (SP_C(4) + SP_C(5) * r);
  vf q = (SP_C(6) + SP_C(7) * r) + r2 * (SP_C(8) + SP_C(9) * r);
  vf high = p + r4 * q;
#else
  vf high = (SP_C(2) + SP_C(3) * r) + r2 * SP_C(4);
#endif
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
  return (r + low) + r4 * high; /* an addition less in the chain, for one more rounding, which tanh can afford only here */
#else
  return r + (low + r4 * high);
#endif
#undef SP_C
}

/* 2^n is applied in two halves: one factor of 2^n would overflow before the result does, and could not be denormal. */
SP_FN vf sp_exp(vf x) {
  vf t = x * SP_LOG2E + SP_MAGIC, n = t - SP_MAGIC;
  vf m = sp_expm1_core(x - n * SP_LN2_HI - n * SP_LN2_LO, 1);
  sp_vu half = (sp_vu)t >> 1;
  vf a = sp_exp2_bits(half), b = sp_exp2_bits((sp_vu)t - half);
  vf y = (a + a * m) * b;
  y = sp_select((vi)(x > SP_EXP_MOST), sp_set1(INFINITY), y);
  return sp_select((vi)(x < SP_EXP_LEAST), sp_set1(0), y);
}

/* 1 / (1 + exp(-x)) = a / (a + b exp(-r)) with a = 2^(n/2), b = a / 2^n. Nothing overflows, so a tiny result is as exact as
 * any other, and the division rounds straight to a denormal. */
SP_FN vf sp_sigmoid(vf x) {
  vf t = x * SP_LOG2E + SP_MAGIC, n = t - SP_MAGIC;
  vf m = sp_expm1_core(n * SP_LN2_HI - x + n * SP_LN2_LO, 1);
  sp_vu half = (sp_vu)t >> 1;
  vf a = sp_exp2_bits(half), b = sp_exp2_bits(half - (sp_vu)t);
  vf y = a / ((a + b) + b * m);
  y = sp_select((vi)(x > -SP_EXP_LEAST), sp_set1(1), y);
  return sp_select((vi)(x < SP_EXP_LEAST), sp_set1(0), y);
}

/* (1 - e) / (1 + e) with e = exp(-2|x|) = s (1 + 2m), the division being the only one. The numerator is (1 - s) - 2sm: near
 * zero s = 1, nothing cancels, and the relative error stays small without a second branch. The minus matters: from
 * exp(2|x|), m is a little more than x and may have a coarser last bit than the result. */
SP_FN vf sp_tanh(vf x) {
  vf z = sp_abs(x);
  vf t = SP_MAGIC - z * (2 * SP_LOG2E), n = t - SP_MAGIC;
  vf m = sp_expm1_core(-z - n * (SP_LN2_HI / 2) - n * (SP_LN2_LO / 2), 2);
  vf s = sp_exp2_bits((sp_vu)t), s2 = s + s;
  vf y = ((1 - s) - s2 * m) / ((1 + s) + s2 * m);
  y = sp_select((vi)(z > SP_TANH_ONE), sp_set1(1), y);
  return (vf)((vi)y | sp_sign_bits(x));
}

/* x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) = f - (h - s (h + z Q(z))) with s = f / (2 + f),
 * z = s^2, h = f^2 / 2: the form of fdlibm's e_log.c, which keeps f, the largest part, out of every rounding but the last. */
SP_FN vf sp_log(vf x) {
  vi tiny = (vi)(x < SP_NORMAL);
  vf y = sp_select(tiny, x * (real)((sp_int)1 << SP_MANTISSA), x);
  vi bits = (vi)y + (SP_ONE_BITS - (sp_int)SP_ROOT_HALF);
  /* k + bias lies in the high bits; as the low bits of 2^mantissa it becomes a real without a conversion. */
  vf k = (vf)((vi)((sp_vu)bits >> SP_MANTISSA) | ((vi){0} + (SP_ONE_BITS + ((sp_int)SP_MANTISSA << SP_MANTISSA))));
  k -= (real)((sp_int)1 << SP_MANTISSA) + (real)(SP_ONE_BITS >> SP_MANTISSA);
  k -= sp_keep(tiny, sp_set1(SP_MANTISSA));
  vf f = (vf)((bits & (((sp_int)1 << SP_MANTISSA) - 1)) + (sp_int)SP_ROOT_HALF) - 1;
  vf s = f / (f + 2), h = f * f * (real)0.5, z = s * s;
#if SP_DOUBLE
  vf z2 = z * z;
  vf q = (SP_Q[0] + SP_Q[1] * z) + z2 * ((SP_Q[2] + SP_Q[3] * z) + z2 * ((SP_Q[4] + SP_Q[5] * z) + z2 * SP_Q[6]));
#else
  vf q = SP_Q[0] + z * (SP_Q[1] + z * SP_Q[2]);
#endif
  y = k * SP_LN2_HI - ((h - (s * (h + z * q) + k * SP_LN2_LO)) - f);
  y = sp_select((vi)(x == 0), sp_set1(-INFINITY), y);
  y = sp_select((vi)(x < 0), sp_set1(NAN), y);
  return sp_select((vi)(x < INFINITY), y, x); /* inf and NaN are their own logarithms */
}

/* ---- Lane by lane ---- */

/* The first five become one instruction each (at -O3, where the target has it); the others are calls to libm. */
#define SP_EACH(name, f)                                 \
  SP_FN vf sp_##name(vf x) {                             \
    for (int l = 0; l < W; l++) x[l] = SP_LIBM(f)(x[l]); \
    return x;                                            \
  }
SP_EACH(sqrt, sqrt)
SP_EACH(floor, floor)
SP_EACH(ceil, ceil)
SP_EACH(trunc, trunc)
SP_EACH(round, rint) /* halves to even */
SP_EACH(expm1, expm1)
SP_EACH(log1p, log1p)
SP_EACH(erf, erf)
SP_EACH(sin, sin)
SP_EACH(cos, cos)
SP_EACH(tan, tan)
SP_EACH(asin, asin)
SP_EACH(acos, acos)
SP_EACH(atan, atan)
SP_EACH(sinh, sinh)
SP_EACH(cosh, cosh)
SP_EACH(asinh, asinh)
SP_EACH(acosh, acosh)
SP_EACH(atanh, atanh)

#define SP_EACH2(name, f)                                      \
  SP_FN vf sp_##name(vf a, vf b) {                             \
    for (int l = 0; l < W; l++) a[l] = SP_LIBM(f)(a[l], b[l]); \
    return a;                                                  \
  }
SP_EACH2(pow, pow)
SP_EACH2(fmod, fmod)
SP_EACH2(atan2, atan2)

SP_FN vf sp_rsqrt(vf x) { return 1 / sp_sqrt(x); }

/* The larger of both times what the ratio adds, so that no square overflows; an infinity counts whatever is beside it. */
SP_FN vf sp_hypot(vf a, vf b) {
  vf x = sp_abs(a), y = sp_abs(b), high = sp_max(x, y), low = sp_min(x, y);
  vf r = sp_select((vi)(low == high), sp_set1(1), low / high);
  vf h = high * sp_sqrt(1 + r * r);
  return sp_select((vi)(high == 0) , high, sp_select((vi)(x == sp_set1(INFINITY)) | (vi)(y == sp_set1(INFINITY)), sp_set1(INFINITY), h));
}

/* The remainder that has the sign of b: fmod's, moved by b where its sign is the other and it is not zero (torch's rule). */
SP_FN vf sp_remainder(vf a, vf b) {
  vf m = sp_fmod(a, b);
  return sp_select((vi)(m != 0) & ((vi)(m < 0) ^ (vi)(b < 0)), m + b, m);
}

/* To the nearest number of a narrower type, halves to even, by way of float. Bits that are dropped carry into those that stay, and into the
 * exponent; what half has as a denormal is rounded by an addition whose last bit is that of the denormals. */
SP_FN float sp_round16(float x, int brain) {
  union { float f; uint32_t u; } v = {x};
  uint32_t sign = v.u & 0x80000000u, size = v.u ^ sign;
  if (size > 0x7f800000u) return x;
  if (!brain && size < 0x38800000u) {
    v.u = size;
    v.f = (v.f + 0.5f) - 0.5f;
  } else {
    int drop = brain ? 16 : 13;
    v.u = (size + ((1u << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop << drop;
    if (!brain && v.u > 0x477fe000u) v.u = 0x7f800000u;
  }
  v.u |= sign;
  return v.f;
}
SP_FN vf sp_to_float32(vf x) {
  for (int l = 0; l < W; l++) x[l] = (real)(float)x[l];
  return x;
}
SP_FN vf sp_to_float16(vf x) {
  for (int l = 0; l < W; l++) x[l] = (real)sp_round16((float)x[l], 0);
  return x;
}
SP_FN vf sp_to_bfloat16(vf x) {
  for (int l = 0; l < W; l++) x[l] = (real)sp_round16((float)x[l], 1);
  return x;
}
/* ---- End of the vector header ---- */
