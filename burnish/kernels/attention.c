/* Attention of bfloat16 training, forward and backward; `training.py` documents it and has its plain torch twin.
   Arithmetic is in float32 but for the operands of products.

   FlashAttention-2 (arXiv 2307.08691, sections 3.1 and 3.2), with whole rows of scores for BLOCK queries at a time, as
   a processor's cache holds them: nothing of queries x keys is ever stored, and the backward pass computes the scores
   again from the saved log-sum-exp. A product reads its left operand as 32-bit pairs of neighbouring terms at any
   strides, and its right one packed as [pairs of terms][columns], long rows in panels of PANEL columns. */

#include "vectors.h"

#ifdef VECTORS

#define BLOCK 16
#define PANEL (16 * VECTORS)
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* 4 rows x `vectors` * 16 columns of c (+)= a b over `terms` pairs. */
INLINE void tile(const uint32_t *a, big row, big term, const uint32_t *b, big columns, float *c, big width, big terms,
                 int more, const int vectors) {
    floats sum[4][VECTORS];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < vectors; j++)
            sum[i][j] = more ? load_floats(c + i * width + j * 16) : zeros();
    for (big k = 0; k < terms; k++, a += term, b += columns) {
        pairs right[VECTORS];
        for (int j = 0; j < vectors; j++) right[j] = load_pairs(b + j * 16);
        for (int i = 0; i < 4; i++) {
            pairs left = spread_pair(a[i * row]);
            for (int j = 0; j < vectors; j++) sum[i][j] = dot_pairs(sum[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < vectors; j++) store_floats(c + i * width + j * 16, sum[i][j]);
}

/* c (m, n) with row length `width` (+)= a b: m a multiple of 4, n of 16. The pair of row i and term k is
   a[i * row + k * term]; b has `columns` to a row, and its panels start `panel` apart. */
static void product(const uint32_t *a, big row, big term, const uint32_t *b, big columns, big panel, float *c,
                    big width, big m, big n, big terms, int more) {
    for (big j = 0; j < n; j += PANEL)
        for (big i = 0; i < m; i += 4) {
            const uint32_t *left = a + i * row, *right = b + j / PANEL * panel;
            float *out = c + i * width + j;
            big rest = (n - j) / 16;
            if (VECTORS > 3 && rest > 3) tile(left, row, term, right, columns, out, width, terms, more, 4);
            else if (VECTORS > 2 && rest > 2) tile(left, row, term, right, columns, out, width, terms, more, 3);
            else if (VECTORS > 1 && rest > 1) tile(left, row, term, right, columns, out, width, terms, more, 2);
            else tile(left, row, term, right, columns, out, width, terms, more, 1);
        }
}

/* One head's tensor of q, k, v or a gradient: element (batch, token, head, d) at these strides; d is contiguous. */
typedef struct {
    bf16 *at;
    big batch, token, head;
} Rows;

typedef struct {
    big batches, heads, kv_heads, queries, keys, size; /* size: head dimension, a multiple of 32 */
    int causal, threads;
    float scale;
    const uint8_t *mask;         /* (batches, queries, keys), 1: visible; NULL for none */
    const bf16 *cosine, *sine;   /* (batches, tokens, size), queries and keys alike; NULL for no rotation */
} Shape;

INLINE bf16 *head_of(Rows x, big batch, big token, big head) {
    return x.at + batch * x.batch + token * x.token + head * x.head;
}

/* Rotate x (size,) by the angles of one token, or back where `sign` is -1; `out` may be float or bf16. */
#define ROTATED(get, put)                                                                                          \
    for (big d = 0; d < s->size / 2; d += 16) {                                                                    \
        big e = d + s->size / 2;                                                                                   \
        floats first = get(x + d), second = get(x + e);                                                            \
        if (s->cosine) {                                                                                           \
            const bf16 *c = s->cosine + at * s->size, *n = s->sine + at * s->size;                                 \
            floats sd = mul(load(n + d), spread(sign));                                          \
            floats se = mul(load(n + e), spread(sign));                                          \
            floats turned = fnmadd(second, sign > 0 ? sd : se, mul(first, load(c + d)));       \
            second = fmadd(first, sign > 0 ? se : sd, mul(second, load(c + e)));               \
            first = turned;                                                                                        \
        }                                                                                                          \
        put(out + d, first);                                                                                       \
        put(out + e, second);                                                                                      \
    }

/* Rows [0, tokens) of a head as (padded, size), rotated if asked, zero beyond. */
static void gather(const Shape *s, Rows from, big batch, big head, big tokens, big padded, int rotate, bf16 *out) {
    const float sign = 1;
    Shape still = *s;
    if (!rotate) still.cosine = NULL;
    s = &still;
    for (big t = 0; t < tokens; t++, out += s->size) {
        const bf16 *x = head_of(from, batch, t, head);
        big at = batch * tokens + t;
        ROTATED(load, store)
    }
    memset(out, 0, (padded - tokens) * s->size * sizeof(bf16));
}

/* Rows (tokens, size) in float32 to a head's gradient, the rotation undone if asked. */
static void scatter(const Shape *s, const float *x, Rows to, big batch, big head, big start, big tokens, big length,
                    int rotate) {
    const float sign = -1;
    Shape still = *s;
    if (!rotate) still.cosine = NULL;
    s = &still;
    for (big t = start; t < start + tokens; t++, x += s->size) {
        bf16 *out = head_of(to, batch, t, head);
        big at = batch * length + t;
        ROTATED(load_floats, store)
    }
}

/* (rows, size) -> [panel of rows][size / 2][PANEL]: pairs along the row, for products over `size`. */
static void pack_across(const bf16 *x, big rows, big size, uint32_t *out) {
    const uint32_t *pair = (const uint32_t *)x;
    for (big r = 0; r < rows; r++)
        for (big d = 0; d < size / 2; d++) out[(r / PANEL * (size / 2) + d) * PANEL + r % PANEL] = *pair++;
}

/* (rows, size) -> [rows / 2][size]: pairs of rows, for products over the rows. */
static void pack_down(const bf16 *x, big rows, big size, uint32_t *out) {
    for (big r = 0; r < rows; r += 2)
        for (big d = 0; d < size; d++) *out++ = x[r * size + d] | (uint32_t)x[(r + 1) * size + d] << 16;
}

/* Keys that any of the queries [start, start + BLOCK) sees: a bound, rounded up to 16. */
static big reach(const Shape *s, big batch, big start) {
    big end = start + BLOCK < s->queries ? start + BLOCK : s->queries, last = 0;
    if (s->causal) last = end;
    else if (!s->mask) last = s->keys;
    else
        for (big i = start; i < end; i++) {
            const uint8_t *row = s->mask + (batch * s->queries + i) * s->keys;
            big j = s->keys;
            while (j > last && !row[j - 1]) j--;
            last = j;
        }
    return UP(last, 16);
}

/* Which of the keys [j, j + 16) query i sees. */
INLINE mask visible(const Shape *s, big batch, big i, big j) {
    big seen = s->causal ? i + 1 : s->keys;
    if (i >= s->queries || j >= seen) return 0;
    mask most = lanes(seen - j);
    return s->mask ? set_bytes(s->mask + (batch * s->queries + i) * s->keys + j, most) : most;
}

typedef struct {
    char *next;
} Room;

static void *take(Room *room, big bytes) {
    void *found = room->next;
    room->next += UP(bytes, 64);
    return found;
}

static void forward_head(const Shape *s, Rows q, Rows k, Rows v, Rows out, float *lse, big batch, big head, Room room) {
    big size = s->size, queries = UP(s->queries, BLOCK), keys = UP(s->keys, 16);
    big group = s->heads / s->kv_heads, wide = size / 2;
    bf16 *rows = take(&room, (queries > keys ? queries : keys) * size * 2);
    uint32_t *kt = take(&room, UP(keys, PANEL) * size * 2), *vp = take(&room, keys * size * 2);
    float *score = take(&room, BLOCK * keys * 4), *sum = take(&room, BLOCK * size * 4);
    bf16 *weight = take(&room, BLOCK * keys * 2);
    gather(s, k, batch, head / group, s->keys, keys, 1, rows);
    pack_across(rows, keys, size, kt);
    gather(s, v, batch, head / group, s->keys, keys, 0, rows);
    pack_down(rows, keys, size, vp);
    gather(s, q, batch, head, s->queries, queries, 1, rows);
    for (big start = 0; start < s->queries; start += BLOCK) {
        big seen = reach(s, batch, start), count = s->queries - start < BLOCK ? s->queries - start : BLOCK;
        float total[BLOCK];
        product((uint32_t *)rows + start * wide, wide, 1, kt, PANEL, PANEL * wide, score, keys, BLOCK, seen, wide, 0);
        for (big i = 0; i < BLOCK; i++) {
            float *line = score + i * keys;
            const floats low = spread(-INFINITY), scale = spread(s->scale);
            floats most = low, all = zeros();
            for (big j = 0; j < seen; j += 16) {
                floats x = choose(visible(s, batch, start + i, j), mul(load_floats(line + j), scale), low);
                store_floats(line + j, x);
                most = max(most, x);
            }
            float peak = i < count ? largest_of(most) : 0;
            for (big j = 0; j < seen; j += 16) {
                floats x = exponential(sub(load_floats(line + j), spread(peak)));
                store(weight + i * keys + j, x);
                all = add(all, x);
            }
            total[i] = total_of(all);
            if (i < count) lse[(batch * s->heads + head) * s->queries + start + i] = peak + logf(total[i]);
        }
        product((uint32_t *)weight, keys / 2, 1, vp, size, PANEL, sum, size, BLOCK, size, seen / 2, 0);
        for (big i = 0; i < count; i++)
            for (big d = 0; d < size; d += 16)
                store(head_of(out, batch, start + i, head) + d,
                      mul(load_floats(sum + i * size + d), spread(1 / total[i])));
    }
}

static void backward_head(const Shape *s, Rows q, Rows k, Rows v, Rows out, Rows grad, const float *lse, Rows dq,
                          Rows dk, Rows dv, big batch, big kv, Room room) {
    big size = s->size, queries = UP(s->queries, BLOCK), keys = UP(s->keys, 16);
    big group = s->heads / s->kv_heads, wide = size / 2, half = keys / 2;
    bf16 *qs = take(&room, queries * size * 2), *gs = take(&room, queries * size * 2);
    bf16 *rows = take(&room, keys * size * 2), *slope_rows = take(&room, BLOCK * keys * 2);
    uint32_t *kt = take(&room, UP(keys, PANEL) * size * 2), *vt = take(&room, UP(keys, PANEL) * size * 2);
    uint32_t *kp = take(&room, keys * size * 2);
    uint32_t *qp = take(&room, queries * size * 2), *gp = take(&room, queries * size * 2);
    float *key_sum = take(&room, keys * size * 4), *value_sum = take(&room, keys * size * 4);
    float *score = take(&room, BLOCK * keys * 4), *slope = take(&room, BLOCK * keys * 4);
    float *sum = take(&room, BLOCK * size * 4);
    uint32_t *weights = take(&room, BLOCK * keys * 2), *slopes = take(&room, BLOCK * keys * 2);
    gather(s, v, batch, kv, s->keys, keys, 0, rows);
    pack_across(rows, keys, size, vt);
    gather(s, k, batch, kv, s->keys, keys, 1, rows);
    pack_across(rows, keys, size, kt);
    pack_down(rows, keys, size, kp);
    memset(key_sum, 0, keys * size * 4);
    memset(value_sum, 0, keys * size * 4);
    for (big head = kv * group; head < (kv + 1) * group; head++) {
        gather(s, q, batch, head, s->queries, queries, 1, qs);
        gather(s, grad, batch, head, s->queries, queries, 0, gs);
        pack_down(qs, queries, size, qp);
        pack_down(gs, queries, size, gp);
        for (big start = 0; start < s->queries; start += BLOCK) {
            big seen = reach(s, batch, start), count = s->queries - start < BLOCK ? s->queries - start : BLOCK;
            const floats scale = spread(s->scale);
            product((uint32_t *)qs + start * wide, wide, 1, kt, PANEL, PANEL * wide, score, keys, BLOCK, seen, wide, 0);
            product((uint32_t *)gs + start * wide, wide, 1, vt, PANEL, PANEL * wide, slope, keys, BLOCK, seen, wide, 0);
            for (big i = 0; i < BLOCK; i += 2) {
                float level[2] = {0, 0}, mean[2] = {0, 0};
                for (int side = 0; side < 2 && i + side < count; side++) {
                    const bf16 *o = head_of(out, batch, start + i + side, head), *g = gs + (start + i + side) * size;
                    floats dot = zeros();
                    for (big d = 0; d < size; d += 16) dot = fmadd(load(o + d), load(g + d), dot);
                    mean[side] = total_of(dot);
                    level[side] = lse[(batch * s->heads + head) * s->queries + start + i + side];
                }
                for (big j = 0; j < seen; j += 16) {
                    floats p[2], ds[2];
                    for (int side = 0; side < 2; side++) {
                        float *line = score + (i + side) * keys + j;
                        floats x = fmsub(load_floats(line), scale, spread(level[side]));
                        p[side] = choose(visible(s, batch, start + i + side, j), exponential(x), zeros());
                        x = sub(load_floats(slope + (i + side) * keys + j), spread(mean[side]));
                        ds[side] = mul(mul(p[side], scale), x);
                        store(slope_rows + (i + side) * keys + j, ds[side]);
                    }
                    store_pairs(weights + i / 2 * keys + j, p[0], p[1]);
                    store_pairs(slopes + i / 2 * keys + j, ds[0], ds[1]);
                }
            }
            product(weights, 1, keys, gp + start / 2 * size, size, PANEL, value_sum, size, seen, size, BLOCK / 2, 1);
            product(slopes, 1, keys, qp + start / 2 * size, size, PANEL, key_sum, size, seen, size, BLOCK / 2, 1);
            product((uint32_t *)slope_rows, half, 1, kp, size, PANEL, sum, size, BLOCK, size, seen / 2, 0);
            scatter(s, sum, dq, batch, head, start, count, s->queries, 1);
        }
    }
    scatter(s, key_sum, dk, batch, kv, 0, s->keys, s->keys, 1);
    scatter(s, value_sum, dv, batch, kv, 0, s->keys, s->keys, 0);
}

/* Bytes of scratch per thread, the largest of both passes. */
static big scratch(const Shape *s) {
    big queries = UP(s->queries, BLOCK), keys = UP(s->keys, PANEL), longest = queries > keys ? queries : keys;
    return longest * s->size * 32 + BLOCK * (keys * 14 + s->size * 4) + 64 * 32;
}

/* 1 where there is no memory for scratch. */
int attention_forward(const Shape *s, const Rows *t, float *lse) {
    char *room = aligned_alloc(64, UP(scratch(s), 64) * s->threads);
    if (!room) return 1;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int thread = 0; thread < s->threads; thread++)
        for (big item = thread; item < s->batches * s->heads; item += s->threads)
            forward_head(s, t[0], t[1], t[2], t[3], lse, item / s->heads, item % s->heads,
                         (Room){room + thread * UP(scratch(s), 64)});
    free(room);
    return 0;
}

int attention_backward(const Shape *s, const Rows *t, const float *lse) {
    char *room = aligned_alloc(64, UP(scratch(s), 64) * s->threads);
    if (!room) return 1;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int thread = 0; thread < s->threads; thread++)
        for (big item = thread; item < s->batches * s->kv_heads; item += s->threads)
            backward_head(s, t[0], t[1], t[2], t[3], t[4], lse, t[5], t[6], t[7], item / s->kv_heads,
                          item % s->kv_heads, (Room){room + thread * UP(scratch(s), 64)});
    free(room);
    return 0;
}

#endif
