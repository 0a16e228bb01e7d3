/* Gaussian noise of uniform words, by the transform of Box and Muller, in double precision.

   A word's low 53 bits are a uniform number: the centre of one of 2^53 cells of (0, 1), never 0, so
   that the logarithm is finite. Logarithm, sine and cosine are fdlibm's (Sun Microsystems, 1993)
   without their special cases, so that the loop has no branch and the compiler makes vectors of it.
   The constants are fdlibm's to the last digit: they are what its error bounds were proved for. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#define TWO_52 0x4330000000000000 /* the bits of 2^52 */
enum { TAKEN = 4096 }; /* pairs that a thread takes at a time: their noise is added from the cache */

/* As privacy/noise.py declares it. */
typedef struct {
    long pairs;
    double *numbers; /* [2][pairs]: words, in whose place the normal numbers come */
    long next;       /* 0 */
    long pieces; /* which the numbers are added to, one after the other; together at most 2 pairs */
    const long *lengths;
    float *const *values;
    double deviation, scale;
} work;

static inline double number(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint64_t bits(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* A whole number below 2^53. Not every processor converts 64-bit numbers by the vector: 52 bits can
   be the last digits of 2^52. */
static inline double whole(uint64_t n)
{
#ifdef __AVX512DQ__
    return (int64_t)n;
#else
    return 2 * (number(n >> 1 | TWO_52) - 0x1p52) + (number((n & 1) | TWO_52) - 0x1p52);
#endif
}

/* The centre of the cell that a word names; the last one's rounds up to 1. */
static inline double centre(uint64_t word)
{
    return (whole(word & 0x1fffffffffffff) + 0.5) * 0x1p-53;
}

/* For 2^-54 <= u <= 1: u = 2^-k m, m between sqrt(1/2) and sqrt(2), and log m = 2 atanh(s). */
static inline double logarithm(double u)
{
    const uint64_t up = bits(u) + 0x00095f6200000000; /* carries into the exponent above sqrt(2) */
    const double k = 1023 - (number(up >> 52 | TWO_52) - 0x1p52);
    const double f = number((up & 0xfffffffffffff) + 0x3fe6a09e00000000) - 1;
    const double s = f / (2 + f), z = s * s, half = 0.5 * f * f;
    const double r = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01 +
        z * (2.857142874366239149e-01 + z * (2.222219843214978396e-01 +
        z * (1.818357216161805012e-01 + z * (1.531383769920937332e-01 +
        z * 1.479819860511658591e-01))))));
    return f - (half - (s * (half + r) - k * 1.90821492927058770002e-10)) -
           k * 6.93147180369123816490e-01;
}

static inline void pair(double *first, double *second)
{
    const double radius = sqrt(-2 * logarithm(centre(bits(*first))));
    /* The angle in quarters of a circle, 0 to 4: the nearest whole one, and what is left. */
    const double turn = 4 * centre(bits(*second)), shifted = turn + 0x1.8p52;
    const uint64_t quarter = bits(shifted);
    const double x = (turn - (shifted - 0x1.8p52)) * 1.57079632679489661923, z = x * x;
    const double sine = x + x * z * (-1.66666666666666324348e-01 +
        z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 +
        z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 +
        z * 1.58969099521155010221e-10)))));
    const double cosine = 1 - (0.5 * z - z * z * (4.16666666666666019037e-02 +
        z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 +
        z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 +
        z * -1.13596475577881948265e-11))))));
    const uint64_t odd = quarter & 1;
    const double c = odd ? sine : cosine, s = odd ? cosine : sine;
    *first = radius * number(bits(c) ^ ((quarter + 1) & 2) << 62);
    *second = radius * number(bits(s) ^ (quarter & 2) << 62);
}

/* To the values in these places, which may lie in several pieces. */
static void add(const work *w, long start, long end)
{
    for (long k = 0, first = 0; k < w->pieces && first < end; first += w->lengths[k++]) {
        const long from = start > first ? start - first : 0;
        const long to = end - first < w->lengths[k] ? end - first : w->lengths[k];
        const double *noise = w->numbers + first;
        float *values = w->values[k];
        for (long i = from; i < to; i++)
            values[i] = (values[i] + w->deviation * noise[i]) * w->scale;
    }
}

static void each(void *shared)
{
    work *w = shared;
    for (long start; (start = TAKEN * take(&w->next)) < w->pairs;) {
        const long end = start + TAKEN < w->pairs ? start + TAKEN : w->pairs;
        double *first = w->numbers, *second = w->numbers + w->pairs;
        for (long i = start; i < end; i++)
            pair(first + i, second + i);
        add(w, start, end);
        add(w, w->pairs + start, w->pairs + end);
    }
}

void normal_numbers(work *shared, parallel team, unsigned threads)
{
    together(each, shared, team, threads);
}
