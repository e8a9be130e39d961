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
static void gru_narrow(const float *x, const float *u, const float *h0, float *y, float *last, int64_t steps, int64_t d, int64_t c, int64_t count) {
  vf h = {0}, a = {0}, b = {0}, n = {0};
  for (int l = 0; l < count; l++) h[l] = h0[c + l], a[l] = u[c + l], b[l] = u[d + c + l], n[l] = u[2 * d + c + l];
  for (int64_t t = 0; t < steps; t++) {
    const float *row = x + t * 3 * d + c;
    vf p = {0}, q = {0}, s = {0};
    for (int l = 0; l < count; l++) p[l] = row[l], q[l] = row[d + l], s[l] = row[2 * d + l];
    vf z = sp_sigmoid(p + a * h), r = sp_sigmoid(q + b * h), m = sp_tanh(s + n * (r * h));
    h = m + z * (h - m);
    for (int l = 0; l < count; l++) y[t * d + c + l] = h[l];
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
      if (c < d) gru_narrow(xb, u, hb, yb, eb, steps, d, c, d - c);
    }
  }
}

/* A dense GRU, 32 units, 8 inputs, batch 1: rows in vectors, both products and the gates fused, weights in cache.
 * wx [8][96] and wh [32][96] transposed, bx and bh [96], x [steps, 8], y [steps, 32]. */
#define ROWS (96 / W)
void dense_gru(const float *x, const float *wx, const float *wh, const float *bx, const float *bh, const float *h0, float *y, float *last, int64_t steps) {
  float h[32];
  for (int i = 0; i < 32; i++) h[i] = h0[i];
  for (int64_t t = 0; t < steps; t++) {
    vf a[ROWS], b[ROWS];
    SP_UNROLL for (int r = 0; r < ROWS; r++) a[r] = sp_load(bx + r * W), b[r] = sp_load(bh + r * W);
    for (int k = 0; k < 8; k++) SP_UNROLL for (int r = 0; r < ROWS; r++) a[r] += x[t * 8 + k] * sp_load(wx + k * 96 + r * W);
    for (int k = 0; k < 32; k++) SP_UNROLL for (int r = 0; r < ROWS; r++) b[r] += h[k] * sp_load(wh + k * 96 + r * W);
    SP_UNROLL for (int i = 0; i < ROWS / 3; i++) {
      vf r = sp_sigmoid(a[i] + b[i]), z = sp_sigmoid(a[ROWS / 3 + i] + b[ROWS / 3 + i]);
      vf n = sp_tanh(a[2 * ROWS / 3 + i] + r * b[2 * ROWS / 3 + i]);
      sp_store(h + i * W, n + z * (sp_load(h + i * W) - n));
    }
    for (int i = 0; i < 32; i++) y[t * 32 + i] = h[i];
  }
  for (int i = 0; i < 32; i++) last[i] = h[i];
}
