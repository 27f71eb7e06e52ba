/* Weights of few bits in groups: `constants` a float16 scale for each group of a row and `codes` its zero point, null where
 * all are the middle code; `levels` sixteen numbers, -8 to 7, and the size of a group, a multiple of GROUP_UNIT or the
 * whole row. `bytes` are, of
 *
 * - four bits, two weights each, the first in the high nibble;
 * - two bits, four weights each, from the lowest bits on the second, first, fourth and third;
 * - three bits, the upper two of a row as such, then the lowest, bit i ^ 1 of a byte being its i-th weight's;
 * - eight bits, one weight each.
 *
 * A weight is (code - middle + middle - zero) * scale. Four bits are multiplied as NF4's levels are, with a scale for each
 * GROUP_UNIT, the others as whole numbers less the middle; what the zero points add is a product with the sums of
 * GROUP_UNIT activations. */

#pragma once
#include "weights.h"

#define GROUP_UNIT 32
#define GROUPED_LEVEL 512.0f /* that stands for 1 among whole numbers, where NF4's is 8191 */

INLINE int in_groups(enum kind kind) { return kind >= GROUPED && kind <= GROUPED_8; }

/* Of other than four bits, which have no levels. */
INLINE int in_codes(enum kind kind) { return kind > GROUPED && kind <= GROUPED_8; }

INLINE int middle_of(enum kind kind) {
    return kind == GROUPED_2 ? 2 : kind == GROUPED_3 ? 4 : kind == GROUPED ? 8 : 128;
}

#define LOWEST 32 /* where in a row's rest three bits' lowest ones are */

/* The last 64 weights of a row of codes, where these are no pair of blocks. */
INLINE void codes_rest(enum kind kind, const uint8_t *row, int64_t columns, uint8_t *rest) {
    const int64_t size = kind == GROUPED_8 ? BLOCK : BLOCK / 4;
    memcpy(rest, row + (kind == GROUPED_8 ? columns : columns / 4) - size, size);
    if (kind == GROUPED_3) memcpy(rest + LOWEST, row + columns / 4 + columns / 8 - BLOCK / 8, BLOCK / 8);
}

/* Floats that a thread keeps for a row's constants: in groups the scales of all units, then what zero points add. */
INLINE int64_t constants_of(enum kind kind, int64_t blocks) { return in_groups(kind) ? 4 * even(blocks) : blocks + 1; }

/* The codes of 64 weights of a row, the `block`-th, less the middle one; not inlined, for the code's size. */
static __attribute__((noinline, unused)) void whole_codes(enum kind kind, const uint8_t *row, int64_t columns,
                                                          int64_t block, int8_t *out) {
    if (kind == GROUPED_8) {
        for (int i = 0; i < BLOCK; i++) out[i] = (int8_t)(row[block * BLOCK + i] ^ 128);
        return;
    }
    const uint8_t *pairs = row + block * (BLOCK / 4), *bits = row + columns / 4 + block * (BLOCK / 8);
    for (int i = 0; i < BLOCK; i++) {
        int code = pairs[i / 4] >> 2 * (i % 4 ^ 1) & 3;
        if (kind == GROUPED_3) code = 2 * code + (bits[i / 8] >> (i % 8 ^ 1) & 1);
        out[i] = (int8_t)(code - middle_of(kind));
    }
}

/* 64 weights of a row of codes from the `first`-th on, in order. */
INLINE void weights_of_codes(enum kind kind, const matrix *w, int64_t row, int64_t first, float *out) {
    const int64_t size = (int64_t)w->levels[16], groups = (w->columns + size - 1) / size;
    int8_t codes[BLOCK];
    whole_codes(kind, w->bytes + row * stored(kind, w->columns), w->columns, first / BLOCK, codes);
    for (int i = 0; i < BLOCK; i += GROUP_UNIT) {
        const int64_t at = row * groups + (first + i) / size;
        const float scale = from_half(((const uint16_t *)w->constants)[at]);
        const int shift = w->codes ? middle_of(kind) - w->codes[at] : 0;
        for (int j = i; j < i + GROUP_UNIT; j++) out[j] = (codes[j] + shift) * scale;
    }
}

/* A row's constants, unit by unit. */
INLINE void expand_groups(enum kind kind, const matrix *w, int64_t row, int64_t blocks, enum arithmetic how, float *out) {
    const int64_t size = (int64_t)w->levels[16], groups = (w->columns + size - 1) / size, units = 2 * even(blocks);
    const uint16_t *scales = (const uint16_t *)w->constants + row * groups;
    const uint8_t *zeros = w->codes ? w->codes + row * groups : NULL;
    const float one = kind == GROUPED ? GROUPED_LEVEL : 1, level = how == WHOLE && kind != GROUPED_8 ? 8191.0f / one : 1;
    const float middle = (float)middle_of(kind);
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
                const __m512 added = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_set1_ps(middle), zero));
                _mm512_mask_storeu_ps(out + units + unit, kept, _mm512_permutexvar_ps(of_unit, added));
            }
        }
        return;
    }
#endif
    for (int64_t g = 0; g < groups; g++) {
        const float scale = from_half(scales[g]), shift = zeros ? middle - zeros[g] : 0;
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

/* The same of codes, in order. */
INLINE chunk expand_codes(enum kind kind, const uint8_t *row, int64_t columns, int64_t block, const float *scales) {
    int8_t codes[BLOCK];
    flat values;
    chunk c;
    whole_codes(kind, row, columns, block, codes);
    for (int i = 0; i < BLOCK; i++) values.floats[i] = codes[i] * scales[i / GROUP_UNIT];
    memcpy(&c, &values, sizeof c);
    return c;
}
