/* The threads. `parallel` is OpenMP's entry point in this process, given by the caller, so that the
   threads are those that torch has running already; a second pool would compete with them. Without
   it the calling thread does all the work. */

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

/* A number that no other thread was given: 0, 1, 2, ... Nothing else is shared, so no order is. */
static inline long take(long *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
