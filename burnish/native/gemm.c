/* Products of many tokens with stored weights on a CPU, in float32.
 *
 * out (tokens, rows) = x (tokens, columns) W^T + bias. A thread works on a unit of rows, DEPTH columns at a time: it expands
 * these weights into its second cache, where they meet every panel of tokens, whose part of x fits its first. Weights are
 * thus expanded once for MOST_AT_ONCE tokens, and never as a whole. A tile of some rows by a panel's tokens is summed in
 * registers: vectors are of neighbouring tokens, weights are broadcast. Every sum runs over the columns in their order, so
 * that it depends neither on the number of threads nor on the other tokens.
 */

#include "fp8.h"
#include "grouped.h"

#define MOST_AT_ONCE 320 /* tokens */
#if VECTOR == 64
#define PANEL 4 /* vectors of tokens; 24 sums and what they need fit 32 registers */
#define DEPTH 128
#define MOST_UNIT 384
#else
#define PANEL 2
#define DEPTH 256 /* so that a unit's weights and sums fit a second cache of 256 KiB */
#define MOST_UNIT 96
#endif
#define ROWS 6
#define MOST_ROWS 12 /* of a tile of few tokens */
#define SQUARE 16 /* transposed at once */

/* What a product works on: x in panels, each (columns, its tokens), and the tokens at once. */
typedef struct {
    enum kind kind;
    const matrix *w;
    const void *bias;
    char *out; /* of the first token at once */
    int half;  /* dtype of bias and out */
    const float *x;
    int64_t tokens, padded; /* to whole vectors */
    int64_t unit;
} task;

/* 64 weights of four bits in groups. */
INLINE chunk expand_of_group(const matrix *w, int64_t row, int64_t first) {
    const int64_t size = (int64_t)w->levels[16], groups = (w->columns + size - 1) / size;
    float scales[2], shifts[2];
    for (int i = 0; i < 2; i++) {
        const int64_t at = row * groups + (first + i * GROUP_UNIT) / size;
        scales[i] = from_half(((const uint16_t *)w->constants)[at]);
        shifts[i] = w->codes ? scales[i] * (8.0f - w->codes[at]) : 0;
    }
    chunk c = expand_grouped(w->levels, w->bytes + (row * w->columns + first) / 2, scales);
    EVERY(i, PARTS) c.part[i] += shifts[i % (PARTS / 2) >= PARTS / 4];
    return c;
}

/* `count` weights of a row from the `first`-th on; int8 and FP8 without their scale, nibbles of 64 the even positions first. */
static void expand_row(enum kind kind, const matrix *w, int64_t row, int64_t first, int64_t count, float *out) {
    const int64_t at = row * w->columns + first;
    if (kind == NF4) {
        float scales[DEPTH / BLOCK];
        expand_constants(w, at / BLOCK, count / BLOCK, scales);
        for (int64_t b = 0; b < count / BLOCK; b++) {
            const chunk c = expand_nf4(w->levels, w->bytes + at / 2 + b * (BLOCK / 2), scales[b]);
            memcpy(out + b * BLOCK, &c, sizeof c);
        }
    } else if (kind == GROUPED) {
        for (int64_t i = 0; i < count; i += BLOCK) {
            const chunk c = expand_of_group(w, row, first + i);
            memcpy(out + i, &c, sizeof c);
        }
    } else if (in_groups(kind)) {
        for (int64_t i = 0; i < count; i += BLOCK) weights_of_codes(kind, w, row, first + i, out + i);
    } else if (kind == INT8) {
        const int8_t *from = (const int8_t *)w->bytes + at;
        for (int64_t i = 0; i < count; i++) out[i] = from[i];
    } else if (kind == FP8) {
        expand_fp8_row(w->bytes + at, count, out);
    } else if (kind == DENSE) {
        const uint16_t *from = (const uint16_t *)w->bytes + at;
        for (int64_t i = 0; i < count; i++) out[i] = widen(from[i]);
    } else if (kind == FLOATS) {
        memcpy(out, w->bytes + 4 * at, 4 * count);
    } else {
        const uint8_t *from = w->bytes + row * stored(kind, w->columns);
        for (int64_t i = 0; i < count / 32; i++) expand_32(kind, from, first / 32 + i, (lanes *)(out + 32 * i));
    }
}

