/* GGUF's blocks: expanded to floats, and made of them.
 *
 * Q8_0 and Q4_0 are rounded as ggml's reference rounds. The scales of Q4_K, Q5_K and Q6_K are searched: of some scales near
 * the one that just covers a group's weights, each rounds the weights, least squares give the scale, and the minimum where
 * there is one, for these whole numbers, and the set with the smallest squared error wins. Then the groups' scales and
 * minima are rounded, and the weights once more by them.
 */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512") /* twice as fast here; compilers choose 256 bits by themselves */
#endif

#include <math.h>

#include "weights.h"
enum { SUPER = 256, TRIES = 24, SIDE = 8 /* blocks of 32 at once */ };
static const float STEP = 2.0f / (TRIES - 1); /* of a scale's inverse, in levels */

INLINE uint16_t to_half(float value) { /* to the nearest, ties to even */
    uint32_t bits, rounded;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    memcpy(&value, &bits, 4);
    if (value != value) return sign | 0x7e00;
    if (value >= 65520.0f) return sign | 0x7c00;
    if (value < 0x1p-14f) rounded = (uint32_t)__builtin_rintf(value * 0x1p24f);
    else rounded = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    return sign | rounded;
}

/* Writes `value` as a half, and gives back what it then is. */
INLINE float put_half(uint8_t *to, float value) {
    const uint16_t half = to_half(value);
    memcpy(to, &half, 2);
    return from_half(half);
}

INLINE float largest(const float *x, int count) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
    return most;
}

/* The one of `count` values that lies farthest from zero, the first of equals. */
INLINE float farthest(const float *x, int count) {
    float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int i = 0; i < count; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    if (high != -low) return high > -low ? high : low;
    const float most = high;
    for (int i = 0; i < count; i++)
        if (__builtin_fabsf(x[i]) == most) return x[i];
    return 0;
}

/* The largest of each of SIDE blocks of 32, of `sign` times the weights or, where it is 0, of their sizes; by pairs of
 * neighbours. */
INLINE void highest(const float *x, int sign, float *most) {
    float each[8 * SIDE], pairs[4 * SIDE], fours[2 * SIDE];
#define LARGER(A, B) ((A) > (B) ? (A) : (B))
    for (int b = 0; b < SIDE; b++)
        for (int i = 0; i < 8; i++) {
            float of[4];
            for (int j = 0; j < 4; j++) {
                const float value = x[32 * b + 8 * j + i];
                of[j] = sign ? (float)sign * value : __builtin_fabsf(value);
            }
            const float first = LARGER(of[0], of[1]), second = LARGER(of[2], of[3]);
            each[8 * b + i] = LARGER(first, second);
        }
    for (int i = 0; i < 4 * SIDE; i++) pairs[i] = LARGER(each[2 * i], each[2 * i + 1]);
    for (int i = 0; i < 2 * SIDE; i++) fours[i] = LARGER(pairs[2 * i], pairs[2 * i + 1]);
    for (int i = 0; i < SIDE; i++) most[i] = LARGER(fours[2 * i], fours[2 * i + 1]);
}

/* SIDE blocks of 32 weights. */
INLINE void quantize_q8_0(const float *x, uint8_t *to) {
    float most[SIDE], d[SIDE], inverse[SIDE];
    highest(x, 0, most);
    for (int b = 0; b < SIDE; b++) d[b] = most[b] / 127;
    for (int b = 0; b < SIDE; b++) inverse[b] = d[b] == 0 ? 0 : 1 / d[b];
    for (int b = 0; b < SIDE; b++, x += 32, to += 34) {
        int32_t q[32];
        put_half(to, d[b]);
        for (int i = 0; i < 32; i++) { /* halves away from zero */
            const float value = x[i] * inverse[b], size = __builtin_fabsf(value);
            const int32_t down = (int32_t)size, rounded = down + (size - (float)down >= 0.5f);
            q[i] = value < 0 ? -rounded : rounded;
        }
        for (int i = 0; i < 32; i++) to[2 + i] = (uint8_t)q[i];
    }
}

