/* Stands in for bin/python in the environment of an instrumented build: starts PYTHON with the
   sanitizer's runtime, which must be loaded before everything else.

   Many tests start the interpreter or the command with an environment of their own, so nothing need
   come from the caller; and nothing is left to the shells and mounts that the interpreter starts in
   turn: launcher.pth removes the two variables again. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <unistd.h>

/* Put `first` and `second` into a variable; one of them is the caller's. */
static void join(const char *name, const char *first, const char *second)
{
    size_t size = strlen(first) + strlen(second) + 2;
    char *both = malloc(size);
    if (!both)
        abort();
    snprintf(both, size, "%s:%s", first, second);
    setenv(name, both, 1);
}

static const char *callers(const char *name)
{
    return getenv(name) ? getenv(name) : "";
}

/* Of two words for one option the last one counts. */
static void add_options(const char *name)
{
    join(name, OPTIONS, callers(name));
}

int main(int argc, char **argv)
{
    (void)argc;
    /* What makes calls fail (tests/faults) must see them before the sanitizer does. */
    if (*callers("LD_PRELOAD"))
        join("LD_PRELOAD", callers("LD_PRELOAD"), PRELOAD);
    else
        setenv("LD_PRELOAD", PRELOAD, 1);
    /* What pymalloc keeps in its arenas no leak detector can see. */
    setenv("PYTHONMALLOC", "malloc", 1);
    /* Each runtime reads its own, and passes over what it does not know. */
    add_options("ASAN_OPTIONS");
    add_options("UBSAN_OPTIONS");
    add_options("TSAN_OPTIONS");
    /* A shadow memory has no room for all the places that the kernel may choose at random. */
    personality(ADDR_NO_RANDOMIZE);
    execv(PYTHON, argv);
    perror(PYTHON);
    return 127;
}
