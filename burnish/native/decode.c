/* One step of decoding through consecutive layers, by one team of threads from the first product to the last.
 *
 * A step of few tokens is bound by the bytes of the weights, if nothing stands between the products: here the projections
 * that read the same activations are one loop, norms, rotation, attention and the activation function are done between
 * barriers, and residuals are added where a product is stored. Activations are float32 throughout.
 */

#include <float.h>
#include <math.h>

#include "attention.h"

enum activation { SILU, GELU, GELU_TANH, RELU };
enum masking { SEEN_ALL, BOOLEAN, ADDITIVE };

/* A projection; absent where `w.bytes` is null. `bias` is float32 and may be null. */
typedef struct {
    int64_t kind;
    matrix w;
    const float *bias;
} projection;

/* Absent where `weight` is null; LayerNorm where `layer`, else RMSNorm; all float32. */
typedef struct {
    const float *weight, *bias;
    int64_t layer;
    double eps;
} norm;

/* `fused` holds per key-value head its queries, key and value, or blocks of them, as the stack says. */
typedef struct {
    projection q, k, v, o, gate, up, down;
    norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    void *keys, *values; /* (rows, kv_heads, slots, size), or of a pool (kv_heads, slots, size) */
    float *key_scales, *value_scales; /* (kv_heads, slots) of a pool's codes */
    double scale;
} layer;

enum fused { APART, PER_HEAD, BLOCKS };

typedef struct {
    int64_t hidden, heads, kv_heads, size, inner; /* size: of a head */
    int64_t fused, parallel, activation, rotated; /* parallel: both halves read the layer's input; rotated: of a head */
    double clip;
    int64_t threads, narrow; /* narrow: of a network that computes in bfloat16 */
} stack;

/* What is run of a layer: all of it, or one half, whose result then goes to `branch` (rows, hidden) and not into x. */
enum part { WHOLE_LAYER, ATTENTION, FEED_FORWARD };

/* What one step brings. x (rows, hidden), cosine and sine (rows, rotated) float32; a row's last slot is the new token's:
 * of its own, or where there is a table (rows, length) of the pool's. mask (rows, length) bytes, or (rows, heads, length)
 * float32; `mask_row` and `mask_head` count its elements. */
typedef struct {
    int64_t rows, length, slots, stored;
    const int64_t *table;
    float *x;
    const float *cosine, *sine;
    const void *mask;
    int64_t masking, mask_row, mask_head, part;
    float *branch;
} step;

/* exp to a relative error of 1e-7, for x <= 88: 2^n times a polynomial of the rest (Cephes' coefficients). */
INLINE float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
INLINE float error_function(float x) {
    const float size = __builtin_fabsf(x), t = 1.0f / (1.0f + 0.3275911f * size);
    const float sum = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float positive = 1.0f - sum * fast_exp(-size * size);
    return x < 0 ? -positive : positive;
}

INLINE float activate(enum activation kind, float x) {
    switch (kind) {
    case SILU: return x / (1.0f + fast_exp(-x));
    case GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case GELU_TANH: return x / (1.0f + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    default: return x > 0 ? x : 0;
    }
}

INLINE void normalise(const norm *n, const float *x, int64_t size, float *out) {
    float sum = 0, mean = 0;
    if (n->layer) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / sqrtf(sum / size + (float)n->eps);
    for (int64_t i = 0; i < size; i++) out[i] = (x[i] - mean) * inverse * n->weight[i];
    for (int64_t i = 0; i < size && n->bias; i++) out[i] += n->bias[i];
}

/* Activations of one step, float32: (rows, ...) each. */
typedef struct {
    float *input, *second, *projected, *attended, *inner, *branch, *scores; /* scores: a room of each thread */
    int64_t each; /* floats of one */
    char *arranged, *rooms;
} workspace;

/* out (rows, all projections) = `count` projections of x (rows, columns), one after the other in a row; or added to it. */
static void project(const stack *s, const projection *parts, int count, const float *x, int64_t rows, float *const *outs, int adds,
                    const workspace *own) {
    meeting met = {0};
    for (int i = 0; i < count; i++) {
        const projection *part = parts + i;
        if (!part->w.bytes) continue;
        const meeting m = meet(part->kind, part->w.columns, s->narrow, rows);
        if (m.order != met.order || m.how != met.how || m.stride != met.stride) {
#pragma omp barrier
            arrange(&m, x, 0, rows, part->w.columns, own->arranged);
            met = m;
        }
        const product p = {&part->w, own->arranged, m.stride, rows, part->bias, outs[i], 0, adds, m.sums};
        multiply(part->kind, &m, &p, own->rooms);
    }
#pragma omp barrier
}

typedef struct {
    const float *q; /* (query heads, size), those of one key-value head */
    float *k, *v;
} heads;

/* Where the queries, the key and the value of a row's key-value head lie. */
INLINE heads heads_of(const stack *s, const workspace *own, const step *now, int64_t row, int64_t head) {
    const int64_t group = s->heads / s->kv_heads, size = s->size, width = (s->heads + 2 * s->kv_heads) * size;
    float *at = own->projected + row * width;
    if (s->fused == PER_HEAD) {
        at += head * (group + 2) * size;
        return (heads){at, at + group * size, at + (group + 1) * size};
    }
    if (s->fused == BLOCKS) {
        float *k = at + s->heads * size + head * size;
        return (heads){at + head * group * size, k, k + s->kv_heads * size};
    }
    float *q = own->projected + row * s->heads * size;
    float *k = own->projected + now->rows * s->heads * size + row * s->kv_heads * size;
    return (heads){q + head * group * size, k + head * size, k + (now->rows * s->kv_heads + head) * size};
}

INLINE void turn(const stack *s, const step *now, int64_t row, float *x) {
    const int64_t half = s->rotated / 2;
    const float *cosine = now->cosine + row * s->rotated, *sine = now->sine + row * s->rotated;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i + half] + first * sine[i + half];
    }
}

