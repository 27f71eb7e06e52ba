/* Products of few tokens with stored weights on a CPU, for the threads of one team.
 *
 * out (tokens, rows) = x (tokens, columns) W^T + bias, for W stored as NF4 blocks of 64, few bits in groups, int8 or FP8
 * rows, bfloat16, float32 or GGUF's blocks.
 * The stored bytes are read from memory once and expanded in registers.
 * At few tokens the product is bound by the bytes of W that memory delivers, and memory gives most where several rows, far
 * apart, are read at once, each from its beginning to its end, and the next bytes of each are fetched early. Sums are
 * float32. What is multiplied follows from the activations' dtype alone, never from their number, so that a token's
 * result does not depend on its batch (but in the last case):
 *
 * - float32 activations meet weights widened to float32, and so do those of any dtype where the weights are FP8, of which
 *   the numbers spread too far for whole ones of 16 bits;
 * - bfloat16 activations, where the processor multiplies 16-bit integers (AVX-512 VNNI, AVX2), are rounded to 16 bits per
 *   128 positions, a 256th of their own rounding at the largest of them, and meet int8 weights and codes of groups as they
 *   are and NF4's levels in 14 bits; so do activations of any dtype for GGUF's blocks, whose own programs round them to 8 bits;
 * - bfloat16 activations meet several tokens' bfloat16 weights in pairs, where the processor can (AVX-512 BF16).
 *
 * An NF4 byte holds two neighbours, the first in the high nibble. A lookup takes a nibble of each word of several bytes, so
 * x is put into that order once per call instead of the weights once per row.
 */

#include "tiles.h"
#include "whole.h"
#include "codes.h"

/* 64 weights, the `block`-th of a row. */
INLINE chunk expand(enum kind kind, int half, const matrix *w, const lines *rows, int r, int64_t block) {
    const uint8_t *from = rows->bytes[r] + stored(kind, block * BLOCK);
    if (in_codes(kind)) return expand_codes(kind, rows->bytes[r], w->columns, block, rows->scales[r] + 2 * block);
    for (int64_t at = 0; at < stored(kind, BLOCK); at += 64) FETCH(from + at);
    if (kind == NF4) return expand_nf4(w->levels, from, rows->scales[r][block]);
    if (kind == GROUPED) return expand_grouped(w->levels, from, rows->scales[r] + 2 * block);
    if (kind == INT8) return expand_int8(from);
    if (kind == FP8) return expand_fp8(from);
    if (kind == DENSE) return expand_dense(from, half);
    chunk c;
    if (kind >= Q8_0) {
        expand_32(kind, rows->bytes[r], 2 * block, c.part);
        expand_32(kind, rows->bytes[r], 2 * block + 1, c.part + HALF_PARTS);
    } else {
        memcpy(&c, from, sizeof c);
    }
    return c;
}

/* `height` rows from the r0-th by `width` tokens from `token`, of weights expanded in x's order. */
INLINE void plain_tile(enum kind kind, int half, int height, int width, const product *p, const group *g, int64_t r0,
                       int64_t token) {
    const int parts = half ? 2 : PARTS;
    const char *x = p->x + token * p->stride;
    lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < g->blocks; b++, x += parts * VECTOR) {
        chunk c[MOST_HEIGHT];
        reach(height, &rows, stored(kind, b * BLOCK), stored(kind, BLOCK), g->row_bytes);
        EVERY(r, height) {
            const chunk next = expand(kind, half, p->w, &rows, r, b);
            if (width > 1) c[r] = next;
            else EVERY(i, parts) sums[r][0] = dot(next.part[i], x + i * VECTOR, sums[r][0], half);
        }
        if (width > 1)
            EVERY(i, parts) EVERY(r, height) EVERY(t, width)
                sums[r][t] = dot(c[r].part[i], x + t * p->stride + i * VECTOR, sums[r][t], half);
    }
    for (int r = 0; r < height && r0 + r < g->count; r += HEIGHT)
        store(kind, height < HEIGHT ? height : HEIGHT, width, p, sums + r, g, r0 + r, token);
}

