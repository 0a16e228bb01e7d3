/* Per-example weight gradients of a dense convolution, straight from the images.

   The gradient of one example is, for every tap j of the kernel and every output channel o,

       out[j][o] = sum over positions p of image[position[p] + tap[j]] * gradient[p][o]

   and needs no patches: a few taps and a few vectors of output channels are summed up in the
   processor's registers over all positions, and written once. Positions are the innermost loop for
   that reason: any other order would write each sum to memory and read it again at every position.
   Channels are last in memory, so that one value of the image meets a whole vector of output
   channels, and every sum of a tile goes on by itself: nothing is ever added across a vector.

   Squared norms are taken of the very numbers that are written, in doubles, while they are in
   registers: they need no allowance for rounding. What a convolution is (stride, padding, dilation,
   dimensions, copies of one example) is in the two tables, which the caller makes and answers for.

   Compiled once for each width of vectors, VECTOR bytes. */

#include <string.h>

#include "team.h"

#define LANES (VECTOR / 4)

typedef float vector __attribute__((vector_size(VECTOR)));
typedef float unaligned __attribute__((vector_size(VECTOR), aligned(4), may_alias));
typedef double wide __attribute__((vector_size(2 * VECTOR)));

/* As privacy/clipping/direct.py declares it. */
typedef struct {
    long examples;
    long lines, line_length; /* of the images of one example, as they lie in memory */
    long padded_length;      /* of the same images with a border of zeros, 0 if none is needed */
    long positions, taps;
    long outputs; /* a multiple of 16 */
    long keep;    /* whether each example has its own place in `out`, or each thread */
    long shares;  /* of the examples, each summed up by one thread, where there are factors */
    const long *line, *position, *tap;
    const float *images, *gradient, *factors; /* factors: [examples], or none */
    float *out, *padded, *sums;               /* sums: [shares], zeros, of factor times gradient */
    double *squares;
    long next, next_thread; /* 0 */
} work;

typedef struct {
    long positions, outputs;
    const long *position, *tap;
    const float *image, *gradient;
    float *out;
} tile;

/* Sums up T taps and V vectors; the loops over them are unrolled and `sum` lies in registers. */
#define TILE(KIND, V, T, TAP)                                                          \
    static __attribute__((noinline)) double KIND##_##V##_##T(const tile *t)            \
    {                                                                                  \
        vector sum[T][V];                                                              \
        const float *gradient = t->gradient;                                           \
        const long *tap = t->tap;                                                      \
        (void)tap; /* unused where taps lie side by side */                            \
        UNROLL for (int i = 0; i < T; i++)                                             \
            UNROLL for (int v = 0; v < V; v++) sum[i][v] = (vector){0};                \
        for (long p = 0; p < t->positions; p++, gradient += t->outputs) {              \
            const float *pixel = t->image + t->position[p];                            \
            vector dy[V];                                                              \
            UNROLL for (int v = 0; v < V; v++)                                         \
                dy[v] = *(const unaligned *)(gradient + v * LANES);                    \
            UNROLL for (int i = 0; i < T; i++)                                         \
                UNROLL for (int v = 0; v < V; v++) sum[i][v] += pixel[TAP] * dy[v];    \
        }                                                                              \
        wide squares = {0};                                                            \
        UNROLL for (int i = 0; i < T; i++)                                             \
            UNROLL for (int v = 0; v < V; v++) {                                       \
                *(unaligned *)(t->out + i * t->outputs + v * LANES) = sum[i][v];       \
                wide exact = __builtin_convertvector(sum[i][v], wide);                 \
                squares += exact * exact;                                              \
            }                                                                          \
        double total = 0;                                                              \
        for (int lane = 0; lane < LANES; lane++) total += squares[lane];               \
        return total;                                                                  \
    }

#define UNROLL _Pragma("GCC unroll 32")
#define RUN(V, T) TILE(run, V, T, i)          /* taps that lie side by side in the image */
#define APART(V, T) TILE(apart, V, T, tap[i]) /* any taps: images of few channels */

