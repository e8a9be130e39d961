/* Hand-written sequential loops, the strongest simple alternative on a CPU: everything fused, vectors over what is independent,
 * several vectors in flight to hide the latency of a step, threads over what is left. Compiled after codegen/simd.h, so that both
 * sides use the same exp and tanh. */

/* One step of an elementwise GRU for U vectors of channels. */
static inline __attribute__((always_inline)) void gru_tile(
    const float *x, const float *u, const float *h0, float *y, float *last, int64_t steps, int64_t d, int64_t c, const int U) {
  vf h[4], a[4], b[4], n[4];
  for (int i = 0; i < U; i++) {
    h[i] = sp_load(h0 + c + i * W), a[i] = sp_load(u + c + i * W);
    b[i] = sp_load(u + d + c + i * W), n[i] = sp_load(u + 2 * d + c + i * W);
  }
  for (int64_t t = 0; t < steps; t++) {
    const float *row = x + t * 3 * d + c;
    SP_UNROLL for (int i = 0; i < U; i++) {
      vf z = sp_sigmoid(sp_load(row + i * W) + a[i] * h[i]), r = sp_sigmoid(sp_load(row + d + i * W) + b[i] * h[i]);
      vf m = sp_tanh(sp_load(row + 2 * d + i * W) + n[i] * (r * h[i]));
      h[i] = m + z * (h[i] - m);
      sp_store(y + t * d + c + i * W, h[i]);
    }
  }
  for (int i = 0; i < U; i++) sp_store(last + c + i * W, h[i]);
}

/* Fewer channels than a vector has lanes: one vector, loaded and stored number by number. */
static inline __attribute__((always_inline)) void gru_narrow(
  const float *x, const float *u, const float *h0, float *y, float *last, int64_t steps, int64_t d, int64_t c, const int count) {
  vf h = {0}, a = {0}, b = {0}, n = {0};
  for (int l = 0; l < count; l++) h[l] = h0[c + l], a[l] = u[c + l], b[l] = u[d + c + l], n[l] = u[2 * d + c + l];
  for (int64_t t = 0; t < steps; t++) {
    const float *row = x + t * 3 * d + c;
    vf p = {0}, q = {0}, s = {0};
    SP_UNROLL for (int l = 0; l < count; l++) p[l] = row[l], q[l] = row[d + l], s[l] = row[2 * d + l];
    vf z = sp_sigmoid(p + a * h), r = sp_sigmoid(q + b * h), m = sp_tanh(s + n * (r * h));
    h = m + z * (h - m);
    SP_UNROLL for (int l = 0; l < count; l++) y[t * d + c + l] = h[l];
  }
  for (int l = 0; l < count; l++) last[c + l] = h[l];
}

