/* Products of few tokens with stored weights, and the expansion of quantised ones, on a CPU.
 *
 * out (tokens, rows) = x (tokens, columns) W^T + bias, for W stored as NF4 blocks of 64, int8 rows or bfloat16. The stored
 * bytes are read once: expanded in registers for up to eight tokens, in a panel that fits the cache for more. At few
 * tokens the product is bound by the bytes of W that memory delivers. Everything accumulates in float32. Where the
 * processor multiplies bfloat16 pairs (AVX-512 BF16), bfloat16 activations meet weights rounded to bfloat16, as they
 * would if W were expanded first; elsewhere both are widened to float32.
 *
 * An NF4 byte holds two neighbours, the first in the high nibble. The nibbles of 32 bytes are looked up as 32 even
 * and 32 odd positions, so x is put into that order once per call instead of the weights once per row.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(PORTABLE)
#define WIDE 1
#define VECTOR 64 /* bytes */
#define MOST_WIDTH 8
#if defined(__AVX512BF16__)
#define PAIRS 1 /* dot products of bfloat16 pairs */
#endif
#elif defined(__AVX2__) && !defined(PORTABLE)
#define VECTOR 32
#define MOST_WIDTH 4
#else
#define VECTOR 16
#define MOST_WIDTH 4
#endif
#if VECTOR > 16
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64
#define PARTS (4 * BLOCK / VECTOR)
#define HEIGHT 4 /* rows and tokens worked on at once, so that the sums fit the registers: 4 by 4, 2 by MOST_WIDTH */
#define WIDTH 4

typedef float lanes __attribute__((vector_size(VECTOR)));

enum kind { NF4, INT8, DENSE };

/* NF4: `bytes` two weights each; the constant of block b is constants[b], or with `codes` (one byte per block)
 * map[codes[b]] * constants[b / 256] + offset. int8: `bytes` one weight each and one constant per row. Dense: two bytes a
 * weight, in bfloat16. */
typedef struct {
    const uint8_t *bytes;
    const uint8_t *codes;
    const float *constants, *offset, *map, *levels;
    int64_t rows, columns;
} matrix;

/* 64 expanded weights: float32, or in the first two parts bfloat16. */
typedef struct {
    lanes part[PARTS];
} chunk;

/* The same in order, in memory. */
typedef union {
    float floats[64];
    uint16_t halves[64];
} flat;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t even(int64_t a) { return (a + 1) / 2 * 2; }

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
    const float *map = w->map, offset = *w->offset;
    for (int64_t at = first, end; at < first + count; at = end) { /* those of one group of 256 */
        const float scale = w->constants[at / 256];
        end = min(first + count, at / 256 * 256 + 256);
        for (int64_t i = at; i < end; i++) out[i - first] = map[w->codes[i]] * scale + offset;
    }
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
#elif VECTOR == 32
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(w->levels), _mm256_set1_ps(scale));
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(w->levels + 8), _mm256_set1_ps(scale));
    for (int i = 0; i < PARTS; i++) {
        __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + i % 4 * 8)));
        if (i < 4) index = _mm256_srli_epi32(index, 4);
        const __m256 of_low = _mm256_permutevar8x32_ps(low, index), of_high = _mm256_permutevar8x32_ps(high, index);
        const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        c.part[i] = (lanes)_mm256_blendv_ps(of_low, of_high, fourth_bit);
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

INLINE chunk expand_dense(const uint8_t *bytes, int half) {
    chunk c;
    if (half) {
        memcpy(&c, bytes, 2 * BLOCK);
        return c;
    }
#ifdef WIDE
    for (int i = 0; i < PARTS; i++)
        c.part[i] = (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bytes + i)), 16);
#elif VECTOR == 32
    for (int i = 0; i < PARTS; i++)
        c.part[i] = (lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)bytes + i)), 16);
#else
    flat values;
    for (int i = 0; i < BLOCK; i++) values.floats[i] = widen(((const uint16_t *)bytes)[i]);
    memcpy(&c, &values, sizeof c);
#endif
    return c;
}

