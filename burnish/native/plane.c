/* The inner loop of GPTQ: columns of a matrix rounded one after the other, each against the errors of those before. */

#include "weights.h"

#define ROWS 16

/* w (columns, rows), turned into w - its rounded value; codes (columns, rows). Columns are taken from the last to the first.
 * `pull` (columns, rows) is what the errors of columns behind these add, in the factor's rows, and is overwritten.
 * factor: lower triangular, row i at i * apart. scales and zeros (groups, rows), of column i the group_of[i]-th. */
void nearest_plane(float *w, float *pull, const float *factor, int64_t apart, const float *scales, const float *zeros,
                   const int64_t *group_of, int64_t columns, int64_t rows, float top, uint8_t *codes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t count = min(ROWS, rows - first);
        for (int64_t i = columns - 1; i >= 0; i--) {
            const float *own = factor + i * apart, inverse = 1.0f / own[i];
            float *at = w + i * rows + first, *pulled = pull + i * rows + first;
            const float *scale = scales + group_of[i] * rows + first, *zero = zeros + group_of[i] * rows + first;
            float error[ROWS] = {0};
            for (int64_t r = 0; r < count; r++) {
                const float target = at[r] + pulled[r] * inverse;
                float code = __builtin_rintf(target / scale[r]) + zero[r];
                code = code < 0 ? 0 : code > top ? top : code;
                codes[i * rows + first + r] = (uint8_t)code;
                error[r] = at[r] - (code - zero[r]) * scale[r];
                at[r] = error[r];
            }
            for (int64_t j = 0; j < i; j++) {
                float *other = pull + j * rows + first;
                if (count == ROWS)
                    for (int r = 0; r < ROWS; r++) other[r] += own[j] * error[r];
                else
                    for (int64_t r = 0; r < count; r++) other[r] += own[j] * error[r];
            }
        }
    }
}
