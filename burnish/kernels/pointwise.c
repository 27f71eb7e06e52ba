/* RMSNorm, the gated SiLU, the rotary embedding and softmax cross-entropy of training, forward and backward;
   `training.py` documents them and has their plain torch twins. Tensors are bfloat16, or float32 where `wide`;
   arithmetic is in float32. */

#include "vectors.h"

#ifdef VECTORS

/* y = x / sqrt(mean(x^2) + eps) * weight for x (rows, size); `inverse` (rows,) keeps 1 / sqrt(...). */
void rms_norm_forward(const void *x, const void *weight, float eps, big rows, big size, void *y, float *inverse,
                      int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        big row = r * size;
        floats sum = zeros();
        for (big j = 0; j < size; j += 16) {
            floats value = get(x, row + j, lanes(size - j), wide);
            sum = fmadd(value, value, sum);
        }
        inverse[r] = 1 / sqrtf(total_of(sum) / size + eps);
        for (big j = 0; j < size; j += 16) {
            mask part = lanes(size - j);
            floats scaled = mul(get(x, row + j, part, wide), spread(inverse[r]));
            put(y, row + j, part, mul(scaled, get(weight, j, part, wide)), wide);
        }
    }
}

/* dx = inverse * (g w - x inverse^2 mean(g w x)). */
void rms_norm_backward(const void *grad, const void *x, const void *weight, const float *inverse, big rows, big size,
                       void *dx, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big r = 0; r < rows; r++) {
        big row = r * size;
        floats dot = zeros(), scale = spread(inverse[r]);
        for (big j = 0; j < size; j += 16) {
            mask part = lanes(size - j);
            floats gw = mul(get(grad, row + j, part, wide), get(weight, j, part, wide));
            dot = fmadd(gw, get(x, row + j, part, wide), dot);
        }
        floats mean = spread(total_of(dot) / size * inverse[r] * inverse[r]);
        for (big j = 0; j < size; j += 16) {
            mask part = lanes(size - j);
            floats gw = mul(get(grad, row + j, part, wide), get(weight, j, part, wide));
            floats slope = fnmadd(get(x, row + j, part, wide), mean, gw);
            put(dx, row + j, part, mul(scale, slope), wide);
        }
    }
}

/* dw = sum over the rows of g x inverse. */
void rms_norm_weight(const void *grad, const void *x, const float *inverse, big rows, big size, void *dw, int wide,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < size; j += 16) {
        mask part = lanes(size - j);
        floats sum = zeros();
        for (big r = 0; r < rows; r++) {
            floats scaled = mul(get(x, r * size + j, part, wide), spread(inverse[r]));
            sum = fmadd(get(grad, r * size + j, part, wide), scaled, sum);
        }
        put(dw, j, part, sum, wide);
    }
}

INLINE floats sigmoid(floats x) {
    floats one = spread(1);
    return divide(one, add(one, exponential(sub(zeros(), x))));
}

/* out = gate sigmoid(gate) up, all (count,). */
void gated_silu_forward(const void *gate, const void *up, big count, void *out, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        mask part = lanes(count - j);
        floats x = get(gate, j, part, wide);
        put(out, j, part, mul(mul(x, sigmoid(x)), get(up, j, part, wide)), wide);
    }
}

void gated_silu_backward(const void *grad, const void *gate, const void *up, big count, void *dgate, void *dup,
                         int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (big j = 0; j < count; j += 16) {
        mask part = lanes(count - j);
        floats g = get(grad, j, part, wide), x = get(gate, j, part, wide), s = sigmoid(x);
        floats silu = mul(x, s), slope = fmadd(silu, sub(spread(1), s), s);
        put(dup, j, part, mul(g, silu), wide);
        put(dgate, j, part, mul(mul(g, get(up, j, part, wide)), slope), wide);
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
            mask part = lanes(half - j);
            big low = r * size + j, high = low + half, angle = r / heads * size + j;
            floats a = get(x, low, part, wide), b = get(x, high, part, wide);
            floats c = get(cosine, angle, part, wide), s = get(sine, angle, part, wide);
            if (backwards) s = sub(zeros(), s);
            put(out, low, part, fmsub(a, c, mul(b, s)), wide);
            put(out, high, part, fmadd(b, c, mul(a, s)), wide);
        }
    }
}

/* Of each row of logits (rows, size): loss = logsumexp(row) - row[label], and, if asked, the row becomes its gradient
   softmax(row) - onehot(label). */
INLINE float cross_entropy_row(void *row, big label, big size, int gradient, const int wide) {
    floats most = spread(-INFINITY), sum = zeros();
    for (big j = 0; j < size; j += 16) {
        mask part = lanes(size - j);
        most = choose(part, max(most, get(row, j, part, wide)), most);
    }
    float peak = largest_of(most);
    for (big j = 0; j < size; j += 16) {
        mask part = lanes(size - j);
        floats x = exponential(sub(get(row, j, part, wide), spread(peak)));
        sum = choose(part, add(sum, x), sum);
    }
    float level = peak + logf(total_of(sum));
    float target = lowest_lane(get(row, label, 1, wide));
    for (big j = 0; j < size && gradient; j += 16) {
        mask part = lanes(size - j);
        floats x = exponential(sub(get(row, j, part, wide), spread(level)));
        put(row, j, part, x, wide);
    }
    if (gradient) put(row, label, 1, spread(expf(target - level) - 1), wide);
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