INLINE pool pool_of(const stack *s, const layer *l, const step *now) {
    return (pool){s->kv_heads, now->slots, s->size, now->stored, l->keys, l->values, l->key_scales, l->value_scales};
}

INLINE sight sight_of(const stack *s, const step *now, int64_t row, int64_t head) {
    const int64_t at = row * now->mask_row + head * now->mask_head;
    return (sight){now->length,
                   row * s->kv_heads * now->slots,
                   now->table ? now->table + row * now->length : NULL,
                   now->masking == BOOLEAN ? (const uint8_t *)now->mask + row * now->mask_row : NULL,
                   now->masking == ADDITIVE ? (const float *)now->mask + at : NULL,
                   now->mask_head};
}

/* Keep a key or value (size) in its slot; as codes with a scale for the largest of them. */
INLINE void keep(enum stored_as kind, const float *x, int64_t size, char *kept, float *scales, int64_t slot) {
    float most = FLT_MIN * 127;
    for (int64_t j = 0; j < size && kind == CODES; j++) most = __builtin_fabsf(x[j]) > most ? __builtin_fabsf(x[j]) : most;
    if (kind == CODES) scales[slot] = most / 127;
    for (int64_t j = 0, at = slot * size; j < size; j++, at++)
        if (kind == CODES)
            ((int8_t *)kept)[at] = (int8_t)__builtin_rintf(x[j] / (most / 127));
        else if (kind == BFLOAT16)
            ((uint16_t *)kept)[at] = narrow(x[j]);
        else
            ((float *)kept)[at] = x[j];
}

/* The new token's queries, keys and values: clipped, normed, rotated, and written into the cache. */
static void remember(const stack *s, const layer *l, const step *now, const workspace *own) {
    const int64_t group = s->heads / s->kv_heads, size = s->size;
    const pool p = pool_of(s, l, now);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < now->rows * s->kv_heads; task++) {
        const int64_t row = task / s->kv_heads, head = task % s->kv_heads;
        const heads at = heads_of(s, own, now, row, head);
        for (int64_t i = 0; i < group + 2; i++) {
            float *x = i < group ? (float *)at.q + i * size : i == group ? at.k : at.v;
            for (int64_t j = 0; j < size && s->clip > 0; j++)
                x[j] = x[j] > s->clip ? s->clip : x[j] < -s->clip ? -s->clip : x[j];
            const norm *n = i < group ? &l->q_norm : &l->k_norm;
            if (i <= group && n->weight) normalise(n, x, size, x);
            if (i <= group && s->rotated) turn(s, now, row, x);
        }
        const sight seen = sight_of(s, now, row, head);
        const int64_t slot = slot_of(&p, &seen, head, now->length - 1);
        keep(p.stored, at.k, size, p.keys, p.key_scales, slot);
        keep(p.stored, at.v, size, p.values, p.value_scales, slot);
    }
}

/* By key-value heads, each read once; where there are too few of them for the team, by query heads. */
static void attend_all(const stack *s, const layer *l, const step *now, const workspace *own) {
    const int64_t group = s->heads / s->kv_heads, each = now->rows * s->kv_heads < s->threads ? 1 : group;
    const pool p = pool_of(s, l, now);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < now->rows * s->heads / each; task++) {
        const int64_t head = task * each % s->heads, row = task * each / s->heads, kv = head / group;
        const sight seen = sight_of(s, now, row, head);
        const float *q = heads_of(s, own, now, row, kv).q + head % group * s->size;
        attend(&p, &seen, kv, each, q, (float)l->scale, own->attended + (row * s->heads + head) * s->size,
               own->scores + THREAD * own->each);
    }
}

static void norm_rows(const norm *n, const float *x, int64_t rows, int64_t size, float *out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) normalise(n, x + row * size, size, out + row * size);
}

