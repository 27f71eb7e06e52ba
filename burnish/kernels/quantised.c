/* Products with quantised weights, and their expansion, on a CPU.
 *
 * out (tokens, rows) = x (tokens, columns) W^T + bias, for W stored as NF4 blocks of 64 or as int8 rows. The stored
 * bytes are read once for up to eight tokens and expanded in registers: at few tokens the product is bound by the
 * bytes of W that memory delivers. Everything accumulates in float32. Where the processor multiplies bfloat16 pairs
 * (AVX-512 BF16), bfloat16 activations meet weights rounded to bfloat16, as they would if W were expanded first;
 * elsewhere both are widened to float32.
 *
 * An NF4 byte holds two neighbours, the first in the high nibble. The nibbles of 32 bytes are looked up as 32 even
 * and 32 odd positions, so x is put into that order once per call instead of the weights once per row.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(PORTABLE)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512BF16__)
#define PAIRS 1 /* dot products of bfloat16 pairs */
#endif
#endif

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64
#define HEIGHT 4 /* rows and tokens worked on at once, 4 by 4 or 2 by 8: 16 sums fit the registers */
#define WIDTH 4
#define MOST_WIDTH 8

typedef float lanes __attribute__((vector_size(64))); /* 16 floats on every machine */

enum kind { NF4, INT8 };

/* NF4: `bytes` two weights each; the constant of block b is constants[b], or with `codes` (one byte per block)
 * map[codes[b]] * constants[b / 256] + offset. int8: `bytes` one weight each and one constant per row. */
typedef struct {
    const uint8_t *bytes;
    const uint8_t *codes;
    const float *constants, *offset, *map, *levels;
    int64_t rows, columns;
} matrix;

/* 64 expanded weights: four parts of 16 float32, or two of 32 bfloat16. */
typedef struct {
    lanes part[4];
} chunk;

/* The same in order, in memory. */
typedef union {
    float floats[64];
    uint16_t halves[64];
} flat;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t narrow(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value == value ? rounded : 0x7fc0;
}

/* `count` constants from block `first`. */
INLINE void expand_constants(const matrix *w, int64_t first, int64_t count, float *out) {
    if (!w->codes) {
        memcpy(out, w->constants + first, 4 * count);
        return;
    }
    for (int64_t i = 0; i < count; i++) out[i] = w->map[w->codes[first + i]];
    for (int64_t i = 0; i < count; i++) out[i] = out[i] * w->constants[(first + i) >> 8] + *w->offset;
}

/* Weights of 32 bytes: even positions first, then odd ones. */
INLINE chunk expand_nf4(const matrix *w, const uint8_t *bytes, float scale, int half) {
    chunk c;
#ifdef WIDE
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(w->levels), _mm512_set1_ps(scale));
#ifdef PAIRS
    if (half) {
        /* A lookup takes five bits: the table twice makes the fifth, a bit of the other nibble, harmless. */
        __m512i twice = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(table));
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
        c.part[0] = (lanes)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), twice);
        c.part[1] = (lanes)_mm512_permutexvar_epi16(words, twice);
        return c;
    }
#endif
    for (int i = 0; i < 2; i++) {
        __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes + i));
        c.part[i] = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
        c.part[2 + i] = (lanes)_mm512_permutexvar_ps(words, table);
    }
#else
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = w->levels[i] * scale;
    flat split;
    for (int i = 0; i < 32; i++) split.floats[i] = table[bytes[i] >> 4];
    for (int i = 0; i < 32; i++) split.floats[32 + i] = table[bytes[i] & 15];
    memcpy(&c, &split, sizeof c);
#endif
    return c;
}

/* 64 whole numbers, exact in either dtype. */
INLINE chunk expand_int8(const uint8_t *bytes, int half) {
    chunk c;
#ifdef WIDE
    for (int i = 0; i < 4; i++)
        c.part[i] = (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)bytes + i)));
#ifdef PAIRS
    if (half) {
        c.part[0] = (lanes)_mm512_cvtne2ps_pbh((__m512)c.part[1], (__m512)c.part[0]);
        c.part[1] = (lanes)_mm512_cvtne2ps_pbh((__m512)c.part[3], (__m512)c.part[2]);
    }
#endif
#else
    flat values;
    for (int i = 0; i < 64; i++) values.floats[i] = (int8_t)bytes[i];
    memcpy(&c, &values, sizeof c);