/* The same without unrolling the rows, for the code's size. */
INLINE void compact_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0,
                      int64_t token) {
    const char *x = p->x + token * p->stride;
    const lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < g->blocks; b++, x += 4 * BLOCK) {
#pragma GCC unroll 1
        for (int r = 0; r < height; r++) {
            const chunk c = expand(kind, 0, p->w, &rows, r, b);
            EVERY(i, PARTS) EVERY(t, width)
                sums[r][t] = dot(c.part[i], x + t * p->stride + i * VECTOR, sums[r][t], 0);
        }
    }
    for (int r = 0; r < height && r0 + r < g->count; r += HEIGHT)
        store(kind, height < HEIGHT ? height : HEIGHT, width, p, sums + r, g, r0 + r, token);
}

#ifdef WIDE
/* The same for four bits in float32, two blocks at a time: nibble i of 16 words is one lookup, and a product's 16 sums, 8 of
 * each block, meet the constants afterwards. */
INLINE void nibble_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0, int64_t token) {
    const __m512 levels = _mm512_loadu_ps(p->w->levels);
    const char *x = p->x + token * p->stride;
    lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < g->blocks; b += 2, x += 8 * BLOCK) {
        __m512i words[HEIGHT];
        lanes sum[HEIGHT][MOST_WIDTH];
        reach(height, &rows, b * (BLOCK / 2), 64, g->row_bytes);
        EVERY(r, height) {
            FETCH(rows.bytes[r] + b * (BLOCK / 2));
            words[r] = _mm512_loadu_si512(rows.bytes[r] + b * (BLOCK / 2));
        }
        clear(height, width, sum);
        EVERY(i, 8) EVERY(r, height) {
            const __m512i index = i ? _mm512_srli_epi32(words[r], 4 * i) : words[r];
            const lanes part = (lanes)_mm512_permutexvar_ps(index, levels);
            EVERY(t, width) sum[r][t] = dot(part, x + t * p->stride + 64 * i, sum[r][t], 0);
        }
        EVERY(r, height) {
            const lanes scale = of_pair(kind, p->w, g, &rows, r, b);
            EVERY(t, width) sums[r][t] = multiply_add(sum[r][t], scale, sums[r][t]);
        }
    }
    store(kind, height, width, p, sums, g, r0, token);
}
#endif

#ifndef WIDE
#define DEEP 4 /* blocks of columns that meet all tokens before the next: x's part of them fits the first cache */
#define ABREAST 2 /* tokens: their sums with HEIGHT rows, and what these are made of, fit 16 registers */
#if defined(__x86_64__)
#define HELD(value) __asm__("" : "+x"(value)) /* in a register: gcc would read it again for every row */
#else
#define HELD(value)
#endif

/* sums of HEIGHT rows and `width` tokens += `blocks` of weights by x's; the weights as floats `w` (HEIGHT, DEEP blocks), or
 * where `raw` bfloat16 at `rows`. */
INLINE void corner(int width, int raw, const uint8_t *const *rows, const lanes *w, int64_t blocks, const char *x,
                   int64_t stride, lanes sums[HEIGHT][MOST_WIDTH]) {
    lanes held[HEIGHT][ABREAST];
    EVERY(r, HEIGHT) EVERY(t, width) held[r][t] = sums[r][t];
    for (int64_t i = 0; i < PARTS * blocks; i += 4)
        EVERY(j, 4) {
            lanes values[ABREAST];
            EVERY(t, width) {
                memcpy(&values[t], x + t * stride + (i + j) * VECTOR, VECTOR);
                HELD(values[t]);
            }
            EVERY(r, HEIGHT) {
                const lanes weight = raw ? dense_part(rows[r] + 16 * i, j) : w[r * (DEEP * PARTS) + i + j];
                EVERY(t, width) held[r][t] = multiply_add(weight, values[t], held[r][t]);
            }
        }
    EVERY(r, HEIGHT) EVERY(t, width) sums[r][t] = held[r][t];
}

static void of_bfloat16(const uint8_t *const *rows, const lanes *w, int64_t blocks, const char *x, int64_t stride,
                        lanes sums[HEIGHT][MOST_WIDTH]) {
    corner(ABREAST, 1, rows, w, blocks, x, stride, sums);
}

static void of_floats(const uint8_t *const *rows, const lanes *w, int64_t blocks, const char *x, int64_t stride,
                      lanes sums[HEIGHT][MOST_WIDTH]) {
    corner(ABREAST, 0, rows, w, blocks, x, stride, sums);
}

