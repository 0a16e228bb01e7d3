/* The threads. `parallel` is OpenMP's own entry in the process: they are the ones that the caller's
   library has awake already. Without one, the calling thread does it all. */

/* Offsets are 64 bit on the caller's side. Elsewhere (Windows) nothing is compiled. */
_Static_assert(sizeof(long) == 8, "long has 64 bits");

typedef void (*parallel)(void (*body)(void *), void *shared, unsigned threads, unsigned flags);

static inline void together(void (*body)(void *), void *shared, parallel team, unsigned threads)
{
    if (team && threads > 1)
        team(body, shared, threads, 0);
    else
        body(shared);
}

/* The next number nobody has taken. */
static inline long take(long *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
