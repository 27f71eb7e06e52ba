/* Vectors of 16 float32 and what the kernels do with them: with AVX-512, or with AVX2 and FMA as two vectors of 8.
   Numbers in memory are float32 or bfloat16; products read bfloat16 in 32-bit pairs. Where there is AVX512-BF16, that
   rounds and multiplies; elsewhere float32 arithmetic does. */

#pragma once

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VECTORS 4 /* in a tile of products, by 4 rows: what the registers hold */
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTORS 1
#endif

#ifdef VECTORS

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef int64_t big;

#if VECTORS == 4

typedef __m512 floats;
typedef __m512i pairs; /* the low halves hold the first of two */
typedef __mmask16 mask;

#define TWO(NAME, OF) INLINE floats NAME(floats a, floats b) { return _mm512_##OF(a, b); }
#define THREE(NAME, OF) INLINE floats NAME(floats a, floats b, floats c) { return _mm512_##OF(a, b, c); }

INLINE floats spread(float x) { return _mm512_set1_ps(x); }

INLINE floats zeros(void) { return _mm512_setzero_ps(); }

INLINE float lowest_lane(floats x) { return _mm512_cvtss_f32(x); }

INLINE float total_of(floats x) { return _mm512_reduce_add_ps(x); }

INLINE float largest_of(floats x) { return _mm512_reduce_max_ps(x); }

INLINE floats choose(mask part, floats x, floats other) { return _mm512_mask_mov_ps(other, part, x); }

INLINE floats load_floats(const float *x) { return _mm512_loadu_ps(x); }

INLINE floats load_floats_part(const float *x, mask part) { return _mm512_maskz_loadu_ps(part, x); }

INLINE void store_floats(float *out, floats x) { _mm512_storeu_ps(out, x); }

INLINE void store_floats_part(float *out, mask part, floats x) { _mm512_mask_storeu_ps(out, part, x); }

INLINE floats load(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE floats load_part(const bf16 *x, mask part) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, x)), 16));
}

#ifdef __AVX512BF16__
INLINE __m256i narrow(floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
/* To the nearest, ties to even; a NaN stays one. */
INLINE __m256i narrow(floats x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
#endif

INLINE void store(bf16 *out, floats x) { _mm256_storeu_si256((__m256i *)out, narrow(x)); }

INLINE void store_part(bf16 *out, mask part, floats x) { _mm256_mask_storeu_epi16(out, part, narrow(x)); }

INLINE pairs load_pairs(const uint32_t *x) { return _mm512_loadu_si512(x); }

INLINE pairs spread_pair(uint32_t x) { return _mm512_set1_epi32((int)x); }

INLINE void store_pairs(uint32_t *out, floats first, floats second) {
    __m512i low = _mm512_cvtepu16_epi32(narrow(first)), high = _mm512_cvtepu16_epi32(narrow(second));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* sum + the products of both halves. */
INLINE floats dot_pairs(floats sum, pairs left, pairs right) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512i a = _mm512_and_epi32(left, high), b = _mm512_and_epi32(right, high);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    a = _mm512_slli_epi32(left, 16), b = _mm512_slli_epi32(right, 16);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#endif
}

/* Which of 16 bytes, of `part` of them, are not 0. */
INLINE mask set_bytes(const uint8_t *x, mask part) {
    return _mm_mask_test_epi8_mask(part, _mm_maskz_loadu_epi8(part, x), _mm_set1_epi8(-1));
}

INLINE floats whole(floats x) { return _mm512_roundscale_ps(x, 8); }

/* x 2^n of whole n. */
INLINE floats times_power(floats x, floats n) { return _mm512_scalef_ps(x, n); }

#else

typedef struct {
    __m256 low, high;
} floats;
typedef struct {
    __m256i low, high;
} pairs;
typedef uint16_t mask; /* a bit a lane */

#define TWO(NAME, OF) \
    INLINE floats NAME(floats a, floats b) { return (floats){_mm256_##OF(a.low, b.low), _mm256_##OF(a.high, b.high)}; }
#define THREE(NAME, OF) \
    INLINE floats NAME(floats a, floats b, floats c) { \
        return (floats){_mm256_##OF(a.low, b.low, c.low), _mm256_##OF(a.high, b.high, c.high)}; \
    }

INLINE floats spread(float x) { return (floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

INLINE floats zeros(void) { return spread(0); }

INLINE float lowest_lane(floats x) { return _mm256_cvtss_f32(x.low); }

/* In AVX-512's order. */
INLINE float total_of(floats x) {
    __m256 eight = _mm256_add_ps(x.high, x.low);
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float largest_of(floats x) {
    __m256 eight = _mm256_max_ps(x.high, x.low);
    __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE floats choose(mask part, floats x, floats other) {
    const __m256i bits = _mm256_set1_epi32(part), first = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i second = _mm256_slli_epi32(first, 8);
    __m256 low = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, first), first));
    __m256 high = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, second), second));
    return (floats){_mm256_blendv_ps(other.low, x.low, low), _mm256_blendv_ps(other.high, x.high, high)};
}

INLINE floats load_floats(const float *x) { return (floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }

INLINE void store_floats(float *out, floats x) {
    _mm256_storeu_ps(out, x.low);
    _mm256_storeu_ps(out + 8, x.high);
}

INLINE __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

INLINE floats load(const bf16 *x) {
    return (floats){widen(_mm_loadu_si128((const __m128i *)x)), widen(_mm_loadu_si128((const __m128i *)x + 1))};
}

/* bfloat16 in the high halves, the low ones being left over: to the nearest, ties to even; a NaN stays one. */
INLINE __m256i rounded(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
}

INLINE void store(bf16 *out, floats x) {
    __m256i low = _mm256_srli_epi32(rounded(x.low), 16), high = _mm256_srli_epi32(rounded(x.high), 16);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}

/* A part in memory is its first lanes; all but a row's last piece are whole. */
#define PARTLY(LOAD_PART, LOAD, STORE_PART, STORE, TYPE) \
    INLINE floats LOAD_PART(const TYPE *x, mask part) { \
        if (part == 0xffff) return LOAD(x); \
        TYPE room[16] = {0}; \
        memcpy(room, x, __builtin_popcount(part) * sizeof *x); \
        return LOAD(room); \
    } \
    INLINE void STORE_PART(TYPE *out, mask part, floats x) { \
        if (part == 0xffff) { \
            STORE(out, x); \
            return; \
        } \
        TYPE room[16]; \
        STORE(room, x); \
        memcpy(out, room, __builtin_popcount(part) * sizeof *out); \
    }
PARTLY(load_part, load, store_part, store, bf16)
PARTLY(load_floats_part, load_floats, store_floats_part, store_floats, float)

INLINE pairs load_pairs(const uint32_t *x) {
    return (pairs){_mm256_loadu_si256((const __m256i *)x), _mm256_loadu_si256((const __m256i *)x + 1)};
}

INLINE pairs spread_pair(uint32_t x) { return (pairs){_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)}; }

INLINE void store_pairs(uint32_t *out, floats first, floats second) {
    __m256i low = _mm256_blend_epi16(_mm256_srli_epi32(rounded(first.low), 16), rounded(second.low), 0xaa);
    __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(rounded(first.high), 16), rounded(second.high), 0xaa);
    _mm256_storeu_si256((__m256i *)out, low);
    _mm256_storeu_si256((__m256i *)out + 1, high);
}

INLINE __m256 dot_of_eight(__m256 sum, __m256i left, __m256i right) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256i a = _mm256_and_si256(left, high), b = _mm256_and_si256(right, high);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
    a = _mm256_slli_epi32(left, 16), b = _mm256_slli_epi32(right, 16);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
}

INLINE floats dot_pairs(floats sum, pairs left, pairs right) {
    return (floats){dot_of_eight(sum.low, left.low, right.low), dot_of_eight(sum.high, left.high, right.high)};
}

INLINE mask set_bytes(const uint8_t *x, mask part) {
    uint8_t room[16] = {0};
    if (part != 0xffff) x = memcpy(room, x, __builtin_popcount(part));
    __m128i clear = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)x), _mm_setzero_si128());
    return (mask)~_mm_movemask_epi8(clear);
}

