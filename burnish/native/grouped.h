/* Four-bit weights in groups: `bytes` two weights each, the first in the high nibble; `constants` a float16 scale for each
 * group of a row and `codes` its zero point, null where all are 8; `levels` sixteen numbers, -8 to 7, and the size of a
 * group, a multiple of GROUP_UNIT or the whole row.
 *
 * A weight is (level + 8 - zero) * scale. The levels are multiplied as NF4's are, with a scale for each GROUP_UNIT; what
 * the zero points add is a product with the sums of GROUP_UNIT activations. */

#pragma once
#include "weights.h"

#define GROUP_UNIT 32
#define GROUPED_LEVEL 512.0f /* that stands for 1 among whole numbers, where NF4's is 8191 */

/* Floats that a thread keeps for a row's constants: for GROUPED the scales of all units, then what zero points add. */
INLINE int64_t constants_of(enum kind kind, int64_t blocks) { return kind == GROUPED ? 4 * even(blocks) : blocks + 1; }

/* A row's constants, unit by unit. */
INLINE void expand_groups(const matrix *w, int64_t row, int64_t blocks, enum arithmetic how, float *out) {
    const int64_t size = (int64_t)w->levels[16], groups = (w->columns + size - 1) / size, units = 2 * even(blocks);
    const uint16_t *scales = (const uint16_t *)w->constants + row * groups;
    const uint8_t *zeros = w->codes ? w->codes + row * groups : NULL;
    const float level = how == WHOLE ? 8191.0f / GROUPED_LEVEL : 1;
    int64_t unit = 0;
    __builtin_prefetch(scales + 4 * groups); /* of a row soon to come */
    if (zeros) __builtin_prefetch(zeros + 4 * groups);
#ifdef WIDE
    const int64_t apart = size / GROUP_UNIT; /* units of a group */
    if (size % GROUP_UNIT == 0 && apart <= 16 && (apart & (apart - 1)) == 0) {
        const int shift = __builtin_ctzll(apart);
        const __m512i counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i of_unit = _mm512_srl_epi32(counted, _mm_cvtsi32_si128(shift));
        for (; unit < units; unit += 16) { /* from 16 groups at most; beyond the last they are 0 */
            const int64_t g = unit >> shift, left = groups - g;
            const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const __mmask16 kept = units - unit >= 16 ? 0xffff : (1 << (units - unit)) - 1;
            const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + g));
            const __m512 out_scale = _mm512_mul_ps(scale, _mm512_set1_ps(level));
            _mm512_mask_storeu_ps(out + unit, kept, _mm512_permutexvar_ps(of_unit, out_scale));
            if (zeros) {
                const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, zeros + g)));
                const __m512 added = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_set1_ps(8), zero));
                _mm512_mask_storeu_ps(out + units + unit, kept, _mm512_permutexvar_ps(of_unit, added));
            }
        }
        return;
    }
#endif
    for (int64_t g = 0; g < groups; g++) {
        const float scale = from_half(scales[g]), shift = zeros ? 8.0f - zeros[g] : 0;
        const int64_t end = min((g + 1) * size, w->columns) / GROUP_UNIT;
        for (; size % (4 * GROUP_UNIT) == 0 && unit < end; unit += 4) /* a last one's rest meets zeros */
            for (int i = 0; i < 4; i++) {
                out[unit + i] = scale * level;
                if (zeros) out[units + unit + i] = scale * shift;
            }
        for (; unit < end; unit++) {
            out[unit] = scale * level;
            if (zeros) out[units + unit] = scale * shift;
        }
    }
    for (; unit < units; unit++) out[unit] = out[units + unit] = 0;
}

/* What the zero points add to a row's product with a token, whose sums of units are given. */
INLINE float of_zeros(const float *constants, const char *sums, int64_t blocks) {
    const int64_t units = 2 * even(blocks);
    const float *x = (const float *)sums;
    lanes total = {0};
    int64_t i = 0;
    for (; i + VECTOR / 4 <= units; i += VECTOR / 4) {
        lanes a, b;
        memcpy(&a, constants + units + i, VECTOR);
        memcpy(&b, x + i, VECTOR);
        total += a * b;
    }
    float rest = 0;
    for (; i < units; i++) rest += constants[units + i] * x[i];
#ifdef WIDE
    return rest + _mm512_reduce_add_ps((__m512)total);
#endif
    for (int j = 0; j < VECTOR / 4; j++) rest += total[j];
    return rest;
}

/* 64 levels by the scales of their two units, in the order of `expand_nf4`. */
INLINE chunk expand_grouped(const float *levels, const uint8_t *bytes, const float *scales) {
    chunk c = expand_nf4(levels, bytes, 1);
#pragma GCC unroll 16
    for (int i = 0; i < PARTS; i++) c.part[i] *= scales[i % (PARTS / 2) >= PARTS / 4];
    return c;
}