/* MOST_HEIGHT rows by all tokens: weights are expanded once, or where that takes one instruction as they are used. */
INLINE void all_tokens(enum kind kind, const product *p, const group *g) {
    const int raw = kind == DENSE && VECTOR == 32;
    const int64_t deep = p->tokens > MOST_FEW / 2 ? DEEP / 2 : DEEP;
    lines both[] = {lines_of(kind, HEIGHT, p->w, g, 0), lines_of(kind, HEIGHT, p->w, g, HEIGHT)};
    lanes w[HEIGHT * DEEP * PARTS], sums[MOST_FEW / MOST_WIDTH][2][HEIGHT][MOST_WIDTH];
    memset(sums, 0, (p->tokens + MOST_WIDTH - 1) / MOST_WIDTH * sizeof sums[0]);
    for (int64_t first = 0; first < g->blocks; first += deep)
        for (int half = 0; half < 2; half++) {
            lines *rows = both + half;
            const uint8_t *bytes[HEIGHT];
            const int64_t blocks = min(deep, g->blocks - first), at = stored(kind, first * BLOCK);
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t size = stored(kind, BLOCK);
                if (kind < Q8_0) reach(HEIGHT, rows, at + b * size, size, g->row_bytes);
                for (int r = 0; r < HEIGHT; r++)
                    if (raw) {
                        for (int64_t i = 0; i < size; i += 64) FETCH(rows->bytes[r] + at + b * size + i);
                    } else {
                        const chunk c = expand(kind, 0, p->w, rows, r, first + b);
                        memcpy(w + (r * DEEP + b) * PARTS, &c, sizeof c);
                    }
            }
            for (int r = 0; r < HEIGHT; r++) bytes[r] = rows->bytes[r] + at;
            for (int64_t t = 0; t < p->tokens; t += ABREAST) {
                const char *x = p->x + t * p->stride + first * PARTS * VECTOR;
                lanes (*own)[MOST_WIDTH] = (lanes(*)[MOST_WIDTH])&sums[t / MOST_WIDTH][half][0][t % MOST_WIDTH];
                (raw ? of_bfloat16 : of_floats)(bytes, w, blocks, x, p->stride, own);
            }
        }
    for (int64_t t = 0; t < p->tokens; t += MOST_WIDTH)
        for (int half = 0; half < 2 && half * HEIGHT < g->count; half++)
            store(kind, HEIGHT, MOST_WIDTH, p, sums[t / MOST_WIDTH][half], g, half * HEIGHT, t);
}
#endif

INLINE void tile(enum kind kind, enum arithmetic how, int height, int width, const product *p, const group *g,
                 int64_t r0, int64_t token) {
#ifdef WHOLE_NUMBERS
    if (how == WHOLE && kind >= Q8_0) {
        gguf_whole_tile(kind, height, width, p, g, r0, token);
        return;
    }
    if (how == WHOLE && in_codes(kind)) {
        codes_tile(kind, height, width, p, g, r0, token);
        return;
    }
    if (how == WHOLE) {
        whole_tile(kind, height, width, p, g, r0, token);
        return;
    }
#endif
    if (kind >= Q8_0 || in_codes(kind)) {
        compact_tile(kind, height, width, p, g, r0, token);
        return;
    }
#ifdef WIDE
    if (kind == NF4 || kind == GROUPED) {
        nibble_tile(kind, height, width, p, g, r0, token);
        return;
    }
#endif
    plain_tile(kind, how == HALVES, height, width, p, g, r0, token);
}

/* Rows worked on in one go. */
INLINE int64_t height_of(enum kind kind, enum arithmetic how, int64_t tokens) {
#ifdef WIDE
    if (tokens == 1 && how == WIDENED && (kind == DENSE || kind == FLOATS)) return MOST_HEIGHT;
#endif
#ifndef WIDE
    if (tokens > 1 && how != WHOLE) return MOST_HEIGHT;
#endif
    return HEIGHT;
}

