/* Attention of one query a row over keys and values in slots, on a CPU.
 *
 * A key-value head of a row is read once, where it lies, for all the query heads that share it; scores, softmax and sums
 * are in float32. Vectors are the compiler's, lowered to what the processor has.
 */

#include <math.h>

#include "attention.h"

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));

static const int64_t BYTES[] = {4, 2, 1};

/* The first of `left` numbers, zeros beyond the last. */
INLINE vec load(const enum stored_as kind, const char *from, int64_t left) {
    if (left < LANE) {
        vec x = {};
        for (int64_t i = 0; i < left; i++)
            x[i] = kind == FLOAT32 ? ((const float *)from)[i] : kind == CODES ? ((const int8_t *)from)[i]
                                    : widen(((const uint16_t *)from)[i]);
        return x;
    }
    if (kind == FLOAT32) return *(const vec *)from;
    if (kind == CODES) return __builtin_convertvector(__builtin_convertvector(*(const bytes *)from, words), vec);
    return (vec)(__builtin_convertvector(*(const halves *)from, words) << 16);
}

INLINE float total(vec x) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    const union { vec all; eight half[2]; } wide = {x};
    const union { eight all; four half[2]; } middle = {wide.half[0] + wide.half[1]};
    const four last = middle.half[0] + middle.half[1];
    return (last[0] + last[2]) + (last[1] + last[3]);
}

/* e^x for x <= 0, to a few units in the last place, at least e^-87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vec exponential(vec x) {
    const vec least = (vec){} - 87.0f, magic = (vec){} + 12582912.0f; /* rounds what is added to it */
    const words low = x < least;
    x = (vec)(((words)least & low) | ((words)x & ~low));
    const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((words)p + (((words)shifted - (words)magic) << 23));
}

INLINE void attend_as(const enum stored_as kind, const int64_t size, const pool *p, const sight *s, int64_t kv,
                      int64_t heads, const float *q, float scale, float *out, float *room) {
    const int64_t n = s->length, wide = padded(size), line = padded(n);
    float *query = room, *sum = query + heads * wide, *scores = sum + heads * wide;
    memset(room, 0, 2 * heads * wide * sizeof(float));
    for (int64_t g = 0; g < heads; g++)
        for (int64_t i = 0; i < size; i++) query[g * wide + i] = q[g * size + i] * scale;
    for (int64_t i = 0; i < heads * line; i++) scores[i] = -INFINITY;
    for (int64_t j = 0; j < n; j++) {
        if (s->mask && !s->mask[j]) continue;
        const int64_t at = slot_of(p, s, kv, j);
        const float unit = kind == CODES ? p->key_scales[at] : 1;
        vec key[MOST_SIZE / LANE];
        for (int64_t d = 0; d < size; d += LANE)
            key[d / LANE] = load(kind, p->keys + (at * size + d) * BYTES[kind], size - d);
        for (int64_t g = 0; g < heads; g++) {
            vec dots = {};
            for (int64_t d = 0; d < size; d += LANE) dots += *(const vec *)(query + g * wide + d) * key[d / LANE];
            scores[g * line + j] = total(dots) * unit;
        }
    }
    for (int64_t g = 0; g < heads; g++) {
        float *own = scores + g * line, most = -INFINITY;
        vec all = {};
        for (int64_t j = 0; j < n && s->bias; j++) own[j] += s->bias[g * s->apart + j];
        for (int64_t j = 0; j < n; j++) most = own[j] > most ? own[j] : most;
        for (int64_t j = 0; j < line; j += LANE) {
            const vec x = *(vec *)(own + j), share = exponential(x - most);
            all += *(vec *)(own + j) = (vec)((words)share & (x > -INFINITY));
        }
        const float whole = 1 / total(all);
        for (int64_t j = 0; j < n; j++) own[j] *= whole;
    }
    for (int64_t j = 0; j < n; j++) {
        if (s->mask && !s->mask[j]) continue;
        const int64_t at = slot_of(p, s, kv, j);
        const float unit = kind == CODES ? p->value_scales[at] : 1;
        vec value[MOST_SIZE / LANE];
        for (int64_t d = 0; d < size; d += LANE)
            value[d / LANE] = load(kind, p->values + (at * size + d) * BYTES[kind], size - d);
        for (int64_t g = 0; g < heads; g++) {
            const float share = scores[g * line + j] * unit;
            for (int64_t d = 0; d < size; d += LANE) *(vec *)(sum + g * wide + d) += share * value[d / LANE];
        }
    }
    for (int64_t g = 0; g < heads; g++) memcpy(out + g * size, sum + g * wide, size * sizeof(float));
}

/* A function each, so that the kind and the usual sizes are constants in it. */
#define ATTEND(NAME, KIND)                                                                                         \
    static void NAME(const pool *p, const sight *s, int64_t kv, int64_t heads, const float *q, float scale,        \
                     float *out, float *room) {                                                                    \
        if (p->size == 64) attend_as(KIND, 64, p, s, kv, heads, q, scale, out, room);                              \
        else if (p->size == 128) attend_as(KIND, 128, p, s, kv, heads, q, scale, out, room);                       \
        else attend_as(KIND, p->size, p, s, kv, heads, q, scale, out, room);                                       \
    }
ATTEND(of_float32, FLOAT32)
ATTEND(of_bfloat16, BFLOAT16)
ATTEND(of_codes, CODES)

void attend(const pool *p, const sight *s, int64_t kv, int64_t heads, const float *q, float scale, float *out,
            float *room) {
    (p->stored == FLOAT32 ? of_float32 : p->stored == CODES ? of_codes : of_bfloat16)(p, s, kv, heads, q, scale, out, room);
}

/* Packed by Python: one word each. q and out (rows, heads, size) float32; table (rows, length); mask (rows, length) and
 * bias (rows, heads, length) may be NULL. */
typedef struct {
    pool in;
    int64_t rows, heads, length;
    const float *q;
    const int64_t *table;
    const uint8_t *mask;
    const float *bias;
    float *out;
    double scale;
    int64_t threads;
} request;

/* Returns 1 where memory is short, else 0. */
int paged_attention(const request *r) {
    const int64_t group = r->heads / r->in.kv_heads, each = room_of(&r->in, group, r->length);
    float *room = malloc(r->threads * each * sizeof(float));
    if (!room) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->threads > 1)
    for (int64_t task = 0; task < r->rows * r->in.kv_heads; task++) {
        const int64_t row = task / r->in.kv_heads, kv = task % r->in.kv_heads, head = row * r->heads + kv * group;
        const sight seen = {r->length, 0, r->table + row * r->length, r->mask ? r->mask + row * r->length : NULL,
                            r->bias ? r->bias + head * r->length : NULL, r->length};
        attend(&r->in, &seen, kv, group, r->q + head * r->in.size, (float)r->scale, r->out + head * r->in.size,
               room + THREAD * each);
    }
    free(room);
    return 0;
}