#endif
    return c;
}

INLINE lanes multiply_add(lanes a, lanes b, lanes sum) {
#ifdef WIDE
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(FP_FAST_FMAF)
    for (int i = 0; i < 16; i++) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
    return sum;
#else
    return sum + a * b;
#endif
}

/* One part, 64 bytes, of a chunk of weights by the same part of x. */
INLINE lanes dot(lanes w, const char *x, lanes sum, int half) {
    lanes values;
    memcpy(&values, x, 64);
#ifdef PAIRS
    if (half) return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)values);
#endif
    return multiply_add(w, values, sum);
}

INLINE float total(lanes sum) {
#ifdef WIDE
    return _mm512_reduce_add_ps((__m512)sum);
#else
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) sum[i] += sum[i + width];
    return sum[0];
#endif
}

typedef struct {
    const matrix *w;
    const char *x;      /* arranged activations: float32, or bfloat16 where half */
    int64_t stride;     /* bytes from a token to the next in x, and from a row to the next in a panel */
    int64_t tokens;
    const float *scale; /* of rows; may be null */
    const void *bias;   /* of the output's dtype; may be null */
    void *out;
    int out_half;
} product;

/* A thread's own room: for HEIGHT rows the expanded weights, the constants, and what is left of int8 rows after their
 * last whole block. */
typedef struct {
    char *panel;
    float *scales;
    uint8_t *rests;
} room;

/* 64 weights of row `first` + r, while those of the row HEIGHT further down are fetched. */
INLINE chunk expand(enum kind kind, int half, const matrix *w, const room *own, int64_t first, int64_t r, int64_t block,
                    int64_t blocks) {
    const int64_t row_bytes = kind == NF4 ? w->columns / 2 : w->columns;
    const uint8_t *from = w->bytes + (first + r) * row_bytes + block * (kind == NF4 ? BLOCK / 2 : BLOCK);
    __builtin_prefetch(from + HEIGHT * row_bytes, 0, 2);
    if (kind == NF4) return expand_nf4(w, from, own->scales[r * blocks + block], half);
    return expand_int8((block + 1) * BLOCK > w->columns ? own->rests + r * BLOCK : from, half);
}

/* The sums of `height` rows from `first` and `width` tokens from `token`, scaled and shifted, into the output. */
INLINE void store(int height, int width, const product *p, lanes sums[HEIGHT][MOST_WIDTH], int64_t first, int64_t token) {
    for (int r = 0; r < height && first + r < p->w->rows; r++)
        for (int t = 0; t < width && token + t < p->tokens; t++) {
            float value = total(sums[r][t]) * (p->scale ? p->scale[first + r] : 1);
            const int64_t at = (token + t) * p->w->rows + first + r;
            if (p->out_half) {
                if (p->bias) value += widen(((const uint16_t *)p->bias)[first + r]);
                ((uint16_t *)p->out)[at] = narrow(value);
            } else {
                if (p->bias) value += ((const float *)p->bias)[first + r];
                ((float *)p->out)[at] = value;
            }
        }
}

/* `height` rows from the r-th after `first` by `width` tokens from `token`, straight from the stored weights. */
INLINE void direct_tile(enum kind kind, int half, int height, int width, const product *p, const room *own,
                        int64_t first, int64_t r0, int64_t token) {
    const int64_t blocks = (p->w->columns + BLOCK - 1) / BLOCK, last = p->w->rows - 1 - first;
    const int parts = half ? 2 : 4;
    const char *x = p->x + token * p->stride;
    lanes sums[HEIGHT][MOST_WIDTH] = {0};
    for (int64_t b = 0; b < blocks; b++, x += 64 * parts) {
        chunk c[HEIGHT];
        for (int r = 0; r < height; r++) /* past the end: the last row again, and not stored */
            c[r] = expand(kind, half, p->w, own, first, min(r0 + r, last), b, blocks);
        for (int i = 0; i < parts; i++)
            for (int r = 0; r < height; r++)
                for (int t = 0; t < width; t++)
                    sums[r][t] = dot(c[r].part[i], x + t * p->stride + 64 * i, sums[r][t], half);
    }
    store(height, width, p, sums, first + r0, token);
}

