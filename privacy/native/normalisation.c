/* Per-example gradients of each channel's scale and shift behind a normalisation, channels last:

       scale[c] = sum over positions p of gradient[p][c] * (image[p][c] - mean) * inverse
       shift[c] = sum over positions p of gradient[p][c]

   in one pass over both, and their squared norms. The channels are the inner loop: they are the
   neighbours in memory, so that it becomes vectors with a sum for each channel. The input gradient
   of the normalisation is made of the same sums while the example is in the cache. Floats are added
   up over a few positions at a time, and these sums in doubles: long sums in floats would come out
   too small, and the norm with them. */

#include <string.h>

#include "team.h"

enum { RUN = 64, MOST = 4096 }; /* positions added up in floats; channels, as the caller checks */

/* As privacy/clipping/affine.py declares it. */
typedef struct {
    long examples, positions, channels, groups;
    long fixed; /* whether all examples have one mean and inverse deviation */
    const float *images, *gradient, *mean, *inverse;
    const float *weight; /* [channels], the scale, where the input gradient is wanted */
    float *scale, *shift, *input_gradient;
    double *squares; /* [2][examples]: of scale, of shift */
    long next;       /* 0 */
} work;

static void sums(const work *w, long i)
{
    const long count = w->channels, width = count / w->groups;
    const float *x = w->images + i * w->positions * count;
    const float *dy = w->gradient + i * w->positions * count;
    const float *mean = w->mean + (w->fixed ? 0 : i * w->groups);
    const float *inverse = w->inverse + (w->fixed ? 0 : i * w->groups);
    float centre[MOST], product[MOST], total[MOST];
    double products[MOST], totals[MOST];
    for (long c = 0; c < count; c++) {
        centre[c] = mean[c / width];
        products[c] = totals[c] = 0;
    }
    for (long p = 0; p < w->positions;) {
        const long end = p + RUN < w->positions ? p + RUN : w->positions;
        memset(product, 0, sizeof(float) * count);
        memset(total, 0, sizeof(float) * count);
        for (; p < end; p++, x += count, dy += count)
            for (long c = 0; c < count; c++) {
                total[c] += dy[c];
                product[c] += dy[c] * (x[c] - centre[c]);
            }
        for (long c = 0; c < count; c++) {
            products[c] += product[c];
            totals[c] += total[c];
        }
    }
    double scales = 0, shifts = 0;
    for (long c = 0; c < count; c++) {
        const float scale = products[c] * inverse[c / width], shift = totals[c];
        w->scale[i * count + c] = scale;
        w->shift[i * count + c] = shift;
        scales += (double)scale * scale;
        shifts += (double)shift * shift;
    }
    w->squares[i] = scales;
    w->squares[w->examples + i] = shifts;
}

/* With s = 1 / (values in a group) and sums over a group's channels c, weighted by the channel's scale,
   dx = weight * inverse * dy - inverse * s * (sum of shift + normalised x * sum of scale). */
static void input_gradient(const work *w, long i)
{
    const long count = w->channels, width = count / w->groups, size = w->positions * count;
    const float *x = w->images + i * size, *dy = w->gradient + i * size;
    const float *scale = w->scale + i * count, *shift = w->shift + i * count;
    float *dx = w->input_gradient + i * size;
    float factor[MOST], slope[MOST], centre[MOST], offset[MOST];
    for (long g = 0; g < w->groups; g++) {
        const double mean = w->mean[i * w->groups + g], inverse = w->inverse[i * w->groups + g];
        const double part = inverse / ((double)width * w->positions);
        double scales = 0, shifts = 0;
        for (long c = g * width; c < (g + 1) * width; c++) {
            scales += (double)w->weight[c] * scale[c];
            shifts += (double)w->weight[c] * shift[c];
        }
        for (long c = g * width; c < (g + 1) * width; c++) {
            factor[c] = w->weight[c] * inverse;
            slope[c] = -scales * inverse * part;
            centre[c] = mean;
            offset[c] = -shifts * part;
        }
    }
    for (long p = 0; p < w->positions; p++, x += count, dy += count, dx += count)
        for (long c = 0; c < count; c++)
            dx[c] = factor[c] * dy[c] + (slope[c] * (x[c] - centre[c]) + offset[c]);
}

static void each(void *shared)
{
    work *w = shared;
    for (long i = take(&w->next); i < w->examples; i = take(&w->next)) {
        sums(w, i);
        if (w->input_gradient) input_gradient(w, i);
    }
}

void affine_gradients(work *shared, parallel team, unsigned threads)
{
    together(each, shared, team, threads);
}
