/* Stored weights, and what a product of few tokens with them is made of. */

#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && !defined(PORTABLE)
#define WIDE 1
#define VECTOR 64 /* bytes */
#define MOST_WIDTH 8
#if defined(__AVX512BF16__)
#define PAIRS 1 /* dot products of bfloat16 pairs */
#endif
#if defined(__AVX512VNNI__)
#define WHOLE_NUMBERS 1 /* of 16-bit integers */
#endif
#elif defined(__AVX2__) && !defined(PORTABLE)
#define VECTOR 32
#define MOST_WIDTH 4
#define WHOLE_NUMBERS 1
#else
#define VECTOR 16
#define MOST_WIDTH 4
#endif
#if VECTOR > 16
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#define HEIGHT 4 /* rows and tokens worked on at once, so that the sums fit the registers: 4 by 2, 2 by 4 or MOST_WIDTH */
#define MOST_HEIGHT 8 /* of one token; without AVX-512 of several, HEIGHT after HEIGHT */
#define WIDTH 4
#define MOST_REST 128 /* bytes of a row read at once */
#define UNIT 128 /* rows dealt out to a thread at a time */
#define MOST_FEW 32 /* tokens; more are multiplied by gemm.c */
#define EVERY(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

typedef float lanes __attribute__((vector_size(VECTOR)));

/* From Q8_0 on GGUF's: gguf.h. */
enum kind { NF4, INT8, DENSE, FLOATS, GROUPED, GROUPED_2, GROUPED_3, GROUPED_8, FP8, Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

/* NF4: `bytes` two weights each; the constant of block b is constants[b], or with `codes` (one byte per block)
 * map[codes[b]] * constants[b / 256] + offset. int8 and FP8 (fp8.h): `bytes` one weight each and one constant per row.
 * Dense: two bytes a weight, in bfloat16, or four. Grouped: see grouped.h. GGUF: rows of whole blocks. */
typedef struct {
    const uint8_t *bytes;
    const uint8_t *codes;
    const float *constants, *offset, *map, *levels;
    int64_t rows, columns;
} matrix;

/* How activations and weights are multiplied. */
enum arithmetic { WIDENED, HALVES, WHOLE };

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

INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

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

/* An index as the compiler cannot foresee it: it would make gather instructions of a table's look-ups, which cost many
 * times as much on processors whose microcode closes a leak in them. */
INLINE uint64_t one_by_one(uint64_t index) {
    __asm__("" : "+r"(index));
    return index;
}

#include "gguf.h"

/* Bytes of `count` weights of a row. */
INLINE int64_t stored(enum kind kind, int64_t count) {
    if (kind >= Q8_0) return gguf_bytes(kind, count);
    if (kind == NF4 || kind == GROUPED) return count / 2;
    if (kind == GROUPED_2 || kind == GROUPED_3) return count * (kind == GROUPED_2 ? 2 : 3) / 8;
    return kind == INT8 || kind == GROUPED_8 || kind == FP8 ? count : kind == DENSE ? 2 * count : 4 * count;
}

#define FP8_UNIT 256.0f

/* What the sums of a row are multiplied by. */
INLINE float scale_of_row(enum kind kind, const matrix *w, int64_t row) {
    return kind == INT8 ? w->constants[row] : kind == FP8 ? w->constants[row] * FP8_UNIT : 1;
}

INLINE lanes multiply_add(lanes a, lanes b, lanes sum) {
#ifdef WIDE
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif VECTOR == 32 && defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (lanes)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
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
        for (int64_t i = at; i < end; i++) out[i - first] = map[one_by_one(w->codes[i])];
        for (int64_t i = at; i < end; i++) out[i - first] = out[i - first] * scale + offset;
    }
}

/* 32 bytes of NF4: even positions first, then odd ones. */
INLINE chunk expand_nf4(const float *levels, const uint8_t *bytes, float scale) {
    chunk c;
#ifdef WIDE
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    for (int i = 0; i < 2; i++) {
        __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes + i));
        c.part[i] = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
        c.part[2 + i] = (lanes)_mm512_permutexvar_ps(words, table);
    }
#elif VECTOR == 32
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(scale));
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(levels + 8), _mm256_set1_ps(scale));
    for (int i = 0; i < PARTS; i++) {
        __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + i % 4 * 8)));
        if (i < 4) index = _mm256_srli_epi32(index, 4);
        const __m256 of_low = _mm256_permutevar8x32_ps(low, index), of_high = _mm256_permutevar8x32_ps(high, index);
        const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        c.part[i] = (lanes)_mm256_blendv_ps(of_low, of_high, fourth_bit);
    }
#else
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = levels[i] * scale;
    flat split;
    for (int i = 0; i < 32; i++) split.floats[i] = table[bytes[i] >> 4];
    for (int i = 0; i < 32; i++) split.floats[32 + i] = table[bytes[i] & 15];
    memcpy(&c, &split, sizeof c);
#endif
    return c;
}

typedef struct {
    const matrix *w;
    const char *x;      /* arranged activations */
    int64_t stride;     /* bytes from a token to the next in x */
    int64_t tokens;
    const void *bias;   /* of the output's dtype; may be null */
    void *out;
    int out_half;
    int adds; /* to what `out`, in float32, holds */
    int64_t sums; /* as in `meeting` */
} product;

/* How x lies beside the weights: as it is; of 64 positions the even ones before the odd ones; of 128 the four nibbles of
 * 32 little-endian words or the eight of 16; of 32 the even ones before the odd ones; of 64 the low nibbles of bytes 0 to 7,
 * 16 to 23, 8 to 15 and 24 to 31, then the high ones. */
enum order { NATURAL, SPLIT, NIBBLES, LONG_NIBBLES, EVENS, SPREAD };

/* How `tokens` tokens of x meet a matrix. */
typedef struct {
    enum order order;
    enum arithmetic how;
    int64_t stride;     /* bytes of an arranged token */
    int64_t arranged;   /* bytes of all, padded to whole tiles */
    int64_t each;       /* bytes of a thread's room */
    int64_t sums;       /* where an arranged token has its sums of 32 positions, 0 where it has none */
} meeting;

#define SHARED __attribute__((visibility("hidden")))

/* How x (tokens, columns), of bfloat16 where x_half, meets a matrix. */
SHARED meeting meet(enum kind kind, int64_t columns, int x_half, int64_t tokens);

/* x as the product takes it, in bfloat16 where stored_half, padded with zeros to pairs of blocks and whole tiles. By a
 * team. */
SHARED void arrange(const meeting *m, const void *x, int stored_half, int64_t tokens, int64_t columns, char *to);

/* The rows of a product of arranged tokens, dealt out to a team; `rooms` are `meeting.each` bytes a thread. It ends
 * without waiting. */
SHARED void multiply(enum kind kind, const meeting *m, const product *p, char *rooms);

/* As `matmul`, for many tokens, by a team of its own. */
SHARED int multiply_many(enum kind kind, const matrix *w, const void *x, int half, int64_t tokens, const void *bias,
                         void *out, int64_t threads);