/* HEIGHT rows from `first`, expanded in `panel`, by WIDTH tokens from `token`. */
INLINE void panel_tile(int half, const product *p, const char *panel, int64_t first, int64_t token) {
    const char *x = p->x + token * p->stride;
    lanes sums[HEIGHT][MOST_WIDTH] = {0};
    for (int64_t at = 0; at < p->stride; at += 64)
        for (int r = 0; r < HEIGHT; r++) {
            lanes w;
            memcpy(&w, panel + r * p->stride + at, 64);
            for (int t = 0; t < WIDTH; t++) sums[r][t] = dot(w, x + t * p->stride + at, sums[r][t], half);
        }
    store(HEIGHT, WIDTH, p, sums, first, token);
}

/* HEIGHT rows from `first` by all tokens. Of many tokens in bfloat16, whose products cost less than expanding the
 * weights again, all meet weights expanded once. */
INLINE void rows_of(enum kind kind, int half, const product *p, const room *own, int64_t first) {
    const matrix *w = p->w;
    const int64_t blocks = (w->columns + BLOCK - 1) / BLOCK, count = min(HEIGHT, w->rows - first);
    const int64_t rest = w->columns % BLOCK;
    if (kind == NF4) expand_constants(w, first * blocks, count * blocks, own->scales);
    if (kind == INT8 && rest)
        for (int64_t r = 0; r < count; r++) {
            memset(own->rests + r * BLOCK, 0, BLOCK);
            memcpy(own->rests + r * BLOCK, w->bytes + (first + r + 1) * w->columns - rest, rest);
        }
    if (half && p->tokens > MOST_WIDTH) {
        for (int64_t r = 0; r < HEIGHT; r++)
            for (int64_t b = 0; b < blocks; b++) {
                const chunk c = expand(kind, half, w, own, first, min(r, count - 1), b, blocks);
                memcpy(own->panel + r * p->stride + 2 * BLOCK * b, &c, 2 * BLOCK);
            }
        for (int64_t token = 0; token < p->tokens; token += WIDTH) panel_tile(half, p, own->panel, first, token);
    } else if (p->tokens > WIDTH) {
        for (int64_t r = 0; r < count; r += HEIGHT / 2)
            for (int64_t token = 0; token < p->tokens; token += MOST_WIDTH)
                direct_tile(kind, half, HEIGHT / 2, MOST_WIDTH, p, own, first, r, token);
    } else {
        const int height = half ? HEIGHT : HEIGHT / 2; /* float32 takes twice the registers */
        for (int64_t r = 0; r < count; r += height)
            if (p->tokens > 2)
                direct_tile(kind, half, height, 4, p, own, first, r, 0);
            else if (p->tokens > 1)
                direct_tile(kind, half, height, 2, p, own, first, r, 0);
            else
                direct_tile(kind, half, height, 1, p, own, first, r, 0);
    }
}

/* A function each, so that kind and half are constants in it. */
#define ROWS_OF(NAME, KIND, HALF) \
    static void NAME(const product *p, const room *own, int64_t first) { rows_of(KIND, HALF, p, own, first); }
ROWS_OF(nf4_wide, NF4, 0)
ROWS_OF(int8_wide, INT8, 0)
#ifdef PAIRS
ROWS_OF(nf4_half, NF4, 1)
ROWS_OF(int8_half, INT8, 1)
#else
#define nf4_half nf4_wide
#define int8_half int8_wide
#endif

/* x widened if need be, padded with zeros to whole blocks, and for NF4 even positions before odd ones. */
INLINE void arrange(enum kind kind, int half, const void *x, int x_half, int64_t tokens, int64_t columns, char *to,
                    int64_t stride) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t at = 0; at < columns; at += BLOCK) {
            const int64_t count = min(BLOCK, columns - at);
            const uint16_t *halves = (const uint16_t *)x + t * columns + at;
            flat natural = {0}, ordered;
            if (half)
                memcpy(natural.halves, halves, 2 * count);
            else if (x_half)
                for (int64_t i = 0; i < count; i++) natural.floats[i] = widen(halves[i]);
            else
                memcpy(natural.floats, (const float *)x + t * columns + at, 4 * count);
            ordered = natural;
            for (int i = 0; i < 32 && kind == NF4; i++) {
                if (half) {
                    ordered.halves[i] = natural.halves[2 * i];
                    ordered.halves[32 + i] = natural.halves[2 * i + 1];
                } else {
                    ordered.floats[i] = natural.floats[2 * i];
                    ordered.floats[32 + i] = natural.floats[2 * i + 1];
                }
            }
            memcpy(to + t * stride + at * (half ? 2 : 4), &ordered, half ? 2 * BLOCK : 4 * BLOCK);
        }
}

