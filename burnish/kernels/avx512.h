/* bfloat16 rows as vectors of 16 float32, on a processor with AVX-512. Where it has AVX512-BF16 too, that rounds and
   multiplies; elsewhere float32 arithmetic does. */

#pragma once

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define AVX512 1

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef int64_t big;

INLINE __m512 load(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

/* The low and the high halves of 32-bit pairs of bfloat16. */
INLINE __m512 low_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

INLINE __m512 high_half(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

#ifdef __AVX512BF16__
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
/* To the nearest, ties to even; a NaN stays one. */
INLINE __m256i narrow(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
#endif

INLINE void store(bf16 *out, __m512 x) { _mm256_storeu_si256((__m256i *)out, narrow(x)); }

/* The first `count` of 16 lanes; loads and stores of a row's last piece. */
INLINE __mmask16 lanes(big count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

INLINE __m512 load_part(const bf16 *x, __mmask16 part) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, x)), 16));
}

INLINE void store_part(bf16 *out, __mmask16 part, __m512 x) { _mm256_mask_storeu_epi16(out, part, narrow(x)); }

/* The same from element `at` of numbers that are float32 (`wide`) or bfloat16. */
INLINE __m512 get(const void *x, big at, __mmask16 part, int wide) {
    return wide ? _mm512_maskz_loadu_ps(part, (const float *)x + at) : load_part((const bf16 *)x + at, part);
}

INLINE void put(void *out, big at, __mmask16 part, __m512 x, int wide) {
    if (wide) _mm512_mask_storeu_ps((float *)out + at, part, x);
    else store_part((bf16 *)out + at, part, x);
}

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* this order keeps a NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#endif