/* x [batch, steps, 3 d], u [3, d], h0 and last [batch, d], y [batch, steps, d], all contiguous. */
void elementwise_gru(const float *x, const float *u, const float *h0, float *y, float *last, int64_t batch, int64_t steps, int64_t d, int threads) {
  const int64_t vectors = d / W;
  int64_t U = 4;
  while (U > 1 && vectors * batch / U < threads) U /= 2; /* rather all threads than long tiles */
  const int64_t tiles = vectors / U, rest = d - tiles * U * W, pieces = tiles + (rest > 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (pieces * batch > 1 && threads > 1)
  for (int64_t p = 0; p < pieces * batch; p++) {
    const int64_t b = p / pieces, k = p % pieces;
    const float *xb = x + b * steps * 3 * d, *hb = h0 + b * d;
    float *yb = y + b * steps * d, *eb = last + b * d;
    if (k < tiles) {
      if (U == 4) gru_tile(xb, u, hb, yb, eb, steps, d, k * 4 * W, 4);
      else if (U == 2) gru_tile(xb, u, hb, yb, eb, steps, d, k * 2 * W, 2);
      else gru_tile(xb, u, hb, yb, eb, steps, d, k * W, 1);
    } else {
      int64_t c = tiles * U * W;
      for (; c + W <= d; c += W) gru_tile(xb, u, hb, yb, eb, steps, d, c, 1);
      if (d - c == 1) gru_narrow(xb, u, hb, yb, eb, steps, d, c, 1);
      else if (d - c == 8) gru_narrow(xb, u, hb, yb, eb, steps, d, c, 8);
      else if (c < d) gru_narrow(xb, u, hb, yb, eb, steps, d, c, d - c);
    }
  }
}

/* Dense cells, compiled for one number of INPUTS and UNITS each. Weights are transposed: rows of what is read, G * UNITS wide. A tile is
 * TILE vectors of units; S samples read a weight together, and where there are fewer, partial sums hide what a multiply-add waits. */
#ifdef UNITS
#define TILE (UNITS % (2 * W) == 0 ? 2 : 1)
typedef struct { vf of[4][TILE]; } sums;

/* bias + v w for S samples and the vectors of a tile at j. v lies `apart` from one sample to the next, `wide` numbers are in a row of w. */
static inline __attribute__((always_inline)) sums product(
    const float *v, int64_t apart, int count, const float *w, const float *bias, int64_t wide, int64_t j, const int S) {
  const int P = 4 / S; /* partial sums of a sample */
  vf part[4][TILE];
  SP_UNROLL for (int i = 0; i < 4; i++) SP_UNROLL for (int u = 0; u < TILE; u++) part[i][u] = i % P ? (vf){0} : sp_load(bias + j + u * W);
  for (int k = 0; k < count; k += P)
    SP_UNROLL for (int p = 0; p < P; p++) SP_UNROLL for (int u = 0; u < TILE; u++) {
      vf c = sp_load(w + (k + p) * wide + j + u * W);
      SP_UNROLL for (int s = 0; s < S; s++) part[s * P + p][u] += v[s * apart + k + p] * c;
    }
  sums total;
  SP_UNROLL for (int s = 0; s < S; s++) SP_UNROLL for (int u = 0; u < TILE; u++) {
    total.of[s][u] = part[s * P][u];
    SP_UNROLL for (int p = 1; p < P; p++) total.of[s][u] += part[s * P + p][u];
  }
  return total;
}

/* What a cell makes of the sums of its gates (of x and of h) for one vector of units; c is the second half of an LSTM's state. */
static inline vf rnn_gates(const vf *a, const vf *b, vf h, float *c) { return sp_tanh(a[0] + b[0]); }
static inline vf gru_gates(const vf *a, const vf *b, vf h, float *c) {
  vf r = sp_sigmoid(a[0] + b[0]), z = sp_sigmoid(a[1] + b[1]), n = sp_tanh(a[2] + r * b[2]);
  return n + z * (h - n);
}
static inline vf lstm_gates(const vf *a, const vf *b, vf h, float *c) {
  vf i = sp_sigmoid(a[0] + b[0]), f = sp_sigmoid(a[1] + b[1]), g = sp_tanh(a[2] + b[2]), o = sp_sigmoid(a[3] + b[3]);
  vf next = f * sp_load(c) + i * g;
  sp_store(c, next);
  return o * sp_tanh(next);
}

/* x [batch, steps, INPUTS], wx [INPUTS, G UNITS], wh [UNITS, G UNITS], bx and bh [G UNITS], y [batch, steps, UNITS], from zeros. */
#define DENSE(name, G)                                                                                                                  \
  static inline __attribute__((always_inline)) void name##_samples(                                                                     \
      const float *x, const float *wx, const float *wh, const float *bx, const float *bh, float *y, int64_t steps, const int S) {       \
    float now[4][UNITS] = {{0}}, next[4][UNITS], c[4][UNITS] = {{0}};                                                                   \
    for (int64_t t = 0; t < steps; t++) {                                                                                               \
      for (int64_t j = 0; j < UNITS; j += TILE * W) {                                                                                   \
        sums a[G], b[G];                                                                                                                \
        SP_UNROLL for (int g = 0; g < G; g++) {                                                                                         \
          a[g] = product(x + t * INPUTS, steps * INPUTS, INPUTS, wx, bx, G * UNITS, g * UNITS + j, S);                                  \
          b[g] = product(now[0], UNITS, UNITS, wh, bh, G * UNITS, g * UNITS + j, S);                                                    \
        }                                                                                                                               \
        SP_UNROLL for (int s = 0; s < S; s++) SP_UNROLL for (int u = 0; u < TILE; u++) {                                                \
          vf p[G], q[G];                                                                                                                \
          SP_UNROLL for (int g = 0; g < G; g++) p[g] = a[g].of[s][u], q[g] = b[g].of[s][u];                                             \
          sp_store(next[s] + j + u * W, name##_gates(p, q, sp_load(now[s] + j + u * W), c[s] + j + u * W));                             \
        }                                                                                                                               \
      }                                                                                                                                 \
      for (int s = 0; s < S; s++) {                                                                                                     \
        __builtin_memcpy(now[s], next[s], sizeof now[s]);                                                                               \
        __builtin_memcpy(y + (s * steps + t) * UNITS, next[s], sizeof now[s]);                                                          \
      }                                                                                                                                 \
    }                                                                                                                                   \
  }                                                                                                                                     \
  void dense_##name(                                                                                                                    \
      const float *x, const float *wx, const float *wh, const float *bx, const float *bh, float *y, int64_t batch, int64_t steps,       \
      int threads) {                                                                                                                    \
    int64_t S = 4;                                                                                                                      \
    while (S > 1 && (batch % S || batch / S < threads)) S /= 2; /* rather all threads than samples together */                          \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (batch > S && threads > 1)")                                     \
    for (int64_t b = 0; b < batch; b += S) {                                                                                            \
      const float *xb = x + b * steps * INPUTS;                                                                                         \
      float *yb = y + b * steps * UNITS;                                                                                                \
      if (S == 4) name##_samples(xb, wx, wh, bx, bh, yb, steps, 4);                                                                     \
      else if (S == 2) name##_samples(xb, wx, wh, bx, bh, yb, steps, 2);                                                                \
      else name##_samples(xb, wx, wh, bx, bh, yb, steps, 1);                                                                            \
    }                                                                                                                                   \
  }
DENSE(rnn, 1)
DENSE(gru, 3)
DENSE(lstm, 4)
#endif
