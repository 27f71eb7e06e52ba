/* Products of stored weights as whole numbers with activations of 16 bits, whose scale for 128 positions is behind them.
 *
 * AVX-512 multiplies and sums 32 of them in one instruction, AVX2 16 in two. NF4's levels stand for LEVEL times themselves,
 * so that eight products fit 32 bits.
 */

#pragma once
#include "tiles.h"

#ifdef WHOLE_NUMBERS
#define LEVEL 8191.0f
#define AT(address) _mm256_loadu_si256((const __m256i *)(address))

#ifdef WIDE
typedef __m512i words; /* 32 whole numbers of 16 bits */

INLINE words words_at(const char *from) { return _mm512_loadu_si512(from); }
INLINE words of_signed(__m256i bytes) { return _mm512_cvtepi8_epi16(bytes); }
INLINE words of_unsigned(__m256i bytes) { return _mm512_cvtepu8_epi16(bytes); }
INLINE words ones(void) { return _mm512_set1_epi16(1); }
INLINE __m256i fifth_bits(uint32_t bits) { return _mm256_maskz_set1_epi8(bits, 16); }

/* Nibbles less 8, the low ones first. */
INLINE words less_eight(__m128i packed) {
    const __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
    return of_signed(_mm256_sub_epi8(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(8)));
}

INLINE lanes product_of(words a, words b) {
    return (lanes)_mm512_cvtepi32_ps(_mm512_dpwssd_epi32(_mm512_setzero_si512(), a, b));
}

/* sum + the first 16 products by `low` and the others by `high`. */
INLINE lanes in_halves(words a, words b, float low, float high, lanes sum) {
    const __m512 scale = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high));
    return multiply_add(product_of(a, b), (lanes)scale, sum);
}

#else
typedef struct {
    __m256i low, high; /* 16 each */
} words;

INLINE words words_at(const char *from) { return (words){AT(from), AT(from + 32)}; }
INLINE words ones(void) { return (words){_mm256_set1_epi16(1), _mm256_set1_epi16(1)}; }

INLINE words of_signed(__m256i bytes) {
    return (words){_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
                   _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
}

INLINE words of_unsigned(__m256i bytes) {
    return (words){_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
                   _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1))};
}

/* Byte i is 16 where bit i is set. */
INLINE __m256i fifth_bits(uint32_t bits) {
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}

/* Nibbles less 8, the low ones first. */
INLINE words less_eight(__m128i packed) {
    const __m256i wide = _mm256_cvtepu8_epi16(packed), eight = _mm256_set1_epi16(8);
    const __m256i low = _mm256_and_si256(wide, _mm256_set1_epi16(15));
    return (words){_mm256_sub_epi16(low, eight), _mm256_sub_epi16(_mm256_srli_epi16(wide, 4), eight)};
}

INLINE lanes floats_of(__m256i sums) { return (lanes)_mm256_cvtepi32_ps(sums); }

INLINE lanes product_of(words a, words b) {
    return floats_of(_mm256_add_epi32(_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)));
}

/* sum + the first 16 products by `low` and the others by `high`. */
INLINE lanes in_halves(words a, words b, float low, float high, lanes sum) {
    sum = multiply_add(floats_of(_mm256_madd_epi16(a.low, b.low)), low - (lanes){0}, sum);
    return multiply_add(floats_of(_mm256_madd_epi16(a.high, b.high)), high - (lanes){0}, sum);
}
#endif

#ifdef WIDE
/* int8 or four bits by 16-bit activations, 128 positions at a time, whose scale is behind them in x. Nibble i of 32 words is one
 * lookup, in a table that stands twice, since it takes five bits. */