/* Tiles that fill the registers: 16 vectors of 32 bytes, 32 of 64 or 16. The first that fits is
   taken; `apart` with one tap always does. */
#if VECTOR == 32
RUN(2, 6) RUN(2, 4) APART(2, 6) APART(2, 3) APART(2, 1)
#define WIDTHS WIDTH(2, IF(run, 2, 6) IF(run, 2, 4) IF(apart, 2, 6) IF(apart, 2, 3) IF(apart, 2, 1))
#else
RUN(4, 6) RUN(4, 4) APART(4, 3) APART(4, 1)
RUN(2, 12) RUN(2, 4) APART(2, 9) APART(2, 3) APART(2, 1)
RUN(1, 24) RUN(1, 12) RUN(1, 4) APART(1, 9) APART(1, 3) APART(1, 1)
#define WIDTHS                                                                                   \
    WIDTH(4, IF(run, 4, 6) IF(run, 4, 4) IF(apart, 4, 3) IF(apart, 4, 1))                        \
    WIDTH(2, IF(run, 2, 12) IF(run, 2, 4) IF(apart, 2, 9) IF(apart, 2, 3) IF(apart, 2, 1))       \
    WIDTH(1, IF(run, 1, 24) IF(run, 1, 12) IF(run, 1, 4) IF(apart, 1, 9) IF(apart, 1, 3)         \
                 IF(apart, 1, 1))
#endif

#define FITS_run(T) (tap[T - 1] - tap[0] == T - 1)
#define FITS_apart(T) 1
#define START_run tap[0]
#define START_apart 0
#define IF(KIND, V, T)                                                                     \
    if (left >= T && FITS_##KIND(T)) {                                                     \
        const tile part = {w->positions, w->outputs, w->position, tap,                     \
                           image + START_##KIND, gradient + o, out + j * w->outputs + o};  \
        squares += KIND##_##V##_##T(&part);                                                \
        j += T;                                                                            \
        continue;                                                                          \
    }
#define WIDTH(V, TILES)                                     \
    for (; o + V * LANES <= w->outputs; o += V * LANES)     \
        for (long j = 0; j < w->taps;) {                    \
            const long *tap = w->tap + j;                   \
            const long left = w->taps - j;                  \
            TILES                                           \
        }

/* One example's gradient, and its squared norm. */
static double gradient_of(const work *w, const float *image, const float *gradient, float *out)
{
    double squares = 0;
    long o = 0;
    WIDTHS
    return squares;
}

/* Example i, from its images as they lie or, where they need a border, from a copy that has one. The
   copy's border is zero from the start and stays so: only the lines inside of it are written. */
static void one(const work *w, long i, float *padded, float *out)
{
    const float *image = w->images + i * w->lines * w->line_length;
    if (w->padded_length) {
        for (long line = 0; line < w->lines; line++)
            memcpy(padded + w->line[line], image + line * w->line_length,
                   sizeof(float) * w->line_length);
        image = padded;
    }
    w->squares[i] = gradient_of(w, image, w->gradient + i * w->positions * w->outputs, out);
}

/* Without factors every thread takes one example after the other. With factors each share of the
   examples is added up by one thread in the examples' own order, so that the sum does not depend on
   which thread was faster. */
static void each(void *shared)
{
    work *w = shared;
    const long size = w->taps * w->outputs, thread = take(&w->next_thread);
    float *padded = w->padded + thread * w->padded_length, *own = w->out + thread * size;
    for (long next = take(&w->next); next < (w->factors ? w->shares : w->examples);
         next = take(&w->next)) {
        if (!w->factors) {
            one(w, next, padded, w->keep ? w->out + next * size : own);
            continue;
        }
        float *sum = w->sums + next * size;
        const long end = (next + 1) * w->examples / w->shares;
        for (long i = next * w->examples / w->shares; i < end; i++) {
            one(w, i, padded, own);
            for (long j = 0; j < size; j++) sum[j] += w->factors[i] * own[j];
        }
    }
}

void convolution_gradients(work *shared, parallel team, unsigned threads)
{
    together(each, shared, team, threads);
}
