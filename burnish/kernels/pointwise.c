/* RMSNorm, the gated SiLU, the rotary embedding and softmax cross-entropy of training, forward and backward, on a
   processor with AVX-512; `training.py` documents them and has their plain torch twins. Tensors are bfloat16, or float32
   where `wide`; arithmetic is in float32. */

#include "avx512.h"

#ifdef AVX512

/* y = x / sqrt(mean(x^2) + eps) * weight for x (rows, size); `inverse` (rows,) keeps 1 / sqrt(...). */
void rms_norm_forward(const void *x, const void *weight, float eps, big rows, big size, void *y, float *inverse,
                      int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        big row = r * size;
        __m512 sum = _mm512_setzero_ps();
        for (big j = 0; j < size; j += 16) {
            __m512 value = get(x, row + j, lanes(size - j), wide);
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        inverse[r] = 1 / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 scaled = _mm512_mul_ps(get(x, row + j, part, wide), _mm512_set1_ps(inverse[r]));
            put(y, row + j, part, _mm512_mul_ps(scaled, get(weight, j, part, wide)), wide);
        }
    }
}

/* dx = inverse * (g w - x inverse^2 mean(g w x)). */
void rms_norm_backward(const void *grad, const void *x, const void *weight, const float *inverse, big rows, big size,
                       void *dx, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        big row = r * size;
        __m512 dot = _mm512_setzero_ps(), scale = _mm512_set1_ps(inverse[r]);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 gw = _mm512_mul_ps(get(grad, row + j, part, wide), get(weight, j, part, wide));
            dot = _mm512_fmadd_ps(gw, get(x, row + j, part, wide), dot);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / size * inverse[r] * inverse[r]);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 gw = _mm512_mul_ps(get(grad, row + j, part, wide), get(weight, j, part, wide));
            __m512 slope = _mm512_fnmadd_ps(get(x, row + j, part, wide), mean, gw);
            put(dx, row + j, part, _mm512_mul_ps(scale, slope), wide);
        }
    }
}

/* dw = sum over the rows of g x inverse. */
void rms_norm_weight(const void *grad, const void *x, const float *inverse, big rows, big size, void *dw, int wide,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < size; j += 16) {
        __mmask16 part = lanes(size - j);
        __m512 sum = _mm512_setzero_ps();
        for (big r = 0; r < rows; r++) {
            __m512 scaled = _mm512_mul_ps(get(x, r * size + j, part, wide), _mm512_set1_ps(inverse[r]));
            sum = _mm512_fmadd_ps(get(grad, r * size + j, part, wide), scaled, sum);
        }
        put(dw, j, part, sum, wide);
    }
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* out = gate sigmoid(gate) up, all (count,). */
void gated_silu_forward(const void *gate, const void *up, big count, void *out, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        __mmask16 part = lanes(count - j);
        __m512 x = get(gate, j, part, wide);
        put(out, j, part, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), get(up, j, part, wide)), wide);
    }
}

void gated_silu_backward(const void *grad, const void *gate, const void *up, big count, void *dgate, void *dup,
                         int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        __mmask16 part = lanes(count - j);
        __m512 g = get(grad, j, part, wide), x = get(gate, j, part, wide), s = sigmoid(x);
        __m512 silu = _mm512_mul_ps(x, s), slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s);
        put(dup, j, part, _mm512_mul_ps(g, silu), wide);
        put(dgate, j, part, _mm512_mul_ps(_mm512_mul_ps(g, get(up, j, part, wide)), slope), wide);
    }
}

/* x (rows, heads, size) turned by the angles of cosine and sine (rows, size), j with j + size / 2; backwards: by the
   opposite angles, which is the gradient. */
void rotate(const void *x, const void *cosine, const void *sine, big rows, big heads, big size, int backwards,
            void *out, int wide, int threads) {
    big half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows * heads; r++) {
        for (big j = 0; j < half; j += 16) {
            __mmask16 part = lanes(half - j);
            big low = r * size + j, high = low + half, angle = r / heads * size + j;
            __m512 a = get(x, low, part, wide), b = get(x, high, part, wide);
            __m512 c = get(cosine, angle, part, wide), s = get(sine, angle, part, wide);
            if (backwards) s = _mm512_sub_ps(_mm512_setzero_ps(), s);
            put(out, low, part, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), wide);
            put(out, high, part, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), wide);
        }
    }
}

/* Of each row of logits (rows, size): loss = logsumexp(row) - row[label], and, if asked, the row becomes its gradient
   softmax(row) - onehot(label). */
INLINE float cross_entropy_row(void *row, big label, big size, int gradient, const int wide) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (big j = 0; j < size; j += 16) {
        __mmask16 part = lanes(size - j);
        most = _mm512_mask_max_ps(most, part, most, get(row, j, part, wide));
    }
    float peak = _mm512_reduce_max_ps(most);
    for (big j = 0; j < size; j += 16) {
        __mmask16 part = lanes(size - j);
        __m512 x = exponential(_mm512_sub_ps(get(row, j, part, wide), _mm512_set1_ps(peak)));
        sum = _mm512_mask_add_ps(sum, part, sum, x);
    }
    float level = peak + logf(_mm512_reduce_add_ps(sum));
    float target = _mm512_cvtss_f32(get(row, label, 1, wide));
    for (big j = 0; j < size && gradient; j += 16) {
        __mmask16 part = lanes(size - j);
        __m512 x = exponential(_mm512_sub_ps(get(row, j, part, wide), _mm512_set1_ps(level)));
        put(row, j, part, x, wide);
    }
    if (gradient) put(row, label, 1, _mm512_set1_ps(expf(target - level) - 1), wide);
    return level - target;
}

void cross_entropy(void *logits, const big *labels, big rows, big size, float *loss, int gradient, int wide,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++)
        loss[r] = wide ? cross_entropy_row((float *)logits + r * size, labels[r], size, gradient, 1)
                       : cross_entropy_row((bf16 *)logits + r * size, labels[r], size, gradient, 0);
}

#endif