INLINE void whole_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0,
                       int64_t token) {
    const int64_t pairs = (g->blocks + 1) / 2, size = stored(kind, 2 * BLOCK);
    const int nibbles = kind == NF4 || kind == GROUPED;
    __m512i table = {0};
    if (nibbles) {
        const float one = kind == NF4 ? LEVEL : GROUPED_LEVEL;
        const __m512 levels = _mm512_mul_ps(_mm512_loadu_ps(p->w->levels), _mm512_set1_ps(one));
        table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(levels)));
    }
    const char *x = p->x + token * p->stride, *rates = x + 4 * BLOCK * pairs;
    lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < pairs; b++, x += 4 * BLOCK, rates += 4) {
        reach(height, &rows, b * size, size, g->row_bytes);
        EVERY(r, height) {
            const uint8_t *from = rows.bytes[r] + b * size;
            __m512i part[4];
            FETCH(from);
            if (nibbles) {
                const __m512i words = _mm512_loadu_si512(from);
                EVERY(i, 4)
                    part[i] = _mm512_permutexvar_epi16(i ? _mm512_srli_epi16(words, 4 * i) : words, table);
            } else {
                FETCH(from + 64);
                EVERY(i, 4) part[i] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from + i));
            }
            const lanes pair = nibbles ? of_pair(kind, p->w, g, &rows, r, 2 * b) : (lanes){0};
            EVERY(t, width) {
                const char *own = x + t * p->stride;
                __m512i sum = _mm512_setzero_si512(), other = sum;
                sum = _mm512_dpwssd_epi32(sum, part[0], _mm512_loadu_si512(own));
                other = _mm512_dpwssd_epi32(other, part[1], _mm512_loadu_si512(own + 64));
                sum = _mm512_dpwssd_epi32(sum, part[2], _mm512_loadu_si512(own + 128));
                other = _mm512_dpwssd_epi32(other, part[3], _mm512_loadu_si512(own + 192));
                float rate;
                memcpy(&rate, rates + t * p->stride, 4);
                const lanes scale = nibbles ? pair * rate : (lanes)_mm512_set1_ps(rate);
                const __m512 wide = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, other));
                sums[r][t] = multiply_add((lanes)wide, scale, sums[r][t]);
            }
        }
    }
    store(kind, height, width, p, sums, g, r0, token);
}
#else
/* The same, of each 64 positions in the order SPREAD. A byte's nibbles are looked up in the levels' low and high bytes, which
 * then are put side by side. */
INLINE void whole_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0,
                       int64_t token) {
    const int64_t pairs = (g->blocks + 1) / 2, size = stored(kind, 2 * BLOCK);
    const int nibbles = kind == NF4 || kind == GROUPED;
    const __m256i fifteen = _mm256_set1_epi8(15);
    __m256i tables[2] = {fifteen, fifteen};
    if (nibbles) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; i++) {
            const int level = (int)__builtin_rintf(p->w->levels[i] * (kind == NF4 ? LEVEL : GROUPED_LEVEL));
            bytes[0][i] = level & 255;
            bytes[1][i] = level >> 8 & 255;
        }
        EVERY(i, 2) tables[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[i]));
    }
    const char *x = p->x + token * p->stride, *rates = x + 4 * BLOCK * pairs;
    lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t b = 0; b < pairs; b++, rates += 4) {
        reach(height, &rows, b * size, size, g->row_bytes);
        EVERY(block, 2) {
            EVERY(r, height) {
                const uint8_t *from = rows.bytes[r] + b * size + block * (size / 2);
                __m256i part[4];
                if (!nibbles || !block) FETCH(from);
                if (nibbles) {
                    const __m256i both = AT(from);
                    EVERY(i, 2) { /* the second neighbours, then the first ones */
                        const __m256i four = _mm256_and_si256(i ? _mm256_srli_epi16(both, 4) : both, fifteen);
                        const __m256i low = _mm256_shuffle_epi8(tables[0], four);
                        const __m256i high = _mm256_shuffle_epi8(tables[1], four);
                        part[2 * i] = _mm256_unpacklo_epi8(low, high);
                        part[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
                    }
                } else {
                    EVERY(i, 4) part[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from + i));
                }
                lanes scale = {0};
                const float *own = rows.scales[r] + (kind == GROUPED ? 4 * b + 2 * block : 2 * b + block);
                if (kind == NF4) scale = *own - scale;
                if (kind == GROUPED) scale = (lanes)_mm256_set_m128(_mm_set1_ps(own[1]), _mm_set1_ps(own[0]));
                EVERY(t, width) {
                    __m256i sum[4];
                    EVERY(i, 4) sum[i] = _mm256_madd_epi16(part[i], AT(x + t * p->stride + 32 * i));
                    const __m256i first = _mm256_add_epi32(sum[0], sum[1]), second = _mm256_add_epi32(sum[2], sum[3]);
                    float rate;
                    memcpy(&rate, rates + t * p->stride, 4);
                    const lanes by = nibbles ? scale * rate : rate - (lanes){0};
                    sums[r][t] = multiply_add(floats_of(_mm256_add_epi32(first, second)), by, sums[r][t]);
                }
            }
            x += 2 * BLOCK;
        }
    }
    store(kind, height, width, p, sums, g, r0, token);
}
#endif

