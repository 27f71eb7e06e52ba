/* Weights of eight bits in floating point, E4M3: a sign, four bits of exponent, of which the bias is 7, and three of mantissa;
 * exponent 0 has no leading one, and all seven ones are no number.
 *
 * Seven bits to the left, the lower seven are half precision's of the same number divided by FP8_UNIT, since its bias is
 * 15: its conversion to float32 is exact, subnormal numbers included, also where arithmetic takes these for zero. What
 * these numbers are divided by is in their row's scale.
 */

#pragma once
#include "weights.h"

/* 64 weights divided by FP8_UNIT, in order. */
INLINE chunk expand_fp8(const uint8_t *bytes) {
    chunk c;
#ifdef WIDE
    const __m512i all = _mm512_set1_epi16(0x7fff), no_second = _mm512_set1_epi16((short)0xbfff);
    EVERY(i, 2) {
        const __m256i eight = _mm256_loadu_si256((const __m256i *)bytes + i);
        const __mmask32 none = _mm256_cmpeq_epi8_mask(_mm256_or_si256(eight, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-1));
        const __m512i two_signs = _mm512_slli_epi16(_mm512_cvtepi8_epi16(eight), 7);
        const __m512i half = _mm512_mask_mov_epi16(_mm512_and_si512(two_signs, no_second), none, all);
        c.part[2 * i] = (lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
        c.part[2 * i + 1] = (lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
#elif VECTOR == 32 && defined(__F16C__)
    const __m256i seven = _mm256_set1_epi8(127);
    EVERY(i, 2) {
        const __m256i eight = _mm256_loadu_si256((const __m256i *)bytes + i), size = _mm256_and_si256(eight, seven);
        const __m256i low = _mm256_or_si256(size, _mm256_cmpeq_epi8(size, seven)); /* no number: eight ones */
        const __m256i high = _mm256_srli_epi16(eight, 7); /* its lowest bit is the sign */
        const __m256i halves[] = {_mm256_slli_epi16(_mm256_unpacklo_epi8(low, high), 7),
                                  _mm256_slli_epi16(_mm256_unpackhi_epi8(low, high), 7)};
        EVERY(j, 2) {
            c.part[4 * i + j] = (lanes)_mm256_cvtph_ps(_mm256_castsi256_si128(halves[j]));
            c.part[4 * i + 2 + j] = (lanes)_mm256_cvtph_ps(_mm256_extracti128_si256(halves[j], 1));
        }
    }
#elif defined(__aarch64__) && VECTOR == 16
    EVERY(i, 4) { /* as above */
        const uint8x16_t eight = vld1q_u8(bytes + 16 * i), size = vandq_u8(eight, vdupq_n_u8(127));
        const uint8x16_t low = vorrq_u8(size, vceqq_u8(size, vdupq_n_u8(127))), high = vshrq_n_u8(eight, 7);
        const float16x8_t first = vreinterpretq_f16_u16(vshlq_n_u16(vreinterpretq_u16_u8(vzip1q_u8(low, high)), 7));
        const float16x8_t second = vreinterpretq_f16_u16(vshlq_n_u16(vreinterpretq_u16_u8(vzip2q_u8(low, high)), 7));
        c.part[4 * i] = (lanes)vcvt_f32_f16(vget_low_f16(first));
        c.part[4 * i + 1] = (lanes)vcvt_high_f32_f16(first);
        c.part[4 * i + 2] = (lanes)vcvt_f32_f16(vget_low_f16(second));
        c.part[4 * i + 3] = (lanes)vcvt_high_f32_f16(second);
    }
#else
    flat values;
    for (int i = 0; i < BLOCK; i++) { /* a whole number by a power of two */
        const uint32_t size = bytes[i] & 127, exponent = size < 8 ? 1 : size >> 3, power = (exponent + 127 - 18) << 23;
        float value;
        memcpy(&value, &power, 4);
        value *= (float)(int32_t)(size - 8 * (exponent - 1));
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits |= (uint32_t)(bytes[i] & 128) << 24 | (size == 127 ? 0x7fc00000 : 0);
        memcpy(values.floats + i, &bits, 4);
    }
    memcpy(&c, &values, sizeof c);
#endif
    return c;
}

/* The same of `count` weights of a row, into memory; not inlined, for the code's size. */
static __attribute__((noinline, unused)) void expand_fp8_row(const uint8_t *from, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        const chunk c = expand_fp8(from + i);
        memcpy(out + i, &c, sizeof c);
    }
    if (i == count) return;
    uint8_t padded[BLOCK] = {0};
    memcpy(padded, from + i, count - i);
    const chunk c = expand_fp8(padded);
    memcpy(out + i, &c, 4 * (count - i));
}