/* A group of rows by all tokens. */
INLINE void rows_of(enum kind kind, enum arithmetic how, const product *p, group *g) {
    const matrix *w = p->w;
    const int nibbles = kind == NF4 || kind == GROUPED;
    const int64_t size = how == WHOLE && kind == INT8 ? 128 : how == WIDENED && nibbles && VECTOR < 64 ? 32 : 64;
    const int64_t rest = g->row_bytes % size, tokens = p->tokens;
    for (int64_t r = 0; r < g->count; r++) {
        const int64_t row = g->first + r * g->apart;
        if (kind == NF4 && !(VECTOR == 64 && looked_up(w, g->blocks))) {
            float *scales = g->scales + r * (g->blocks + 1);
            expand_constants(w, row * g->blocks, g->blocks, scales);
            scales[g->blocks] = 0; /* read where a last block has no pair */
        }
        if (in_groups(kind)) expand_groups(kind, w, row, g->blocks, how, g->scales + r * constants_of(kind, g->blocks));
        if (in_codes(kind) ? g->blocks % 2 : rest) memset(g->rests + r * MOST_REST, 0, MOST_REST);
        if (in_codes(kind)) {
            if (g->blocks % 2) codes_rest(kind, w->bytes + row * g->row_bytes, w->columns, g->rests + r * MOST_REST);
        } else if (rest) {
            memcpy(g->rests + r * MOST_REST, w->bytes + (row + 1) * g->row_bytes - rest, rest);
        }
    }
    if (tokens == 1)
        tile(kind, how, height_of(kind, how, 1), 1, p, g, 0, 0);
#ifndef WIDE
    else if (how != WHOLE)
        all_tokens(kind, p, g);
#endif
    else if (tokens == 2)
        tile(kind, how, HEIGHT, 2, p, g, 0, 0);
    else if (kind >= Q8_0 || MOST_WIDTH == WIDTH || tokens > MOST_WIDTH) /* x no longer fits the first cache */
        for (int64_t token = 0; token < tokens; token += WIDTH) tile(kind, how, HEIGHT, WIDTH, p, g, 0, token);
    else
        for (int64_t r = 0; r < g->count; r += 2)
            for (int64_t token = 0; token < tokens; token += MOST_WIDTH)
                if (tokens - token > WIDTH)
                    tile(kind, how, 2, MOST_WIDTH, p, g, r, token);
                else
                    tile(kind, how, 2, WIDTH, p, g, r, token);
}

/* A function each, so that kind and arithmetic are constants in it. */
typedef void work(const product *, group *);
#ifdef WHOLE_NUMBERS
#define OF_GGUF WHOLE
#else
#define OF_GGUF WIDENED
#endif
#define ROWS_OF(NAME, KIND, HOW) \
    static void NAME(const product *p, group *g) { rows_of(KIND, HOW, p, g); }
ROWS_OF(nf4_widened, NF4, WIDENED)
ROWS_OF(int8_widened, INT8, WIDENED)
ROWS_OF(dense_widened, DENSE, WIDENED)
ROWS_OF(floats_widened, FLOATS, WIDENED)
ROWS_OF(fp8_widened, FP8, WIDENED)
ROWS_OF(q8_0_rows, Q8_0, OF_GGUF)
ROWS_OF(q4_0_rows, Q4_0, OF_GGUF)
ROWS_OF(q5_0_rows, Q5_0, OF_GGUF)
ROWS_OF(q5_1_rows, Q5_1, OF_GGUF)
ROWS_OF(q4_k_rows, Q4_K, OF_GGUF)
ROWS_OF(q5_k_rows, Q5_K, OF_GGUF)
ROWS_OF(q6_k_rows, Q6_K, OF_GGUF)
ROWS_OF(grouped_widened, GROUPED, WIDENED)
ROWS_OF(grouped_2_widened, GROUPED_2, WIDENED)
ROWS_OF(grouped_3_widened, GROUPED_3, WIDENED)
ROWS_OF(grouped_8_widened, GROUPED_8, WIDENED)
#ifdef WHOLE_NUMBERS
ROWS_OF(nf4_whole, NF4, WHOLE)
ROWS_OF(int8_whole, INT8, WHOLE)
ROWS_OF(grouped_whole, GROUPED, WHOLE)
ROWS_OF(grouped_2_whole, GROUPED_2, WHOLE)
ROWS_OF(grouped_3_whole, GROUPED_3, WHOLE)
ROWS_OF(grouped_8_whole, GROUPED_8, WHOLE)
#else
#define nf4_whole nf4_widened
#define int8_whole int8_widened
#define grouped_whole grouped_widened
#define grouped_2_whole grouped_2_widened
#define grouped_3_whole grouped_3_widened
#define grouped_8_whole grouped_8_widened
#endif
#ifdef PAIRS
ROWS_OF(dense_halves, DENSE, HALVES)
#else
#define dense_halves dense_widened
#endif

