/* RMSNorm, the gated SiLU and softmax cross-entropy of bfloat16 training, forward and backward, on a processor with
   AVX-512; `training.py` documents them and has their plain torch twins. Arithmetic is in float32. */

#include "avx512.h"

#ifdef AVX512

/* y = x / sqrt(mean(x^2) + eps) * weight for x (rows, size); `inverse` (rows,) keeps 1 / sqrt(...). */
void rms_norm_forward(const bf16 *x, const bf16 *weight, float eps, big rows, big size, bf16 *y, float *inverse,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        const bf16 *in = x + r * size;
        __m512 sum = _mm512_setzero_ps();
        for (big j = 0; j < size; j += 16) {
            __m512 value = load_part(in + j, lanes(size - j));
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        inverse[r] = 1 / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 scaled = _mm512_mul_ps(load_part(in + j, part), _mm512_set1_ps(inverse[r]));
            store_part(y + r * size + j, part, _mm512_mul_ps(scaled, load_part(weight + j, part)));
        }
    }
}

/* dx = inverse * (g w - x inverse^2 mean(g w x)). */
void rms_norm_backward(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *inverse, big rows, big size,
                       bf16 *dx, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        const bf16 *in = x + r * size, *g = grad + r * size;
        __m512 dot = _mm512_setzero_ps(), scale = _mm512_set1_ps(inverse[r]);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 gw = _mm512_mul_ps(load_part(g + j, part), load_part(weight + j, part));
            dot = _mm512_fmadd_ps(gw, load_part(in + j, part), dot);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / size * inverse[r] * inverse[r]);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 gw = _mm512_mul_ps(load_part(g + j, part), load_part(weight + j, part));
            store_part(dx + r * size + j, part,
                       _mm512_mul_ps(scale, _mm512_fnmadd_ps(load_part(in + j, part), mean, gw)));
        }
    }
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* out = gate sigmoid(gate) up, all (count,). */
void gated_silu_forward(const bf16 *gate, const bf16 *up, big count, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        __mmask16 part = lanes(count - j);
        __m512 x = load_part(gate + j, part);
        store_part(out + j, part, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), load_part(up + j, part)));
    }
}

void gated_silu_backward(const bf16 *grad, const bf16 *gate, const bf16 *up, big count, bf16 *dgate, bf16 *dup,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        __mmask16 part = lanes(count - j);
        __m512 g = load_part(grad + j, part), x = load_part(gate + j, part), s = sigmoid(x);
        __m512 silu = _mm512_mul_ps(x, s), slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s);
        store_part(dup + j, part, _mm512_mul_ps(g, silu));
        store_part(dgate + j, part, _mm512_mul_ps(_mm512_mul_ps(g, load_part(up + j, part)), slope));
    }
}

/* Of each row of logits (rows, size): loss = logsumexp(row) - row[label], and, if asked, the row becomes its gradient
   softmax(row) - onehot(label). `wide`: logits are float32. */
INLINE __m512 load_logits(const void *row, big at, __mmask16 part, const int wide) {
    return wide ? _mm512_maskz_loadu_ps(part, (const float *)row + at) : load_part((const bf16 *)row + at, part);
}

INLINE void store_logits(void *row, big at, __mmask16 part, __m512 x, const int wide) {
    if (wide) _mm512_mask_storeu_ps((float *)row + at, part, x);
    else store_part((bf16 *)row + at, part, x);
}

INLINE float cross_entropy_row(void *row, big label, big size, int gradient, const int wide) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (big j = 0; j < size; j += 16) {
        __mmask16 part = lanes(size - j);
        most = _mm512_mask_max_ps(most, part, most, load_logits(row, j, part, wide));
    }
    float peak = _mm512_reduce_max_ps(most);
    for (big j = 0; j < size; j += 16) {
        __mmask16 part = lanes(size - j);
        __m512 x = exponential(_mm512_sub_ps(load_logits(row, j, part, wide), _mm512_set1_ps(peak)));
        sum = _mm512_mask_add_ps(sum, part, sum, x);
    }
    float level = peak + logf(_mm512_reduce_add_ps(sum));
    float target = _mm512_cvtss_f32(load_logits(row, label, 1, wide));
    for (big j = 0; j < size && gradient; j += 16) {
        __mmask16 part = lanes(size - j);
        __m512 x = exponential(_mm512_sub_ps(load_logits(row, j, part, wide), _mm512_set1_ps(level)));
        store_logits(row, j, part, x, wide);
    }
    if (gradient) store_logits(row, label, 1, _mm512_set1_ps(expf(target - level) - 1), wide);
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
