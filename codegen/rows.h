/* Few lanes, each with its numbers side by side in vectors: what kernels do with the arrays of such a step.
 *
 * An array of n numbers has zeros behind them, into which nobody writes, so that the vector that begins at any of the n may be read. */
#define WIDEST 16 /* numbers of a vector at most: weights are packed, and tables filled up, alike for all machines */
#define LANES 4   /* that run together at most, as a weight that was loaded is multiplied for all of them */
#define ROOM(n) (((n) + 2 * WIDEST - 1) / WIDEST * WIDEST)
#define HELD(name, n) real name[ROOM(n)] __attribute__((aligned(64))) = {0}
#define ARRAY(name, n) real name[LANES][ROOM(n)] __attribute__((aligned(64))); __builtin_memset(name, 0, U * sizeof *name)
#define OF(name, i) *name + (i), sizeof *name / sizeof(real) /* from number i on, in every lane */
#define EVERY(n) for (int64_t i = 0; i < (n); i += W)
#define EACH_LANE for (int u = 0; u < U; u++)

INLINE vi first_of(const int64_t n) {
  vi mask;
  for (int l = 0; l < W; l++) mask[l] = l < n ? -1 : 0;
  return mask;
}

/* Numbers i, i + 1, … of the n that begin at p. */
INLINE void place(real* p, const int64_t n, const int64_t i, const vf v) {
  if (i + W <= n) sp_store(p + i, v);
  else if (i < n) sp_store(p + i, sp_select(first_of(n % W), v, sp_load(p + i)));
}

INLINE vf pick(const real* p, const int32_t* at) {
  vf v = {0};
  for (int l = 0; l < W; l++) v[l] = p[at[l]];
  return v;
}

INLINE void put_apart(real* p, const int32_t* at, const int64_t n, const int64_t i, const vf v) {
  for (int l = 0; l < W; l++) if (i + l < n) p[at[i + l]] = v[l];
}

INLINE void copy_row(real* to, const real* from, const int64_t n) {
  for (int64_t i = 0; i + W <= n; i += W) sp_store(to + i, sp_load(from + i));
  if (n % W) __builtin_memcpy(to + n / W * W, from + n / W * W, n % W * sizeof(real));
}

/* Rows of a product that read the same k numbers of b, those at[q] or, without a table, every step-th, for U lanes. w has WIDEST rows of a
 * column side by side. As many sums run together as there are registers for; if they are few, several for each, so that none waits for itself. */
#define SUMS (SP_BYTES == 64 ? 24 : 12)
INLINE void product_of(const int U, const real* w, const real* b, const int64_t b_u, const int32_t* at, const int64_t step, const int64_t k,
                       const int64_t rows, real* to, const int64_t to_u) {
  const int64_t all = (rows + WIDEST - 1) / WIDEST, vectors = all * WIDEST / W;
  const int P = vectors > 4 ? 1 : vectors > 1 ? 2 : 4;
  const int64_t fit = (SUMS / (U * P) < 8 ? SUMS / (U * P) : 8) * W / WIDEST, most = fit < 1 ? 1 : fit;
  const int64_t passes = (all + most - 1) / most, each = (all + passes - 1) / passes;
  const int V = each * WIDEST / W;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t block = pass * each + each > all ? all - each : pass * each;
    const real* const column = w + block * k * WIDEST;
    vf sum[64];
    UNROLL for (int u = 0; u < P * U; u++) UNROLL for (int j = 0; j < V; j++) sum[u * V + j] = sp_set1(0);
    int64_t q = 0;
#define COLUMN(q, p) { \
      vf one[LANES]; \
      UNROLL for (int u = 0; u < U; u++) one[u] = sp_set1(b[u * b_u + (at ? at[q] : (q) * step)]); \
      UNROLL for (int j = 0; j < V; j++) { \
        const vf v = sp_load(column + (j * W / WIDEST * k + (q)) * WIDEST + j * W % WIDEST); \
        UNROLL for (int u = 0; u < U; u++) sum[((p) * U + u) * V + j] += v * one[u]; \
      } \
    }
    for (; q + P <= k; q += P) UNROLL for (int p = 0; p < P; p++) COLUMN(q + p, p)
    for (; q < k; q++) COLUMN(q, 0)
#undef COLUMN
    UNROLL for (int u = 0; u < U; u++) UNROLL for (int j = 0; j < V; j++) {
      UNROLL for (int p = 1; p < P; p++) sum[u * V + j] += sum[(p * U + u) * V + j];
      place(to + u * to_u, rows, block * WIDEST + j * W, sum[u * V + j]);
    }
  }
}

INLINE void product(const int U, const real* w, const real* b, const int64_t b_u, const int32_t* at, const int64_t step, const int64_t k,
                    const int64_t rows, real* to, const int64_t to_u) {
  if (U == 1) product_of(1, w, b, b_u, at, step, k, rows, to, to_u);
  else if (U == 2) product_of(2, w, b, b_u, at, step, k, rows, to, to_u);
  else product_of(LANES, w, b, b_u, at, step, k, rows, to, to_u);
}

/* Where every row reads numbers of its own: column by column in the order of w. */
INLINE void product_apart(const real* w, const real* b, const int32_t* at, const int64_t k, const int64_t rows, real* to) {
  for (int64_t e = 0; e < rows; e += W) {
    vf acc = sp_set1(0);
    for (int64_t q = 0, o = e / WIDEST * k * WIDEST + e % WIDEST; q < k; q++, o += WIDEST) acc += sp_load(w + o) * pick(b, at + o);
    place(to, rows, e, acc);
  }
}

#define FOLD(s) { const vf b = SP_SHUFFLE(a, a, SP_ROW(SP_GO, s, 0)); a = largest ? sp_max(a, b) : a + b; }
INLINE real folded(vf a, const int largest) {
  FOLD(1)
#if SP_BYTES / SP_SIZE > 2
  FOLD(2)
#endif
#if SP_BYTES / SP_SIZE > 4
  FOLD(4)
#endif
#if SP_BYTES / SP_SIZE > 8
  FOLD(8)
#endif
  return a[0];
}
#undef FOLD

/* The sum, or the largest, of n numbers side by side; and of n products. */
INLINE real fold_row(const real* a, const int64_t n, const int largest) {
  vf acc = sp_set1(largest ? -INFINITY : 0);
  for (int64_t i = 0; i < n; i += W) {
    vf v = sp_load(a + i);
    if (i + W > n) v = sp_select(first_of(n % W), v, sp_set1(largest ? -INFINITY : 0));
    acc = largest ? sp_max(acc, v) : acc + v;
  }
  return folded(acc, largest);
}

INLINE real dot_rows(const real* a, const real* b, const int64_t n) {
  vf acc = sp_set1(0);
  for (int64_t i = 0; i < n; i += W) {
    const vf v = sp_load(a + i) * sp_load(b + i);
    acc += i + W > n ? sp_keep(first_of(n % W), v) : v;
  }
  return folded(acc, 0);
}
