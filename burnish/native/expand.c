/* The expansion of quantised matrices, and the rate of reading memory. */

#include "fp8.h"

/* Read `bytes` bytes, eight streams a thread, as fast as memory gives them; what it returns means nothing. */
int64_t read_memory(const char *from, int64_t bytes, int threads) {
    enum { STREAMS = 8, ROW = 8192 };
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t start = 0; start < bytes / (STREAMS * ROW); start++) {
        typedef int64_t words __attribute__((vector_size(VECTOR)));
        words sums[STREAMS] = {0};
        for (int64_t at = 0; at < ROW; at += VECTOR)
            for (int i = 0; i < STREAMS; i++) {
                words next;
                const char *place = from + (start * STREAMS + i) * ROW + at;
                __builtin_prefetch(place + 512, 0, 3);
                memcpy(&next, place, VECTOR);
                sums[i] += next;
            }
        for (int i = 0; i < STREAMS; i++) total += sums[i][0];
    }
    return total;
}

/* out (count) float32, or bfloat16 where out_half, from NF4 blocks that run over the flattened matrix. */
void nf4_dequantize(const uint8_t *bytes, const uint8_t *codes, const float *constants, const float *offset,
                    const float *map, const float *levels, int64_t count, void *out, int out_half, int threads) {
    const matrix w = {bytes, codes, constants, offset, map, levels, 0, 0};
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t left = count - b * BLOCK;
        uint8_t padded[BLOCK / 2] = {0};
        const uint8_t *from = bytes + b * (BLOCK / 2);
        if (left < BLOCK) from = memcpy(padded, from, (left + 1) / 2);
        const int64_t size = left < BLOCK ? left : BLOCK;
        float scale;
        expand_constants(&w, b, 1, &scale);
        const chunk c = expand_nf4(levels, from, scale);
        float split[BLOCK];
        memcpy(split, &c, sizeof split);
        for (int i = 0; i < size; i++) {
            const float value = split[i % 2 * 32 + i / 2];
            if (out_half)
                ((uint16_t *)out)[b * BLOCK + i] = narrow(value);
            else
                ((float *)out)[b * BLOCK + i] = value;
        }
    }
}

/* out (rows, columns) float32, or bfloat16 where out_half, of int8 or FP8. */
void rows_dequantize(int kind, const uint8_t *values, const float *scale, int64_t rows, int64_t columns, void *out,
                     int out_half, int threads) {
    const matrix w = {values, NULL, scale, NULL, NULL, NULL, rows, columns};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float by = scale_of_row(kind, &w, row);
        for (int64_t first = 0; first < columns; first += BLOCK) {
            const int64_t count = min(BLOCK, columns - first), at = row * columns + first;
            float piece[BLOCK];
            if (kind == FP8)
                expand_fp8_row(values + at, count, piece);
            else
                for (int64_t i = 0; i < count; i++) piece[i] = (int8_t)values[at + i];
            if (out_half)
                for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[at + i] = narrow(piece[i] * by);
            else
                for (int64_t i = 0; i < count; i++) ((float *)out)[at + i] = piece[i] * by;
        }
    }
}