/* SIDE blocks of 32 weights; a scale is `farthest` by -8. */
INLINE void quantize_q4_0(const float *x, uint8_t *to) {
    float high[SIDE], low[SIDE], d[SIDE], inverse[SIDE];
    highest(x, 1, high), highest(x, -1, low);
    int equal = 0;
    for (int b = 0; b < SIDE; b++) {
        equal |= high[b] == low[b];
        d[b] = (high[b] > low[b] ? high[b] : -low[b]) / -8;
    }
    for (int b = 0; b < SIDE && equal; b++) d[b] = farthest(x + 32 * b, 32) / -8;
    for (int b = 0; b < SIDE; b++) inverse[b] = d[b] == 0 ? 0 : 1 / d[b];
    for (int b = 0; b < SIDE; b++, x += 32, to += 18) {
        int32_t q[32];
        put_half(to, d[b]);
        for (int i = 0; i < 32; i++) {
            const int32_t whole = (int32_t)(x[i] * inverse[b] + 8.5f);
            q[i] = whole > 15 ? 15 : whole;
        }
        for (int i = 0; i < 16; i++) q[i] |= q[i + 16] << 4;
        for (int i = 0; i < 16; i++) to[2 + i] = (uint8_t)q[i];
    }
}

INLINE float within(float value, float least, float most) {
    value = __builtin_rintf(value);
    return value < least ? least : value > most ? most : value;
}

