/* Attention of one query a row over keys and values in slots: those of a pool of pages, or of a cache by rows. */

#pragma once
#include "weights.h"

#define LANE 16 /* floats worked on at once */
#define MOST_SIZE 512 /* of a head */

enum stored_as { FLOAT32, BFLOAT16, CODES };

/* What one layer keeps: keys and values (kv_heads, slots, size) as `stored` says, times scales (kv_heads, slots) where
 * that is CODES. */
typedef struct {
    int64_t kv_heads, slots, size, stored;
    char *keys, *values;
    float *key_scales, *value_scales;
} pool;

/* What a row sees: `length` slots, of its table or without one in a row from `first` on. `mask` shows some of them, all
 * where it is NULL; `bias` is added to the scores, `apart` numbers from one query head to the next, or NULL. */
typedef struct {
    int64_t length, first;
    const int64_t *table;
    const uint8_t *mask;
    const float *bias;
    int64_t apart;
} sight;

INLINE int64_t padded(int64_t count) { return (count + LANE - 1) / LANE * LANE; }

/* The at-th slot of a key-value head. */
INLINE int64_t slot_of(const pool *p, const sight *s, int64_t kv, int64_t at) {
    return kv * p->slots + (s->table ? s->table[at] : s->first + at);
}

/* Floats of the room that `attend` needs. */
INLINE int64_t room_of(const pool *p, int64_t heads, int64_t length) { return heads * (2 * padded(p->size) + padded(length)); }

/* out (heads, size) = softmax(scale q k^T + bias) v of query heads (heads, size) that share the key-value head `kv`. */
SHARED void attend(const pool *p, const sight *s, int64_t kv, int64_t heads, const float *q, float scale, float *out,
                   float *room);