/* sums (height, width vectors), `apart` floats from row to row, += w (height, depth) x (depth, width vectors). */
INLINE void tile(int height, int width, const float *w, const float *x, int64_t depth, float *sums, int64_t apart) {
    lanes held[MOST_ROWS][PANEL];
    EVERY(r, height) EVERY(t, width) memcpy(&held[r][t], sums + r * apart + t * LANES, VECTOR);
    for (int64_t k = 0; k < depth; k++) {
        lanes tokens[PANEL];
        EVERY(t, width) memcpy(&tokens[t], x + (k * width + t) * LANES, VECTOR);
        EVERY(r, height) {
            const lanes weight = w[r * DEPTH + k] - (lanes){0};
            EVERY(t, width) held[r][t] = multiply_add(weight, tokens[t], held[r][t]);
        }
    }
    EVERY(r, height) EVERY(t, width) memcpy(sums + r * apart + t * LANES, &held[r][t], VECTOR);
}

#define TILE(NAME, HEIGHT_, WIDTH_) \
    static void NAME(const float *w, const float *x, int64_t depth, float *sums, int64_t apart) { \
        tile(HEIGHT_, WIDTH_, w, x, depth, sums, apart); \
    }
typedef void work(const float *, const float *, int64_t, float *, int64_t);
TILE(of_one, MOST_ROWS, 1)
#if PANEL == 4
TILE(of_two, MOST_ROWS, 2)
TILE(of_three, ROWS, 3)
TILE(of_four, ROWS, 4)
static work *const TILES[] = {of_one, of_two, of_three, of_four};
static const int TILE_ROWS[] = {MOST_ROWS, MOST_ROWS, ROWS, ROWS};
#else
TILE(of_two, ROWS, 2)
static work *const TILES[] = {of_one, of_two};
static const int TILE_ROWS[] = {MOST_ROWS, ROWS};
#endif

/* The panels of `count` tokens of x, of bfloat16 where half, dealt out to a team by columns; zeros beyond the tokens. */
static void pack(const void *x, int half, int split, int64_t columns, int64_t count, int64_t padded, float *to) {
#pragma omp for schedule(static)
    for (int64_t k0 = 0; k0 < columns; k0 += SQUARE)
        for (int64_t t0 = 0; t0 < padded; t0 += LANES) {
            const int64_t panel = t0 / (PANEL * LANES) * (PANEL * LANES), wide = min(PANEL * LANES, padded - panel);
            float *const square = to + panel * columns + t0 - panel;
            for (int64_t k = k0; k < min(k0 + SQUARE, columns); k++) {
                const int64_t in = k % BLOCK, from = split ? k - in + 2 * (in & 31) + (in >> 5) : k;
                for (int64_t t = 0; t < LANES; t++) {
                    const int64_t at = (t0 + t) * columns + from;
                    float value = 0;
                    if (t0 + t < count) value = half ? widen(((const uint16_t *)x)[at]) : ((const float *)x)[at];
                    square[k * wide + t] = value;
                }
            }
        }
}

/* sums (rows, padded), scaled and shifted, into the output from its row `first`. */
static void give(const task *p, const float *sums, int64_t first, int64_t rows) {
    for (int64_t r0 = 0; r0 < rows; r0 += SQUARE)
        for (int64_t t0 = 0; t0 < p->tokens; t0 += SQUARE) {
            const int64_t height = min(SQUARE, rows - r0), width = min(SQUARE, p->tokens - t0);
            float square[SQUARE][SQUARE];
            for (int64_t r = 0; r < height; r++) {
                const int64_t row = first + r0 + r;
                const float scale = scale_of_row(p->kind, p->w, row);
                float bias = 0;
                if (p->bias) bias = p->half ? widen(((const uint16_t *)p->bias)[row]) : ((const float *)p->bias)[row];
                for (int64_t t = 0; t < width; t++) square[t][r] = sums[(r0 + r) * p->padded + t0 + t] * scale + bias;
            }
            for (int64_t t = 0; t < width; t++) {
                const int64_t at = (t0 + t) * p->w->rows + first + r0;
                if (p->half)
                    for (int64_t r = 0; r < height; r++) ((uint16_t *)p->out)[at + r] = narrow(square[t][r]);
                else
                    memcpy((float *)p->out + at, square[t], 4 * height);
            }
        }
}