/* scale >= 0 and minimum >= 0 so that scale q - minimum, q of 0 to `most`, is near 32 weights. */
INLINE void search(const float *x, float most, float *scale, float *minimum) {
    float low = 0, high = x[0], total = 0, squares = 0;
    for (int i = 0; i < 32; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
#pragma omp simd reduction(+ : total, squares)
    for (int i = 0; i < 32; i++) total += x[i], squares += x[i] * x[i];
    *scale = 0, *minimum = __builtin_fabsf(low);
    if (high == low) return;
    float least = INFINITY;
    float inverse[TRIES], sum[TRIES] = {0}, of_squares[TRIES] = {0}, product[TRIES] = {0};
    for (int t = 0; t < TRIES; t++) inverse[t] = (most - 1 + STEP * t) / (high - low);
    for (int i = 0; i < 32; i++)
        for (int t = 0; t < TRIES; t++) {
            const float q = within(inverse[t] * (x[i] - low), 0, most);
            sum[t] += q, of_squares[t] += q * q, product[t] += q * x[i];
        }
    for (int t = 0; t < TRIES; t++) {
        const float determinant = 32 * of_squares[t] - sum[t] * sum[t];
        float s = (32 * product[t] - total * sum[t]) / determinant;
        float m = (sum[t] * product[t] - of_squares[t] * total) / determinant;
        if (!(determinant > 0 && m > 0)) m = 0, s = product[t] / of_squares[t];
        const float error = squares - s * product[t] + m * total;
        if (error < least) least = error, *scale = s, *minimum = m;
    }
}

/* 256 weights to Q4_K, or to Q5_K where most is 31. */
INLINE void quantize_q45_k(float most, const float *x, uint8_t *to) {
    float scales[8], minima[8];
    uint8_t *packed = to + 4, *fifth = to + 16, *nibbles = to + (most > 15 ? 48 : 16), q[SUPER];
    for (int j = 0; j < 8; j++) search(x + 32 * j, most, scales + j, minima + j);
    const float d = put_half(to, largest(scales, 8) / 63), dmin = put_half(to + 2, largest(minima, 8) / 63);
    memset(packed, 0, 12);
    for (int j = 0; j < 8; j++) {
        const float s = d > 0 ? within(scales[j] / d, 0, 63) : 0, m = dmin > 0 ? within(minima[j] / dmin, 0, 63) : 0;
        const float step = d * s, shift = dmin * m, inverse = step > 0 ? 1 / step : 0;
        const int scale = (int)s, minimum = (int)m;
        if (j < 4) {
            packed[j] |= scale;
            packed[j + 4] |= minimum;
        } else {
            packed[j + 4] |= (scale & 15) | minimum << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= minimum >> 4 << 6;
        }
        for (int i = 0; i < 32; i++) q[32 * j + i] = (uint8_t)(int32_t)within((x[32 * j + i] + shift) * inverse, 0, most);
    }
    for (int i = 0; i < 128; i++) nibbles[i] = (q[i / 32 * 64 + i % 32] & 15) | q[i / 32 * 64 + 32 + i % 32] << 4;
    for (int i = 0; i < 32 && most > 15; i++) {
        fifth[i] = 0;
        for (int j = 0; j < 8; j++) fifth[i] |= (q[32 * j + i] >> 4) << j;
    }
}

INLINE void quantize_q6_k(const float *x, uint8_t *to) {
    float scales[16];
    uint8_t q[SUPER];
    for (int j = 0; j < 16; j++) {
        const float *own = x + 16 * j, extreme = farthest(own, 16);
        float best = 0, inverse[TRIES], squares[TRIES] = {0}, product[TRIES] = {0};
        scales[j] = 0;
        if (extreme == 0) continue;
        for (int t = 0; t < TRIES; t++) inverse[t] = -(31 + STEP * t) / extreme;
        for (int i = 0; i < 16; i++)
            for (int t = 0; t < TRIES; t++) {
                const float whole = within(inverse[t] * own[i], -32, 31);
                squares[t] += whole * whole, product[t] += whole * own[i];
            }
        for (int t = 0; t < TRIES; t++) {
            const float gain = product[t] * product[t] / squares[t];
            if (gain > best) best = gain, scales[j] = product[t] / squares[t];
        }
    }
    const float d = put_half(to + 208, farthest(scales, 16) / -128);
    for (int j = 0; j < 16; j++) {
        const float s = d != 0 ? within(scales[j] / d, -128, 127) : 0, step = d * s, inverse = step != 0 ? 1 / step : 0;
        to[192 + j] = (uint8_t)(int8_t)(int32_t)s;
        for (int i = 0; i < 16; i++) q[16 * j + i] = (uint8_t)(int32_t)(within(x[16 * j + i] * inverse, -32, 31) + 32);
    }
    for (int i = 0; i < 64; i++) { /* two halves of 32 columns, each with weights 0, 32, 64 and 96 from there */
        const uint8_t *from = q + i / 32 * 128 + i % 32;
        to[i / 32 * 64 + i % 32] = (from[0] & 15) | (from[64] & 15) << 4;
        to[i / 32 * 64 + 32 + i % 32] = (from[32] & 15) | (from[96] & 15) << 4;
        to[128 + i] = from[0] >> 4 | from[32] >> 4 << 2 | from[64] >> 4 << 4 | from[96] >> 4 << 6;
    }
}

INLINE void quantize_256(int kind, const float *x, uint8_t *to) {
    switch (kind) {
    case Q8_0: quantize_q8_0(x, to); break;
    case Q4_0: quantize_q4_0(x, to); break;
    case Q4_K: quantize_q45_k(15, x, to); break;
    case Q5_K: quantize_q45_k(31, x, to); break;
    default: quantize_q6_k(x, to);
    }
}

/* `count` weights, whole blocks, to their bytes. */
void gguf_quantize(int kind, const float *x, int64_t count, uint8_t *to, int threads) {
    const int64_t bytes = gguf_bytes(kind, SUPER), whole = count / SUPER, rest = count % SUPER;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < whole; i++) quantize_256(kind, x + i * SUPER, to + i * bytes);
    if (rest) {
        float last[SUPER] = {0};
        uint8_t made[SUPER * 2];
        memcpy(last, x + whole * SUPER, 4 * rest);
        quantize_256(kind, last, made);
        memcpy(to + whole * bytes, made, gguf_bytes(kind, rest));
    }
}

/* `count` weights, whole blocks, to float32, or bfloat16 where half. */
void gguf_dequantize(int kind, const uint8_t *from, int64_t count, void *out, int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < count / 32; at++) {
        union {
            lanes parts[HALF_PARTS];
            float floats[32];
        } wide;
#define CASE(KIND) \
    case KIND: expand_32(KIND, from, at, wide.parts); break
        switch (kind) {
            CASE(Q8_0);
            CASE(Q4_0);
            CASE(Q5_0);
            CASE(Q5_1);
            CASE(Q4_K);
            CASE(Q5_K);
            CASE(Q6_K);
        }
        for (int i = 0; i < 32 && half; i++) ((uint16_t *)out)[32 * at + i] = narrow(wide.floats[i]);
        if (!half) memcpy((float *)out + 32 * at, wide.floats, sizeof wide);
    }
}