INLINE int place(enum order order, int i) { /* of what comes to position i of 128 */
    if (order == SPLIT) return (i & 64) + 2 * (i & 31) + (i >> 5 & 1);
    if (order == NIBBLES) return 4 * (i & 31) + (i >> 5 ^ 1);
    if (order == LONG_NIBBLES) return 8 * (i & 15) + (i >> 4 ^ 1);
    if (order == EVENS) return (i & 96) + 2 * (i & 15) + (i >> 4 & 1);
    if (order == SPREAD) return (i & 64) + 2 * (2 * (i & 8) + (i >> 1 & 8) + (i & 7)) + (1 ^ (i >> 5 & 1));
    return i;
}

meeting meet(enum kind kind, int64_t columns, int x_half, int64_t tokens) {
    const int nibbles = kind == NF4 || kind == GROUPED;
    meeting m = {NATURAL, WIDENED, 0, 0, 0, 0};
#ifdef PAIRS
    if (x_half && kind == DENSE && tokens > 1) m.how = HALVES;
#endif
#ifdef WHOLE_NUMBERS
    if (kind >= Q8_0 || (x_half && (nibbles || kind == INT8 || in_codes(kind)))) m.how = WHOLE;
#endif
#ifdef WIDE
    if (nibbles) m.order = m.how == WHOLE ? NIBBLES : LONG_NIBBLES;
#else
    if (nibbles) m.order = m.how == WHOLE ? SPREAD : SPLIT;
#endif
    if ((kind == GROUPED_2 || kind == GROUPED_3) && m.how == WHOLE) m.order = NIBBLES;
    if (kind == DENSE && m.how == WIDENED && VECTOR > 16) m.order = EVENS;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, padded = (tokens + MOST_WIDTH - 1) / MOST_WIDTH * MOST_WIDTH;
    m.stride = even(blocks) * BLOCK * (m.how == WIDENED ? 4 : 2);
    if (m.how == WHOLE) m.stride += (even(blocks) * 2 + 63) / 64 * 64; /* a scale for each pair of blocks */
    if (in_groups(kind)) {
        m.sums = m.stride;
        m.stride += (even(blocks) * 8 + 63) / 64 * 64;
    }
    m.arranged = padded * m.stride;
    m.each = MOST_HEIGHT * (MOST_REST + constants_of(kind, blocks) * 4 + 64) / 64 * 64;
    return m;
}

/* `count` of 128 positions of x to the `at`-th of an arranged token, in order; zeros beyond. */
INLINE void arrange_piece(enum order order, const meeting *m, const void *x, int x_half, int64_t count, char *token,
                          int64_t at, int64_t pairs) {
    float wide[2 * BLOCK] = {0}, placed[2 * BLOCK];
    if (x_half)
        for (int i = 0; i < count; i++) wide[i] = widen(((const uint16_t *)x)[i]);
    else if (count > 0)
        memcpy(wide, x, 4 * count);
    for (int i = 0; i < 2 * BLOCK; i++) placed[i] = wide[one_by_one(place(order, i))];
    if (m->sums)
        for (int unit = 0; unit < 2 * BLOCK / GROUP_UNIT; unit++) {
            float sum = 0;
            for (int i = 0; i < GROUP_UNIT; i++) sum += wide[unit * GROUP_UNIT + i];
            ((float *)(token + m->sums))[at / GROUP_UNIT + unit] = sum;
        }
    if (m->how == WIDENED) {
        memcpy((float *)token + at, placed, sizeof placed);
    } else if (m->how == HALVES) {
        for (int i = 0; i < 2 * BLOCK; i++) ((uint16_t *)token)[at + i] = narrow(placed[i]);
#ifdef WHOLE_NUMBERS
    } else {
        float most = 0;
        for (int i = 0; i < 2 * BLOCK; i++) most = __builtin_fabsf(placed[i]) > most ? __builtin_fabsf(placed[i]) : most;
        const float rate = most > 0 ? 32767.0f / most : 0, level = order == NIBBLES || order == SPREAD ? LEVEL : 1;
        for (int i = 0; i < 2 * BLOCK; i++) ((int16_t *)token)[at + i] = (int16_t)__builtin_rintf(placed[i] * rate);
        ((float *)(token + 4 * BLOCK * pairs))[at / (2 * BLOCK)] = most / (32767.0f * level);
#endif
    }
}