INLINE lanes multiply_add(lanes a, lanes b, lanes sum) {
#ifdef WIDE
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif VECTOR == 32 && defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
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
#else
    const lanes sums[] = {a, b, c, d};
    four total = {0};
    for (int r = 0; r < (all ? 4 : 2); r++)
        for (int i = 0; i < VECTOR / 4; i++) total[r] += sums[r][i];
    return total;
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

/* Bytes of `count` weights of a row. */
INLINE int64_t stored(enum kind kind, int64_t count) {
    return kind == NF4 ? count / 2 : kind == INT8 ? count : 2 * count;
}

/* 64 weights of row `first` + r, while those of two groups of rows further down are fetched. */
INLINE chunk expand(enum kind kind, int half, const matrix *w, const room *own, int64_t first, int64_t r, int64_t block,
                    int64_t blocks) {
    const int64_t row_bytes = stored(kind, w->columns);
    const uint8_t *from = w->bytes + (first + r) * row_bytes + stored(kind, block * BLOCK);
    __builtin_prefetch(from + 2 * HEIGHT * row_bytes, 0, 2);
    if (kind == DENSE) {
        __builtin_prefetch(from + 2 * HEIGHT * row_bytes + 64, 0, 2);
        return expand_dense(from, half);
    }
    if (kind == NF4) return expand_nf4(w, from, own->scales[r * blocks + block], half);
    return expand_int8((block + 1) * BLOCK > w->columns ? own->rests + r * BLOCK : from, half);
}

INLINE void clear(int height, int width, lanes sums[HEIGHT][MOST_WIDTH]) {
    for (int r = 0; r < height; r++)
        for (int t = 0; t < width; t++) sums[r][t] = (lanes){0};
}

/* The sums of `height` rows from `first` and `width` tokens from `token`, scaled and shifted, into the output. */
INLINE void store(int height, int width, const product *p, lanes sums[HEIGHT][MOST_WIDTH], int64_t first,
                  int64_t token) {
    const int64_t rows = min(height, p->w->rows - first), tokens = min(width, p->tokens - token);
    const int all = height > 2;
    four scale = {1, 1, 1, 1}, bias = {0};
    for (int r = 0; r < rows && p->scale; r++) scale[r] = p->scale[first + r];
    for (int r = 0; r < rows && p->bias; r++)
        bias[r] = p->out_half ? widen(((const uint16_t *)p->bias)[first + r]) : ((const float *)p->bias)[first + r];
    for (int t = 0; t < width && t < tokens; t++) {
        const four total = totals(all, sums[0][t], sums[1][t], sums[2 * all][t], sums[3 * all][t]) * scale + bias;
        const int64_t at = (token + t) * p->w->rows + first;
        for (int r = 0; r < height && r < rows; r++)
            if (p->out_half)
                ((uint16_t *)p->out)[at + r] = narrow(total[r]);
            else
                ((float *)p->out)[at + r] = total[r];
    }
}

/* `height` rows from the r-th after `first` by `width` tokens from `token`, straight from the stored weights. */
INLINE void direct_tile(enum kind kind, int half, int height, int width, const product *p, const room *own,
                        int64_t first, int64_t r0, int64_t token) {
    const int64_t blocks = (p->w->columns + BLOCK - 1) / BLOCK, last = p->w->rows - 1 - first;
    const int parts = half ? 2 : PARTS;
    const char *x = p->x + token * p->stride;
    lanes sums[HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < blocks; b++, x += parts * VECTOR) {
        chunk c[HEIGHT];
        for (int r = 0; r < height; r++) /* past the end: the last row again, and not stored */
            c[r] = expand(kind, half, p->w, own, first, min(r0 + r, last), b, blocks);
        for (int i = 0; i < parts; i++)
            for (int r = 0; r < height; r++)
                for (int t = 0; t < width; t++)
                    sums[r][t] = dot(c[r].part[i], x + t * p->stride + i * VECTOR, sums[r][t], half);
    }
    store(height, width, p, sums, first + r0, token);
}

#ifdef PAIRS
/* The same for NF4 by bfloat16, two blocks at a time and for less: the levels themselves are looked up, rounded to
 * bfloat16, and a product's 16 sums, 8 of each block, meet the constants afterwards. Nibble i of the 32 words of 64
 * bytes is one lookup, which x is arranged for. */
INLINE void nibble_tile(int height, int width, const product *p, const room *own, int64_t first, int64_t r0,
                        int64_t token) {
    const matrix *w = p->w;
    const int64_t blocks = w->columns / BLOCK, row_bytes = w->columns / 2, last = w->rows - 1 - first;
    const __m256i once = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(w->levels));
    const __m512i levels = _mm512_broadcast_i64x4(once); /* twice: a lookup takes five bits, one of the next nibble */
    const __m512i of_block = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const char *x = p->x + token * p->stride;
    lanes sums[HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < blocks; b += 2, x += 4 * BLOCK) {
        __m512i part[HEIGHT][4];
        __m512 scale[HEIGHT];
        for (int r = 0; r < height; r++) {
            const int64_t row = min(r0 + r, last); /* past the end: the last row again, and not stored */
            const uint8_t *from = w->bytes + (first + row) * row_bytes + b * (BLOCK / 2);
            __builtin_prefetch(from + 2 * HEIGHT * row_bytes, 0, 2);
            const __m512i words = _mm512_loadu_si512(b + 1 < blocks ? from : own->rests + row * BLOCK);
            for (int i = 0; i < 4; i++)
                part[r][i] = _mm512_permutexvar_epi16(i ? _mm512_srli_epi16(words, 4 * i) : words, levels);
            const double *two = (const double *)(own->scales + row * blocks + b);
            scale[r] = _mm512_permutexvar_ps(of_block, _mm512_castpd_ps(_mm512_set1_pd(*two)));
        }
        for (int t = 0; t < width; t++) {
            lanes sum[HEIGHT];
            for (int r = 0; r < height; r++) sum[r] = (lanes){0};
            for (int i = 0; i < 4; i++)
                for (int r = 0; r < height; r++) sum[r] = dot((lanes)part[r][i], x + t * p->stride + 64 * i, sum[r], 1);
            for (int r = 0; r < height; r++) sums[r][t] = multiply_add(sum[r], (lanes)scale[r], sums[r][t]);
        }
    }
    store(height, width, p, sums, first + r0, token);
}
#endif