/* The at-th 32 whole numbers of a row of GGUF's blocks, in 16 bits. */
INLINE words whole_32(enum kind kind, const uint8_t *row, int64_t at) {
    const int j = at % 8;
    const __m256i fifteen = _mm256_set1_epi8(15);
    if (kind == Q8_0) return of_signed(AT(row + at * 34 + 2));
    if (kind < Q4_K) {
        const uint8_t *end = row + gguf_bytes(kind, 32 * at + 32);
        const __m128i packed = _mm_loadu_si128((const __m128i *)(end - 16));
        if (kind == Q4_0) return less_eight(packed);
        const __m256i both = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), fifteen);
        uint32_t bits;
        memcpy(&bits, end - 20, 4);
        const __m256i q = _mm256_or_si256(both, fifth_bits(bits));
        return of_signed(kind == Q5_0 ? _mm256_sub_epi8(q, _mm256_set1_epi8(16)) : q);
    }
    if (kind == Q6_K) {
        const uint8_t *block = row + at / 8 * 210;
        const __m256i low = AT(block + j / 4 * 64 + j % 2 * 32), high = AT(block + 128 + j / 4 * 32);
        const __m256i two = _mm256_and_si256(_mm256_srli_epi16(high, j % 4 * 2), _mm256_set1_epi8(3));
        const __m256i four = _mm256_and_si256(_mm256_srli_epi16(low, j % 4 / 2 * 4), fifteen);
        const __m256i q = _mm256_or_si256(four, _mm256_slli_epi16(two, 4));
        return of_signed(_mm256_sub_epi8(q, _mm256_set1_epi8(32)));
    }
    const uint8_t *block = row + at / 8 * (kind == Q4_K ? 144 : 176), *packed = block + (kind == Q4_K ? 16 : 48);
    __m256i q = _mm256_and_si256(_mm256_srli_epi16(AT(packed + j / 2 * 32), j % 2 * 4), fifteen);
    if (kind == Q5_K) {
        const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(AT(block + 16), j), _mm256_set1_epi8(1));
        q = _mm256_or_si256(q, _mm256_slli_epi16(bit, 4));
    }
    return of_unsigned(q);
}

/* GGUF's blocks by 16-bit activations, whose scale for 128 positions is behind them in x. A group's sums of whole numbers
 * meet its scale, and the sums of x the minimum. */
INLINE void gguf_whole_tile(enum kind kind, int height, int width, const product *p, const group *g, int64_t r0,
                            int64_t token) {
    const int parts = kind < Q4_K ? 2 : 8; /* of 32 weights, done at once */
    const int shifted = kind == Q5_1 || kind == Q4_K || kind == Q5_K;
    const char *x = p->x + token * p->stride, *rates = x + even(g->blocks) * 2 * BLOCK;
    const lines rows = lines_of(kind, height, p->w, g, r0);
    lanes sums[MOST_HEIGHT][MOST_WIDTH];
    clear(height, width, sums);
    for (int64_t at = 0; at < 2 * g->blocks; at += parts, x += 64 * parts) {
        lanes totals_of_x[MOST_WIDTH][8];
        for (int t = 0; t < width && shifted; t++)
            EVERY(i, parts) totals_of_x[t][i] = product_of(words_at(x + t * p->stride + 64 * i), ones());
#pragma GCC unroll 1
        for (int r = 0; r < height; r++) {
            const uint8_t *row = rows.bytes[r];
            float scales[16], minima[8];
            FETCH(row + gguf_bytes(kind, 32 * at));
            if (parts == 8) FETCH(row + gguf_bytes(kind, 32 * at) + 64);
            if (parts == 8) FETCH(row + gguf_bytes(kind, 32 * at) + 128);
            group_scales(kind, row, at, scales, minima);
            lanes sum[MOST_WIDTH];
            EVERY(i, parts) {
                const words q = whole_32(kind, row, at + i);
                EVERY(t, width) {
                    const words values = words_at(x + t * p->stride + 64 * i);
                    if (i % 4 == 0) sum[t] = (lanes){0};
                    if (kind == Q6_K) sum[t] = in_halves(q, values, scales[2 * i], scales[2 * i + 1], sum[t]);
                    else sum[t] = multiply_add(product_of(q, values), scales[i] - (lanes){0}, sum[t]);
                    if (shifted) sum[t] = sum[t] - totals_of_x[t][i] * minima[i];
                    if (i % 4 == 3 || i == parts - 1) {
                        float rate;
                        memcpy(&rate, rates + t * p->stride + (at + i) / 4 * 4, 4);
                        sums[r][t] = multiply_add(sum[t], rate - (lanes){0}, sums[r][t]);
                    }
                }
            }
        }
    }
    for (int r = 0; r < height && r0 + r < g->count; r += HEIGHT)
        store(kind, height < HEIGHT ? height : HEIGHT, width, p, sums + r, g, r0 + r, token);
}

#undef AT
#endif