void arrange(const meeting *m, const void *x, int x_half, int64_t tokens, int64_t columns, char *to) {
    const int64_t pairs = (columns + 2 * BLOCK - 1) / (2 * BLOCK), size = x_half ? 2 : 4;
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tokens * pairs; piece++) {
        const int64_t t = piece / pairs, at = piece % pairs * 2 * BLOCK, count = min(2 * BLOCK, columns - at);
        const char *from = (const char *)x + (t * columns + at) * size;
        char *token = to + t * m->stride;
#define PIECE(ORDER) \
    case ORDER: arrange_piece(ORDER, m, from, x_half, count, token, at, pairs); break
        switch (m->order) {
            PIECE(NATURAL);
            PIECE(SPLIT);
            PIECE(NIBBLES);
            PIECE(LONG_NIBBLES);
            PIECE(EVENS);
            PIECE(SPREAD);
        }
    }
    if (tokens > 1) { /* a single token has no tile of several */
#pragma omp single
        memset(to + tokens * m->stride, 0, m->arranged - tokens * m->stride);
    }
}

void multiply(enum kind kind, const meeting *m, const product *p, char *rooms) {
    static work *const works[][3] = {{nf4_widened, NULL, nf4_whole},
                                     {int8_widened, NULL, int8_whole},
                                     {dense_widened, dense_halves, NULL},
                                     {floats_widened, NULL, NULL},
                                     [GROUPED] = {grouped_widened, NULL, grouped_whole},
                                     [GROUPED_2] = {grouped_2_widened, NULL, grouped_2_whole},
                                     [GROUPED_3] = {grouped_3_widened, NULL, grouped_3_whole},
                                     [GROUPED_8] = {grouped_8_widened, NULL, grouped_8_whole},
                                     [FP8] = {fp8_widened, NULL, NULL},
                                     [Q8_0] = {[OF_GGUF] = q8_0_rows},
                                     [Q4_0] = {[OF_GGUF] = q4_0_rows},
                                     [Q5_0] = {[OF_GGUF] = q5_0_rows},
                                     [Q5_1] = {[OF_GGUF] = q5_1_rows},
                                     [Q4_K] = {[OF_GGUF] = q4_k_rows},
                                     [Q5_K] = {[OF_GGUF] = q5_k_rows},
                                     [Q6_K] = {[OF_GGUF] = q6_k_rows}};
    work *const run = works[kind][m->how];
    const int64_t rows = p->w->rows, height = height_of(kind, m->how, p->tokens);
    char *own = rooms + THREAD * m->each;
    group g = {0, 0, 0, (p->w->columns + BLOCK - 1) / BLOCK, stored(kind, p->w->columns),
               (float *)(own + MOST_HEIGHT * MOST_REST), (uint8_t *)own};
#pragma omp for schedule(dynamic) nowait
    for (int64_t unit = 0; unit < rows; unit += UNIT) {
        const int64_t left = min(UNIT, rows - unit);
        g.apart = (left + height - 1) / height;
        for (int64_t i = 0; i < g.apart; i++) {
            g.first = unit + i;
            g.count = (left - i + g.apart - 1) / g.apart;
            run(p, &g);
        }
    }
}

/* Packed by Python: one word each. */
_Static_assert(sizeof(void *) == 8, "words hold pointers");
typedef struct {
    int64_t kind;
    matrix w;
    const void *x;
    int64_t x_half, tokens;
    const void *bias;
    void *out;
    int64_t threads;
} request;

/* Returns 1 where memory is short, else 0. All but int8 and FP8 needs columns that are a multiple of 64. */
int matmul(const request *q) {
    if (q->tokens > MOST_FEW)
        return multiply_many(q->kind, &q->w, q->x, q->x_half, q->tokens, q->bias, q->out, q->threads);
    const meeting m = meet(q->kind, q->w.columns, q->x_half, q->tokens);
    char *arranged = aligned_alloc(64, m.arranged + q->threads * m.each);
    if (!arranged) return 1;
    const product p = {&q->w, arranged, m.stride, q->tokens, q->bias, q->out, q->x_half, 0, m.sums};
#pragma omp parallel num_threads(q->threads) if (q->threads > 1)
    {
        arrange(&m, q->x, q->x_half, q->tokens, q->w.columns, arranged);
        multiply(q->kind, &m, &p, arranged + m.arranged);
    }
    free(arranged);
    return 0;
}
