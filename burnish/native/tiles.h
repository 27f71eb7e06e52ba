/* What the products of few tokens are made of: expanded weights, the rows of a tile, and where their sums go. */

#pragma once
#include "fp8.h"
#include "grouped.h"

/* 64 whole numbers. */
INLINE chunk expand_int8(const uint8_t *bytes) {
    chunk c;
#ifdef WIDE
    for (int i = 0; i < 4; i++)
        c.part[i] = (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)bytes + i)));
#elif VECTOR == 32
    for (int i = 0; i < PARTS; i++)
        c.part[i] = (lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + 8 * i))));
#else
    flat values;
    for (int i = 0; i < 64; i++) values.floats[i] = (int8_t)bytes[i];
    memcpy(&c, &values, sizeof c);
#endif
    return c;
}

/* The i-th part of what `expand_dense` gives with vectors of 32 bytes. */
INLINE lanes dense_part(const uint8_t *bytes, int64_t i) {
#if VECTOR == 32
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)bytes + i / 4 * 2 + i % 2);
    return (lanes)(i % 4 < 2 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
#endif
    return (lanes){0};
}

/* Of bfloat16; in float32 the even ones of 32 positions before the odd ones, but without wide vectors. */
INLINE chunk expand_dense(const uint8_t *bytes, int half) {
    chunk c;
    if (half) {
        memcpy(&c, bytes, 2 * BLOCK);
        return c;
    }
#ifdef WIDE
    for (int i = 0; i < 2; i++) {
        const __m512i pairs = _mm512_loadu_si512((const __m512i *)bytes + i);
        c.part[2 * i] = (lanes)_mm512_slli_epi32(pairs, 16);
        c.part[2 * i + 1] = (lanes)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
    }
#elif VECTOR == 32
    EVERY(i, PARTS) c.part[i] = dense_part(bytes, i);
#else
    flat values;
    for (int i = 0; i < BLOCK; i++) values.floats[i] = widen(((const uint16_t *)bytes)[i]);
    memcpy(&c, &values, sizeof c);
#endif
    return c;
}

/* One part of a chunk of weights by the same part of x. */
INLINE lanes dot(lanes w, const char *x, lanes sum, int half) {
    lanes values;
    memcpy(&values, x, VECTOR);
#ifdef PAIRS
    if (half) return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)values);
#endif
    return multiply_add(w, values, sum);
}

typedef float four __attribute__((vector_size(16)));