/* HEIGHT rows of `size` bytes from `first`, expanded in `panel`, by WIDTH tokens from `token`. */
INLINE void panel_tile(int half, const product *p, const char *panel, int64_t size, int64_t first, int64_t token) {
    const char *x = p->x + token * p->stride;
    lanes sums[HEIGHT][MOST_WIDTH];
    clear(HEIGHT, WIDTH, sums);
    for (int64_t at = 0; at < size; at += VECTOR)
        for (int r = 0; r < HEIGHT; r++) {
            lanes w;
            memcpy(&w, panel + r * p->stride + at, VECTOR);
            for (int t = 0; t < WIDTH; t++) sums[r][t] = dot(w, x + t * p->stride + at, sums[r][t], half);
        }
    store(HEIGHT, WIDTH, p, sums, first, token);
}

/* HEIGHT rows from `first` by all tokens. Of many tokens in bfloat16, whose products cost less than expanding the
 * weights again, all meet weights expanded once. */
INLINE void rows_of(enum kind kind, int half, const product *p, const room *own, int64_t first) {
    const matrix *w = p->w;
    const int64_t blocks = (w->columns + BLOCK - 1) / BLOCK, count = min(HEIGHT, w->rows - first);
    const int64_t row_bytes = stored(kind, w->columns), rest = row_bytes % BLOCK;
    if (kind == NF4) {
        expand_constants(w, first * blocks, count * blocks, own->scales);
        own->scales[count * blocks] = 0; /* read where a last block has no pair */
    }
    for (int64_t r = 0; r < count && rest; r++) {
        memset(own->rests + r * BLOCK, 0, BLOCK);
        memcpy(own->rests + r * BLOCK, w->bytes + (first + r + 1) * row_bytes - rest, rest);
    }
    if (half && p->tokens > MOST_WIDTH) {
        for (int64_t r = 0; r < HEIGHT; r++)
            for (int64_t b = 0; b < blocks; b++) {
                const chunk c = expand(kind, half, w, own, first, min(r, count - 1), b, blocks);
                memcpy(own->panel + r * p->stride + 2 * BLOCK * b, &c, 2 * BLOCK);
            }
        for (int64_t token = 0; token < p->tokens; token += WIDTH)
            panel_tile(half, p, own->panel, 2 * BLOCK * blocks, first, token);
#ifdef PAIRS
    } else if (kind == NF4 && half) {
        if (p->tokens > 2)
            for (int64_t r = 0; r < count; r += 2)
                if (p->tokens > WIDTH)
                    nibble_tile(2, MOST_WIDTH, p, own, first, r, 0);
                else
                    nibble_tile(2, WIDTH, p, own, first, r, 0);
        else if (p->tokens > 1)
            nibble_tile(HEIGHT, 2, p, own, first, 0, 0);
        else
            nibble_tile(HEIGHT, 1, p, own, first, 0, 0);
#endif
    } else if (p->tokens > MOST_WIDTH && MOST_WIDTH > WIDTH) { /* x no longer fits the first cache: read it less often */
        for (int64_t token = 0; token < p->tokens; token += WIDTH)
            direct_tile(kind, half, HEIGHT, WIDTH, p, own, first, 0, token);
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
ROWS_OF(dense_wide, DENSE, 0)
#ifdef PAIRS
ROWS_OF(nf4_half, NF4, 1)
ROWS_OF(int8_half, INT8, 1)
ROWS_OF(dense_half, DENSE, 1)
#else
#define nf4_half nf4_wide
#define int8_half int8_wide
#define dense_half dense_wide
#endif

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

/* How x lies beside the weights of a pair of blocks: as it is, per block even positions before odd ones, or per pair
 * the positions of the four nibbles of 32 little-endian words. */
enum order { NATURAL, SPLIT, NIBBLES };

INLINE int place(enum order order, int i) { /* of what comes to position i of 128 */
    if (order == SPLIT) return (i & 64) + 2 * (i & 31) + (i >> 5 & 1);
    if (order == NIBBLES) return 4 * (i & 31) + (i >> 5 ^ 1);
    return i;
}

/* x widened if need be, padded with zeros to pairs of blocks, in order. */
INLINE void arrange(enum order order, int half, const request *q, char *to, int64_t stride) {
    const int64_t columns = q->w.columns, size = half ? 2 : 4;
    for (int64_t t = 0; t < q->tokens; t++)
        for (int64_t at = 0; at * size < stride; at += 2 * BLOCK) {
            const int64_t count = min(2 * BLOCK, columns - at), from = t * columns + at;
            uint16_t halves[2 * BLOCK] = {0}, *half_to = (uint16_t *)(to + t * stride) + at;
            float wide[2 * BLOCK] = {0}, *wide_to = (float *)(to + t * stride) + at;
            if (q->x_half)
                memcpy(halves, (const uint16_t *)q->x + from, 2 * count);
            else
                memcpy(wide, (const float *)q->x + from, 4 * count);
            for (int i = 0; i < 2 * BLOCK && half; i++) half_to[i] = halves[place(order, i)];
            for (int i = 0; i < 2 * BLOCK && q->x_half && !half; i++) wide[i] = widen(halves[i]);
            for (int i = 0; i < 2 * BLOCK && !half; i++) wide_to[i] = wide[place(order, i)];
        }
}

/* Returns 1 where memory is short, else 0. NF4 and dense weights need columns that are a multiple of
 * 64. */
int matmul(const request *q) {
    const enum kind kind = q->kind;
    const int64_t rows = q->w.rows, columns = q->w.columns, tokens = q->tokens;
#ifdef PAIRS
    const int half = q->x_half;
#else
    const int half = 0;
#endif
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, stride = even(blocks) * BLOCK * (half ? 2 : 4);
    const int64_t padded = (tokens + MOST_WIDTH - 1) / MOST_WIDTH * MOST_WIDTH;
    const int64_t each = HEIGHT * (stride + BLOCK + (blocks * 4 + 64) / 64 * 64); /* bytes of a thread's room */
    char *arranged = aligned_alloc(64, padded * stride + q->threads * each);
    if (!arranged) return 1;
    if (kind != NF4)
        arrange(NATURAL, half, q, arranged, stride);
    else if (half && tokens <= MOST_WIDTH)
        arrange(NIBBLES, half, q, arranged, stride);
    else
        arrange(SPLIT, half, q, arranged, stride);
    memset(arranged + tokens * stride, 0, (padded - tokens) * stride);
    const float *scale = kind == INT8 ? q->w.constants : NULL;
    const product p = {&q->w, arranged, stride, tokens, scale, q->bias, q->out, q->x_half};
    void (*const runs[][2])(const product *, const room *, int64_t) = {
        {nf4_wide, nf4_half}, {int8_wide, int8_half}, {dense_wide, dense_half}};
#pragma omp parallel num_threads(q->threads) if (q->threads > 1)
    {
        char *panel = arranged + padded * stride + THREAD * each;
        uint8_t *rests = (uint8_t *)panel + HEIGHT * stride;
        const room own = {panel, (float *)(rests + HEIGHT * BLOCK), rests};
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += HEIGHT) runs[kind][half](&p, &own, first);
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
