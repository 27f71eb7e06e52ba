/* Attention of one query a row over keys and values in slots of a pool, on a CPU.
 *
 * A key-value head of a row is read once, where it lies, for all the query heads that share it; scores, softmax and sums
 * are in float32. Vectors are the compiler's, lowered to what the processor has.
 */

#include <math.h>

#include "weights.h"

#define LANES 16
#define MOST_SIZE 256

typedef int64_t big;
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));

enum stored_as { FLOAT32, BFLOAT16, CODES };
static const big BYTES[] = {4, 2, 1};

/* Packed by Python: one word each. q and out (rows, heads, size) are stored as `x`; keys and values (kv_heads, slots,
 * size) as `stored`, times scales (kv_heads, slots) where that is CODES. table (rows, length). A row sees what its mask
 * (rows, length) shows, or every slot, its scores plus bias (rows, heads, length), stored as `x`; either may be NULL. */
typedef struct {
    big rows, heads, kv_heads, slots, size, length, x, stored;
    const char *q, *keys, *values;
    const float *key_scales, *value_scales;
    const big *table;
    const uint8_t *mask;
    const char *bias;
    char *out;
    double scale;
    big threads;
} request;

INLINE float get(big kind, const char *from, big at) {
    return kind == FLOAT32 ? ((const float *)from)[at] : widen(((const uint16_t *)from)[at]);
}

INLINE vec load(const enum stored_as kind, const char *from) {
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

/* One row's queries of one key-value head; `room` holds 2 * group * size + group * padded floats. */
INLINE void attend(const enum stored_as kind, const big size, const request *r, big row, big kv, float *room) {
    const big n = r->length, group = r->heads / r->kv_heads, padded = (n + LANES - 1) / LANES * LANES;
    const big first = (row * r->heads + kv * group) * size, *slots = r->table + row * n;
    const uint8_t *mask = r->mask ? r->mask + row * n : NULL;
    float *query = room, *sum = query + group * size, *score = sum + group * size;
    for (big i = 0; i < group * size; i++) query[i] = get(r->x, r->q, first + i) * (float)r->scale;
    memset(sum, 0, group * size * sizeof(float));
    for (big i = 0; i < group * padded; i++) score[i] = -INFINITY;
    for (big j = 0; j < n; j++) {
        if (mask && !mask[j]) continue;
        const big at = kv * r->slots + slots[j];
        const float scale = kind == CODES ? r->key_scales[at] : 1;
        vec key[MOST_SIZE / LANES];
        for (big d = 0; d < size; d += LANES) key[d / LANES] = load(kind, r->keys + (at * size + d) * BYTES[kind]);
        for (big g = 0; g < group; g++) {
            vec dots = {};
            for (big d = 0; d < size; d += LANES) dots += *(const vec *)(query + g * size + d) * key[d / LANES];
            score[g * padded + j] = total(dots) * scale;
        }
    }
    for (big g = 0; g < group; g++) {
        float *line = score + g * padded, most = -INFINITY;
        vec all = {};
        if (r->bias)
            for (big j = 0; j < n; j++) line[j] += get(r->x, r->bias, (row * r->heads + kv * group + g) * n + j);
        for (big j = 0; j < n; j++) most = line[j] > most ? line[j] : most;
        for (big j = 0; j < padded; j += LANES) {
            const vec x = *(vec *)(line + j), share = exponential(x - most);
            all += *(vec *)(line + j) = (vec)((words)share & (x > -INFINITY));
        }
        const float whole = 1 / total(all);
        for (big j = 0; j < n; j++) line[j] *= whole;
    }
    for (big j = 0; j < n; j++) {
        if (mask && !mask[j]) continue;
        const big at = kv * r->slots + slots[j];
        const float scale = kind == CODES ? r->value_scales[at] : 1;
        vec value[MOST_SIZE / LANES];
        for (big d = 0; d < size; d += LANES) value[d / LANES] = load(kind, r->values + (at * size + d) * BYTES[kind]);
        for (big g = 0; g < group; g++) {
            const float share = score[g * padded + j] * scale;
            for (big d = 0; d < size; d += LANES) *(vec *)(sum + g * size + d) += share * value[d / LANES];
        }
    }
    for (big i = 0; i < group * size; i++)
        if (r->x == FLOAT32)
            ((float *)r->out)[first + i] = sum[i];
        else
            ((uint16_t *)r->out)[first + i] = narrow(sum[i]);
}

/* A function each, so that the kind and the usual sizes are constants in it. */
#define ATTEND(NAME, KIND)                                              \
    static void NAME(const request *r, big row, big kv, float *room) {  \
        if (r->size == 64) attend(KIND, 64, r, row, kv, room);          \
        else if (r->size == 128) attend(KIND, 128, r, row, kv, room);   \
        else attend(KIND, r->size, r, row, kv, room);                   \
    }
ATTEND(of_float32, FLOAT32)
ATTEND(of_bfloat16, BFLOAT16)
ATTEND(of_int8, CODES)

/* Returns 1 where memory is short, else 0. `size` is a multiple of LANES, at most MOST_SIZE. */
int paged_attention(const request *r) {
    void (*const runs[])(const request *, big, big, float *) = {of_float32, of_bfloat16, of_int8};
    const big group = r->heads / r->kv_heads, each = group * (2 * r->size + r->length + LANES);
    float *room = malloc(r->threads * each * sizeof(float));
    if (!room) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->threads > 1)
    for (big task = 0; task < r->rows * r->kv_heads; task++)
        runs[r->stored](r, task / r->kv_heads, task % r->kv_heads, room + THREAD * each);
    free(room);
    return 0;
}
