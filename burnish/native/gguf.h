/* GGUF's quantised blocks of 32 or 256 weights, 32 weights at a time (ggml's `ggml-common.h` defines the formats).
 *
 * Q8_0: half d, 32 signed bytes; w = d q. Q4_0: half d, 16 bytes with weight i low and i + 16 high; w = d (q - 8).
 * Q5_0: half d, 4 bytes with fifth bits, 16 of nibbles; w = d (q - 16). Q5_1: halves d and m before these; w = d q + m.
 * Q4_K: halves d and dmin, 12 bytes with eight scales s and minima m of 6 bits, 32 bytes for each 64 weights, the first
 * 32 low; w = d s q - dmin m. Q5_K: the same with 32 bytes of fifth bits before the nibbles, bit i of byte l for weight
 * 32 i + l. Q6_K: 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales s, half d; w = d s (q - 32).
 */

INLINE float from_half(uint16_t half) {
#if defined(__F16C__) && VECTOR > 16
    return _cvtsh_ss(half);
#else
    const uint32_t rest = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t bits = rest << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits = (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : bits) | sign;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

INLINE float half_at(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return from_half(half);
}

/* Bytes of `count` weights, for whole blocks and K's whole quarters of them: 64. */
INLINE int64_t gguf_bytes(enum kind kind, int64_t count) {
    switch (kind) {
    case Q8_0: return count / 32 * 34;
    case Q4_0: return count / 32 * 18;
    case Q5_0: return count / 32 * 22;
    case Q5_1: return count / 32 * 24;
    case Q4_K: return count * 9 / 16;
    case Q5_K: return count * 11 / 16;
    default: return count * 105 / 128;
    }
}

enum { LANES = VECTOR / 4, HALF_PARTS = PARTS / 2 };
typedef uint8_t octets __attribute__((vector_size(LANES)));
typedef int8_t signed_octets __attribute__((vector_size(LANES)));
typedef int32_t integers __attribute__((vector_size(VECTOR)));

INLINE integers unsigned_at(const uint8_t *from) {
#ifdef WIDE
    return (integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif VECTOR == 32
    return (integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    octets part;
    memcpy(&part, from, sizeof part);
    return __builtin_convertvector(part, integers);
#endif
}

INLINE integers signed_at(const uint8_t *from) {
#ifdef WIDE
    return (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif VECTOR == 32
    return (integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    signed_octets part;
    memcpy(&part, from, sizeof part);
    return __builtin_convertvector(part, integers);
#endif
}

INLINE lanes as_floats(integers whole) { return __builtin_convertvector(whole, lanes); }

/* Scale and minimum j of a Q4_K's or Q5_K's 12 bytes. */
INLINE void scale_and_minimum(const uint8_t *packed, int j, float *scale, float *minimum) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        *minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
    }
}

/* What the groups of 32 weights from the at-th of a row are multiplied by, and what is taken from them: of one or two
 * blocks, or of a block of 256, whose Q6_K has groups of 16. */
INLINE void group_scales(enum kind kind, const uint8_t *row, int64_t at, float *scales, float *minima) {
    const uint8_t *block = row + gguf_bytes(kind, 32 * at);
    if (kind < Q4_K) {
        for (int i = 0; i < 2; i++) {
            scales[i] = half_at(block + i * gguf_bytes(kind, 32));
            minima[i] = kind == Q5_1 ? -half_at(block + i * gguf_bytes(kind, 32) + 2) : 0;
        }
    } else if (kind == Q6_K) {
        const float d = half_at(block + 208);
        for (int i = 0; i < 16; i++) scales[i] = d * (int8_t)block[192 + i];
    } else {
        const float d = half_at(block), dmin = half_at(block + 2);
        uint32_t three[3], s[2], m[2]; /* four bytes a word */
        memcpy(three, block + 4, 12);
        s[0] = three[0] & 0x3f3f3f3f, s[1] = (three[2] & 0x0f0f0f0f) | (three[0] >> 6 & 0x03030303) << 4;
        m[0] = three[1] & 0x3f3f3f3f, m[1] = (three[2] >> 4 & 0x0f0f0f0f) | (three[1] >> 6 & 0x03030303) << 4;
        for (int i = 0; i < 8; i++) scales[i] = d * ((uint8_t *)s)[i];
        for (int i = 0; i < 8; i++) minima[i] = dmin * ((uint8_t *)m)[i];
    }
}

/* The at-th 32 weights of a row, or of a matrix, which is its rows one after the other. */
INLINE void expand_32(enum kind kind, const uint8_t *row, int64_t at, lanes *to) {
    const int j = at % 8;
    if (kind == Q8_0) {
        const uint8_t *block = row + at * 34;
        const float d = half_at(block);
        for (int i = 0; i < HALF_PARTS; i++) to[i] = as_floats(signed_at(block + 2 + i * LANES)) * d;
    } else if (kind < Q4_K) {
        const uint8_t *block = row + gguf_bytes(kind, 32 * at), *q = block + gguf_bytes(kind, 32) - 16;
        const float d = half_at(block);
        uint8_t fifth[32];
        uint32_t bits;
        memcpy(&bits, q - 4, 4); /* of a Q4_0 they mean nothing */
        for (int l = 0; l < 32; l++) fifth[l] = (bits >> l & 1) << 4;
        for (int i = 0; i < HALF_PARTS; i++) {
            const int first = i * LANES;
            integers whole = first < 16 ? unsigned_at(q + first) & 15 : unsigned_at(q + first - 16) >> 4;
            if (kind != Q4_0) whole |= unsigned_at(fifth + first);
            to[i] = as_floats(kind == Q4_0 ? whole - 8 : kind == Q5_0 ? whole - 16 : whole) * d;
            if (kind == Q5_1) to[i] += half_at(block + 2);
        }
    } else if (kind == Q6_K) {
        const uint8_t *block = row + at / 8 * 210, *low = block + j / 4 * 64 + j % 2 * 32, *high = block + 128 + j / 4 * 32;
        const int8_t *scales = (const int8_t *)block + 192 + 2 * j;
        const float d = half_at(block + 208), two[] = {d * scales[0], d * scales[1]};
        for (int i = 0; i < HALF_PARTS; i++) {
            const int first = i * LANES;
            const integers nibbles = unsigned_at(low + first) >> (j % 4 / 2 * 4) & 15;
            const integers q = nibbles | (unsigned_at(high + first) >> (j % 4 * 2) & 3) << 4;
            to[i] = as_floats(q - 32) * two[first / 16];
        }
    } else {
        const uint8_t *block = row + at / 8 * (kind == Q4_K ? 144 : 176);
        const uint8_t *q = block + (kind == Q4_K ? 16 : 48) + j / 2 * 32, *fifth = block + 16;
        float scale, minimum;
        scale_and_minimum(block + 4, j, &scale, &minimum);
        scale *= half_at(block);
        minimum *= half_at(block + 2);
        for (int i = 0; i < HALF_PARTS; i++) {
            const int first = i * LANES;
            integers whole = unsigned_at(q + first) >> (j % 2 * 4) & 15;
            if (kind == Q5_K) whole |= (unsigned_at(fifth + first) >> j & 1) << 4;
            to[i] = as_floats(whole) * scale - minimum;
        }
    }
}
