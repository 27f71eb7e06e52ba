/* Products of weights of two, three or eight bits in groups with activations of 16 bits, as in whole.h.
 *
 * Two bits of 128 weights are 32 bytes; the j-th pairs of bits of these are part j, and so NIBBLES puts x. Bytes 8 i to
 * 8 i + 7 belong to the i-th unit in every part, so that the parts' products are summed before they meet the scales. Eight
 * bits are in order, and each part of 32 is a unit; where four have one scale, they are summed as well.
 */

#pragma once
#include "whole.h"

#ifdef WHOLE_NUMBERS
/* The codes of 128 weights less the middle one, in four parts: from their bytes, and of three bits the lowest ones'. */
INLINE void code_parts(enum kind kind, const uint8_t *from, const uint8_t *bits, words *parts) {
    const __m256i middle = _mm256_set1_epi8((char)middle_of(kind)), six = _mm256_set1_epi8(6), one = _mm256_set1_epi8(1);
    if (kind == GROUPED_8) {
        FETCH(from);
        FETCH(from + 64);
        EVERY(j, 4) parts[j] = of_signed(_mm256_xor_si256(_mm256_loadu_si256((const __m256i *)from + j), middle));
        return;
    }
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)from);
    __m256i lowest = one;
    FETCH(from);
    if (kind == GROUPED_3) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)bits));
        lowest = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)); /* of each nibble's byte the lower four */
        FETCH(bits);
    }
    EVERY(j, 4) {
        if (kind == GROUPED_2) {
            const __m256i code = _mm256_and_si256(j ? _mm256_srli_epi16(pairs, 2 * j) : pairs, _mm256_set1_epi8(3));
            parts[j] = of_signed(_mm256_sub_epi8(code, middle));
        } else {
            const __m256i upper = j ? _mm256_srli_epi16(pairs, 2 * j - 1) : _mm256_slli_epi16(pairs, 1);
            const __m256i lower = _mm256_and_si256(j ? _mm256_srli_epi16(lowest, j) : lowest, one);
            parts[j] = of_signed(_mm256_sub_epi8(_mm256_or_si256(_mm256_and_si256(upper, six), lower), middle));
        }
    }
}

/* sum + four parts by 128 activations, each position's product by its unit's of four scales, which are the same where
 * `alike`. */
INLINE lanes by_units(enum kind kind, int alike, const words *parts, const char *x, const float *scales, lanes sum) {
    if (kind == GROUPED_8 && !alike) {
        EVERY(j, 4) sum = multiply_add(product_of(parts[j], words_at(x + 64 * j)), scales[j] - (lanes){0}, sum);
        return sum;
    }
#ifdef WIDE
    __m512 scale = _mm512_set1_ps(scales[0]);
    if (!alike) {
        const __m512i of_unit = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        scale = _mm512_permutexvar_ps(of_unit, _mm512_broadcast_f32x4(_mm_loadu_ps(scales)));
    }
    __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    EVERY(j, 4) both[j % 2] = _mm512_dpwssd_epi32(both[j % 2], parts[j], words_at(x + 64 * j));
    return multiply_add((lanes)_mm512_cvtepi32_ps(_mm512_add_epi32(both[0], both[1])), (lanes)scale, sum);
#else
    __m256i low = _mm256_setzero_si256(), high = low;
    EVERY(j, 4) {
        const words values = words_at(x + 64 * j);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(parts[j].low, values.low));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(parts[j].high, values.high));
    }
    if (alike) return multiply_add(floats_of(_mm256_add_epi32(low, high)), scales[0] - (lanes){0}, sum);
    const __m256 first = _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
    const __m256 second = _mm256_set_m128(_mm_set1_ps(scales[3]), _mm_set1_ps(scales[2]));
    return multiply_add(floats_of(high), (lanes)second, multiply_add(floats_of(low), (lanes)first, sum));
#endif
}

INLINE void codes_tile_of(enum kind kind, int alike, int height, int width, const product *p, const group *g, int64_t r0,
                          int64_t token) {
    const int64_t pairs = (g->blocks + 1) / 2, columns = p->w->columns;
    const char *x = p->x + token * p->stride, *rates = x + 4 * BLOCK * pairs;
    const lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t pair = 0; pair < pairs; pair++, x += 4 * BLOCK, rates += 4)
        EVERY(r, height) {
            words parts[4];
            const uint8_t *from = rows.bytes[r] + pair * (kind == GROUPED_8 ? 2 * BLOCK : BLOCK / 2);
            const uint8_t *bits = rows.bytes[r] + columns / 4 + pair * (BLOCK / 4);
            if (__builtin_expect(pair >= g->blocks / 2, 0)) from = rows.rests[r], bits = from + LOWEST;
            code_parts(kind, from, bits, parts);
            EVERY(t, width) {
                float rate;
                memcpy(&rate, rates + t * p->stride, 4);
                const lanes sum = by_units(kind, alike, parts, x + t * p->stride, rows.scales[r] + 4 * pair, (lanes){0});
                sums[r][t] = multiply_add(sum, rate - (lanes){0}, sums[r][t]);
            }
        }
    store(kind, height, width, p, sums, g, r0, token);
}

/* `height` rows from the r0-th by `width` tokens from `token`. */
INLINE void codes_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0,
                       int64_t token) {
    const int64_t size = (int64_t)p->w->levels[16];
    if (kind == GROUPED_8 && (size % (2 * BLOCK) == 0 || size == p->w->columns))
        codes_tile_of(kind, 1, height, width, p, g, r0, token);
    else
        codes_tile_of(kind, 0, height, width, p, g, r0, token);
}
#endif