INLINE floats whole(floats x) { return (floats){_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }

/* In two factors, as 2^n may be out of range where x 2^n is not; beyond 2^-252 and 2^252 it is 0 or infinite. */
INLINE __m256 eight_times_power(__m256 x, __m256 n) {
    const __m256i most = _mm256_set1_epi32(252), least = _mm256_set1_epi32(-252), one = _mm256_set1_epi32(127);
    __m256i power = _mm256_max_epi32(least, _mm256_min_epi32(most, _mm256_cvtps_epi32(n)));
    __m256i half = _mm256_srai_epi32(power, 1), rest = _mm256_sub_epi32(power, half);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23)));
}

INLINE floats times_power(floats x, floats n) {
    return (floats){eight_times_power(x.low, n.low), eight_times_power(x.high, n.high)};
}

#endif

TWO(add, add_ps)
TWO(sub, sub_ps)
TWO(mul, mul_ps)
TWO(divide, div_ps)
TWO(max, max_ps)      /* b where one is NaN */
THREE(fmadd, fmadd_ps)   /* ab + c */
THREE(fmsub, fmsub_ps)   /* ab - c */
THREE(fnmadd, fnmadd_ps) /* c - ab */

/* The first `count` of 16 lanes; loads and stores of a row's last piece. */
INLINE mask lanes(big count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

/* From element `at` of numbers that are float32 (`wide`) or bfloat16, zeros elsewhere. */
INLINE floats get(const void *x, big at, mask part, int wide) {
    return wide ? load_floats_part((const float *)x + at, part) : load_part((const bf16 *)x + at, part);
}

INLINE void put(void *out, big at, mask part, floats x, int wide) {
    if (wide) store_floats_part((float *)out + at, part, x);
    else store_part((bf16 *)out + at, part, x);
}

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE floats exponential(floats x) {
    x = max(spread(-200.0f), x); /* this order keeps a NaN */
    floats n = whole(mul(x, spread(1.44269504f)));
    floats r = fnmadd(n, spread(0.693359375f), x);
    r = fnmadd(n, spread(-2.12194440e-4f), r);
    floats p = spread(1.0f / 720);
    p = fmadd(p, r, spread(1.0f / 120));
    p = fmadd(p, r, spread(1.0f / 24));
    p = fmadd(p, r, spread(1.0f / 6));
    p = fmadd(p, r, spread(0.5f));
    p = fmadd(p, r, spread(1.0f));
    p = fmadd(p, r, spread(1.0f));
    return times_power(p, n);
}

#endif