/* A unit of rows; `weights` (MOST_UNIT, DEPTH) and `sums` (MOST_UNIT, padded) are the thread's room. */
static void rows_of(const task *p, int64_t first, float *weights, float *sums) {
    const int64_t columns = p->w->columns, rows = min(p->unit, p->w->rows - first);
    const int64_t size = stored(p->kind, columns), ahead = stored(p->kind, DEPTH);
    memset(sums, 0, 4 * MOST_UNIT * p->padded);
    for (int64_t k = 0; k < columns; k += DEPTH) {
        const int64_t depth = min(DEPTH, columns - k);
        for (int64_t r = 0; r < rows; r++) expand_row(p->kind, p->w, first + r, k, depth, weights + r * DEPTH);
        for (int64_t panel = 0; panel < p->padded; panel += PANEL * LANES) {
            const int width = (int)(min(PANEL * LANES, p->padded - panel) / LANES);
            const float *x = p->x + panel * columns + k * width * LANES;
            const int height = TILE_ROWS[width - 1];
            for (int64_t r = 0; r < rows; r += height) {
                for (int64_t i = r; !panel && k + DEPTH < columns && i < min(r + height, rows); i++) /* what comes next */
                    for (int64_t at = 0; at < ahead; at += 64)
                        __builtin_prefetch(p->w->bytes + (first + i) * size + stored(p->kind, k) + ahead + at, 0, 2);
                TILES[width - 1](weights + r * DEPTH, x, depth, sums + r * p->padded + panel, p->padded);
            }
        }
    }
    give(p, sums, first, rows);
}

/* Room that stays for the next product: memory fresh from the system costs as much as a tenth of a product. */
static float *kept;

static float *take_room(int64_t size) {
    float *room = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQ_REL);
    if (room && ((int64_t *)room)[0] >= size) return room;
    free(room);
    room = aligned_alloc(64, 64 + size);
    if (room) ((int64_t *)room)[0] = size;
    return room;
}

/* As `matmul`, by a team of its own. Returns 1 where memory is short, else 0. */
int multiply_many(enum kind kind, const matrix *w, const void *x, int half, int64_t tokens, const void *bias, void *out,
                  int64_t threads) {
    const int64_t rounds = (tokens + MOST_AT_ONCE - 1) / MOST_AT_ONCE;
    const int64_t most = ((tokens + rounds - 1) / rounds + LANES - 1) / LANES * LANES, size = half ? 2 : 4;
    const int64_t shares = threads * ((w->rows + threads * MOST_UNIT - 1) / (threads * MOST_UNIT));
    const int64_t unit = ((w->rows + shares - 1) / shares + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
    const int64_t each = MOST_UNIT * (DEPTH + most);
    float *taken = take_room(4 * (w->columns * most + threads * each)), *room = taken + 64 / 4;
    if (!taken) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t count = min(most, tokens - first), padded = (count + LANES - 1) / LANES * LANES;
        const char *from = (const char *)x + first * w->columns * size;
        const task p = {kind, w, bias, (char *)out + first * w->rows * size, half, room, count, padded, unit};
        float *own = room + w->columns * most + THREAD * each;
        pack(from, half, kind == NF4 || kind == GROUPED, w->columns, count, padded, room);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < w->rows; row += unit) rows_of(&p, row, own, own + MOST_UNIT * DEPTH);
    }
    free(__atomic_exchange_n(&kept, taken, __ATOMIC_ACQ_REL));
    return 0;
}
