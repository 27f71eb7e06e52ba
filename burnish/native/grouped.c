/* The expansion of weights in groups. */

#include "grouped.h"

static void put(float value, int half, int64_t at, void *out) {
    if (half)
        ((uint16_t *)out)[at] = narrow(value);
    else
        ((float *)out)[at] = value;
}

/* out (count, columns) float32, or bfloat16 where out_half: the rows from `first` of a matrix. */
void grouped_dequantize(int kind, const uint8_t *bytes, const uint8_t *zeros, const float *scales, const float *unused,
                        const float *unused_too, const float *levels, int64_t rows, int64_t columns, int64_t first,
                        int64_t count, void *out, int out_half, int threads) {
    const int64_t size = (int64_t)levels[16], groups = (columns + size - 1) / size;
    if (kind != GROUPED) {
        const matrix w = {bytes, zeros, scales, NULL, NULL, levels, rows, columns};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t row = 0; row < count; row++)
            for (int64_t at = 0; at < columns; at += BLOCK) {
                float values[BLOCK];
                weights_of_codes(kind, &w, first + row, at, values);
                for (int i = 0; i < BLOCK; i++) put(values[i], out_half, row * columns + at + i, out);
            }
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < count * groups; task++) {
        const int64_t row = first + task / groups, start = task % groups * size, end = min(start + size, columns);
        const float scale = from_half(((const uint16_t *)scales)[row * groups + task % groups]);
        const float zero = zeros ? zeros[row * groups + task % groups] - 8.0f : 0;
        float table[16];
        for (int i = 0; i < 16; i++) table[i] = (levels[i] - zero) * scale;
        const uint8_t *from = bytes + row * (columns / 2);
        for (int64_t i = start; i < end; i++) {
            const float value = table[one_by_one(i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4)];
            const int64_t at = task / groups * columns + i;
            put(value, out_half, at, out);
        }
    }
}