/* Returns 1 where memory is short, else 0. NF4 needs columns that are a multiple of 64. */
int matmul(int kind, const uint8_t *bytes, const uint8_t *codes, const float *constants, const float *offset,
           const float *map, const float *levels, int64_t rows, int64_t columns, const void *x, int x_half,
           int64_t tokens, const void *bias, void *out, int threads) {
    const matrix w = {bytes, codes, constants, offset, map, levels, rows, columns};
#ifdef PAIRS
    const int half = x_half;
#else
    const int half = 0;
#endif
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, stride = blocks * BLOCK * (half ? 2 : 4);
    const int64_t padded = (tokens + MOST_WIDTH - 1) / MOST_WIDTH * MOST_WIDTH;
    const int64_t each = HEIGHT * (stride + BLOCK + (blocks * 4 + 63) / 64 * 64); /* bytes of a thread's room */
    char *arranged = aligned_alloc(64, padded * stride + threads * each);
    if (!arranged) return 1;
    arrange(kind, half, x, x_half, tokens, columns, arranged, stride);
    memset(arranged + tokens * stride, 0, (padded - tokens) * stride);
    const product p = {&w, arranged, stride, tokens, kind == INT8 ? constants : NULL, bias, out, x_half};
    void (*run)(const product *, const room *, int64_t) =
        kind == NF4 ? (half ? nf4_half : nf4_wide) : (half ? int8_half : int8_wide);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *panel = arranged + padded * stride + THREAD * each;
        uint8_t *rests = (uint8_t *)panel + HEIGHT * stride;
        const room own = {panel, (float *)(rests + HEIGHT * BLOCK), rests};
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += HEIGHT) run(&p, &own, first);
    }
    free(arranged);
    return 0;
}

/* out (count) float32, or bfloat16 where out_half, from NF4 blocks that run over the flattened matrix. */
void nf4_dequantize(const uint8_t *bytes, const uint8_t *codes, const float *constants, const float *offset,
                    const float *map, const float *levels, int64_t count, void *out, int out_half, int threads) {
    const matrix w = {bytes, codes, constants, offset, map, levels, 0, 0};
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t left = count - b * BLOCK;
        uint8_t padded[BLOCK / 2] = {0};
        const uint8_t *from = bytes + b * (BLOCK / 2);
        if (left < BLOCK) from = memcpy(padded, from, (left + 1) / 2);
        const int64_t size = left < BLOCK ? left : BLOCK;
        float scale;
        expand_constants(&w, b, 1, &scale);
        flat natural;
        if (out_half) {
            flat split;
#ifdef PAIRS
            const chunk c = expand_nf4(&w, from, scale, 1);
            memcpy(&split, &c, 2 * BLOCK);
#else
            const chunk c = expand_nf4(&w, from, scale, 0);
            float wide[BLOCK];
            memcpy(wide, &c, 4 * BLOCK);
            for (int i = 0; i < BLOCK; i++) split.halves[i] = narrow(wide[i]);
#endif
            for (int i = 0; i < 32; i++) {
                natural.halves[2 * i] = split.halves[i];
                natural.halves[2 * i + 1] = split.halves[32 + i];
            }
            memcpy((uint16_t *)out + b * BLOCK, &natural, 2 * size);
        } else {
            const chunk c = expand_nf4(&w, from, scale, 0);
            flat split;
            memcpy(&split, &c, 4 * BLOCK);
            for (int i = 0; i < 32; i++) {
                natural.floats[2 * i] = split.floats[i];
                natural.floats[2 * i + 1] = split.floats[32 + i];
            }
            memcpy((float *)out + b * BLOCK, &natural, 4 * size);
        }
    }
}

/* out (rows, columns) float32, or bfloat16 where out_half. */
void int8_dequantize(const int8_t *values, const float *scale, int64_t rows, int64_t columns, void *out, int out_half,
                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *from = values + row * columns;
        if (out_half)
            for (int64_t i = 0; i < columns; i++) ((uint16_t *)out)[row * columns + i] = narrow(from[i] * scale[row]);
        else
            for (int64_t i = 0; i < columns; i++) ((float *)out)[row * columns + i] = from[i] * scale[row];
    }
}