#ifdef WIDE
INLINE __m512 fold(__m512 a, __m512 b) { /* per quarter: a0 + a2, b0 + b2, a1 + a3, b1 + b3 */
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
#endif

/* The totals of a and b, or where `all` of a, b, c and d. */
INLINE four totals(int all, lanes a, lanes b, lanes c, lanes d) {
#ifdef WIDE
    const __m512 ab = fold((__m512)a, (__m512)b), cd = all ? fold((__m512)c, (__m512)d) : ab;
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return (four)_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#elif VECTOR == 32
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = all ? _mm256_hadd_ps((__m256)c, (__m256)d) : ab;
    const __m256 sums = _mm256_hadd_ps(ab, cd);
    return (four)_mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
#else
    const lanes sums[] = {a, b, c, d};
    four total = {0};
    for (int r = 0; r < (all ? 4 : 2); r++)
        for (int i = 0; i < VECTOR / 4; i++) total[r] += sums[r][i];
    return total;
#endif
}

/* Rows worked on at once: `count` of them from `first`, `apart` rows from one to the next; beyond them the last again,
 * which is not stored. `scales` has the constants of each, `blocks` + 1 a row with a zero at the end (grouped.h tells
 * GROUPED's), and `rests` what is left of each after the last bytes that are read at once. */
typedef struct {
    int64_t first, apart, count, blocks, row_bytes;
    float *scales;
    uint8_t *rests;
} group;

/* Where the rows of a tile lie: their bytes, and NF4's constants. */
typedef struct {
    const uint8_t *bytes[MOST_HEIGHT], *rests[MOST_HEIGHT];
    const float *scales[MOST_HEIGHT];
    int64_t first[MOST_HEIGHT]; /* block of each */
} lines;

INLINE lines lines_of(enum kind kind, int height, const matrix *w, const group *g, int64_t r0) {
    lines found;
    for (int r = 0; r < height; r++) {
        const int64_t row = min(r0 + r, g->count - 1);
        found.bytes[r] = w->bytes + (g->first + row * g->apart) * g->row_bytes;
        found.scales[r] = g->scales + row * constants_of(kind, g->blocks);
        found.first[r] = (g->first + row * g->apart) * g->blocks;
        found.rests[r] = g->rests + row * MOST_REST;
    }
    return found;
}

/* Before `size` bytes are read at `at`: from here on where they stand in the rests. */
INLINE void reach(int height, lines *rows, int64_t at, int64_t size, int64_t row_bytes) {
    if (__builtin_expect(at + size > row_bytes, 0))
        for (int r = 0; r < height; r++) rows->bytes[r] = rows->rests[r] - at;
}

#define FETCH(address) __builtin_prefetch((address) + 1024, 0, 3)

INLINE void clear(int height, int width, lanes sums[HEIGHT][MOST_WIDTH]) {
    EVERY(r, height) EVERY(t, width) sums[r][t] = (lanes){0};
}

/* The sums of `height` rows from the r0-th and `width` tokens from `token`, scaled and shifted, into the output. */
INLINE void store(enum kind kind, int height, int width, const product *p, lanes sums[HEIGHT][MOST_WIDTH],
                  const group *g, int64_t r0, int64_t token) {
    const int64_t rows = min(height, g->count - r0), tokens = min(width, p->tokens - token);
    const int all = height > 2;
    four scale = {1, 1, 1, 1}, bias = {0};
    for (int r = 0; r < rows; r++) {
        const int64_t row = g->first + (r0 + r) * g->apart;
        scale[r] = scale_of_row(kind, p->w, row);
        if (p->bias) bias[r] = p->out_half ? widen(((const uint16_t *)p->bias)[row]) : ((const float *)p->bias)[row];
    }
    for (int t = 0; t < width && t < tokens; t++) {
        four total = totals(all, sums[0][t], sums[1][t], sums[2 * all][t], sums[3 * all][t]) * scale + bias;
        if (in_groups(kind) && p->w->codes)
            for (int r = 0; r < rows; r++) {
                const float *scales = g->scales + (r0 + r) * constants_of(kind, g->blocks);
                total[r] += of_zeros(scales, p->x + (token + t) * p->stride + p->sums, g->blocks);
            }
        for (int r = 0; r < height && r < rows; r++) {
            const int64_t at = (token + t) * p->w->rows + g->first + (r0 + r) * g->apart;
            if (p->out_half)
                ((uint16_t *)p->out)[at] = narrow(total[r]);
            else
                ((float *)p->out)[at] = p->adds ? ((float *)p->out)[at] + total[r] : total[r];
        }
    }
}

/* Whether the constants are looked up as they are needed, two blocks of one group at a time. */
INLINE int looked_up(const matrix *w, int64_t blocks) { return w->codes && blocks % 2 == 0; }

#ifdef WIDE
/* The constants of two blocks of row r, 8 lanes each, or of four times 32 weights. */
INLINE lanes of_pair(enum kind kind, const matrix *w, const group *g, const lines *rows, int r, int64_t block) {
    if (kind == GROUPED) {
        const __m512i of_unit = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(rows->scales[r] + 2 * block));
        return (lanes)_mm512_permutexvar_ps(of_unit, four);
    }
    if (looked_up(w, g->blocks)) {
        const int64_t at = rows->first[r] + block;
        const __m512 low = _mm512_set1_ps(w->map[w->codes[at]]), high = _mm512_set1_ps(w->map[w->codes[at + 1]]);
        const __m512 scale = _mm512_set1_ps(w->constants[at / 256]), offset = _mm512_set1_ps(*w->offset);
        return (lanes)_mm512_fmadd_ps(_mm512_mask_blend_ps(0xff00, low, high), scale, offset);
    }
    const __m512i of_block = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    double two;
    memcpy(&two, rows->scales[r] + block, 8);
    return (lanes)_mm512_permutexvar_ps(of_block, _mm512_castpd_ps(_mm512_set1_pd(two)));
}
#endif