static void activate_rows(const stack *s, int gated, int64_t rows, const workspace *own) {
    enum { PIECE = 1024 };
    const int64_t total = rows * s->inner;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < total; first += PIECE) {
        const int64_t count = min(PIECE, total - first);
        float *gate = own->inner + first, *up = gate + total;
#define EACH(KIND) \
    for (int64_t i = 0; i < count; i++) gate[i] = activate(KIND, gate[i])
        switch (s->activation) {
        case SILU: EACH(SILU); break;
        case GELU: EACH(GELU); break;
        case GELU_TANH: EACH(GELU_TANH); break;
        default: EACH(RELU);
        }
        for (int64_t i = 0; i < count && gated; i++) gate[i] *= up[i];
    }
}

/* A branch's product, added to x; through a norm of its own where there is one. */
static void join(const projection *last, const float *from, const norm *after, const stack *s, const step *now,
                 const workspace *own) {
    const int alone = now->part != WHOLE_LAYER, apart = alone || after->weight;
    float *outs[] = {alone ? now->branch : apart ? own->branch : now->x};
    project(s, last, 1, from, now->rows, outs, !apart, own);
    if (alone || !apart) return;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < now->rows; row++) {
        float *branch = own->branch + row * s->hidden;
        normalise(after, branch, s->hidden, branch);
        for (int64_t i = 0; i < s->hidden; i++) now->x[row * s->hidden + i] += branch[i];
    }
}

static void run_attention(const stack *s, const layer *l, const step *now, const workspace *own) {
    const int64_t rows = now->rows, query = s->heads * s->size, key = s->kv_heads * s->size;
    float *k = own->projected + rows * query, *outs[] = {own->projected, k, k + rows * key};
    norm_rows(&l->before_attention, now->x, rows, s->hidden, own->input);
    project(s, &l->q, 3, own->input, rows, outs, 0, own);
    remember(s, l, now, own);
    attend_all(s, l, now, own);
}

static void run_layer(const stack *s, const layer *l, const step *now, const workspace *own) {
    const norm *before = l->before_mlp.weight ? &l->before_mlp : &l->before_attention;
    const int gated = l->up.w.bytes != NULL; /* else `gate` is the only one */
    float *halves[] = {own->inner, gated ? own->inner + now->rows * s->inner : own->inner};
    if (s->parallel) norm_rows(before, now->x, now->rows, s->hidden, own->second);
    if (now->part != FEED_FORWARD) {
        run_attention(s, l, now, own);
        join(&l->o, own->attended, &l->after_attention, s, now, own);
    }
    if (now->part == ATTENTION) return;
    if (!s->parallel) norm_rows(before, now->x, now->rows, s->hidden, own->second);
    project(s, &l->gate, 2, own->second, now->rows, halves, 0, own);
    activate_rows(s, gated, now->rows, own);
    join(&l->down, own->inner, &l->after_mlp, s, now, own);
}

static size_t up(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* x becomes what the last of `count` layers gives. Returns 1 where memory is short, else 0. */
int decode(const stack *s, const layer *layers, int64_t count, const step *now) {
    const int64_t rows = now->rows, query = s->heads * s->size, key = s->kv_heads * s->size;
    const size_t hidden = up(rows * s->hidden * 4), inner = up(rows * s->inner * 4);
    size_t arranged = 0, each = 0;
    for (int64_t i = 0; i < count; i++) {
        const projection *parts = &layers[i].q;
        for (int j = 0; j < 7; j++) {
            if (!parts[j].w.bytes) continue;
            const meeting m = meet(parts[j].kind, parts[j].w.columns, s->narrow, rows);
            arranged = max(arranged, m.arranged);
            each = max(each, m.each);
        }
    }
    const pool any = pool_of(s, layers, now);
    const int64_t own_room = up(room_of(&any, s->heads / s->kv_heads, now->length) * 4);
    const size_t projected = up(rows * (query + 2 * key) * 4), scores = s->threads * own_room;
    char *room = aligned_alloc(64, 3 * hidden + projected + up(rows * query * 4) + 2 * inner + scores + up(arranged) +
                                       s->threads * up(each));
    if (!room) return 1;
    char *at = room;
    workspace own;
#define TAKE(type, name, bytes) own.name = (type *)at, at += (bytes)
    TAKE(float, input, hidden);
    TAKE(float, second, hidden);
    TAKE(float, branch, hidden);
    TAKE(float, projected, projected);
    TAKE(float, attended, up(rows * query * 4));
    TAKE(float, inner, 2 * inner);
    TAKE(float, scores, scores);
    TAKE(char, arranged, up(arranged));
    own.rooms = at, own.each = own_room / 4;
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    for (int64_t i = 0; i < count; i++) run_layer(s, layers + i, now, &own);
    free(room);
    return 0;
}
