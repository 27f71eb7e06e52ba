/* RMSNorm, the gated SiLU and softmax cross-entropy of bfloat16 training, forward and backward, on a processor with
   AVX512-BF16; `training.py` documents them and has their plain torch twins. Arithmetic is in float32. */

#ifdef __AVX512BF16__

#include "avx512.h"

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
   softmax(row) - onehot(label). */
void cross_entropy(bf16 *logits, const big *labels, big rows, big size, float *loss, int gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        bf16 *row = logits + r * size, *own = row + labels[r];
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            most = _mm512_mask_max_ps(most, part, most, load_part(row + j, part));
        }
        float peak = _mm512_reduce_max_ps(most);
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            __m512 x = exponential(_mm512_sub_ps(load_part(row + j, part), _mm512_set1_ps(peak)));
            sum = _mm512_mask_add_ps(sum, part, sum, x);
        }
        float level = peak + logf(_mm512_reduce_add_ps(sum));
        float target = _mm512_cvtss_f32(load_part(own, 1));
        loss[r] = level - target;
        if (!gradient) continue;
        for (big j = 0; j < size; j += 16) {
            __mmask16 part = lanes(size - j);
            store_part(row + j, part, exponential(_mm512_sub_ps(load_part(row + j, part), _mm512_set1_ps(level))));
        }
        store_part(own, 1, _mm512_set1_ps(expf(target - level) - 1));
    }
}

#endif
