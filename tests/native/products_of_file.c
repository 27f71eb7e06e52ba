/* Products of the cases in a file, for processors that the tests do not run on: `matmul` with what test_arm.py wrote, in the
 * order of its `request`, and the results into a second file. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int matmul(const void *request);

static void *read_part(FILE *file) { /* a length, then so many bytes; none for length 0 */
    int64_t size;
    if (fread(&size, 8, 1, file) != 1) exit(2);
    void *part = size ? aligned_alloc(64, (size + 127) / 64 * 64) : NULL;
    if (size && fread(part, 1, size, file) != (size_t)size) exit(2);
    return part;
}

int main(int count, char **words) {
    FILE *from = count == 3 ? fopen(words[1], "rb") : NULL, *to = count == 3 ? fopen(words[2], "wb") : NULL;
    int64_t numbers[5]; /* kind, rows, columns, whether x is bfloat16, tokens */
    while (from && to && fread(numbers, 8, 5, from) == 5) {
        int64_t request[15] = {numbers[0]};
        for (int i = 0; i < 6; i++) request[1 + i] = (int64_t)read_part(from);
        request[7] = numbers[1], request[8] = numbers[2];
        request[9] = (int64_t)read_part(from);
        request[10] = numbers[3], request[11] = numbers[4];
        request[12] = (int64_t)read_part(from);
        const int64_t size = numbers[4] * numbers[1] * (numbers[3] ? 2 : 4);
        request[13] = (int64_t)malloc(size), request[14] = 2;
        if (matmul(request)) return 3;
        fwrite((void *)request[13], 1, size, to);
    }
    return !(from && to && !fclose(to));
}
