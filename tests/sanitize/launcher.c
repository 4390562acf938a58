/* Replaces bin/python in the environment of an instrumented build: starts PYTHON with the sanitizer's
   runtime, which must be loaded before everything else.

   Many tests start the interpreter or the command with an environment of their own, so nothing is
   expected from the caller. launcher.pth removes two of the variables again, so that they do not reach
   the shells and other programs that the interpreter starts. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <unistd.h>

/* Set a variable to `first` and `second`, joined by a colon. */
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

/* Append the caller's options, which take precedence: the last setting of an option counts. */
static void add_options(const char *name)
{
    join(name, OPTIONS, callers(name));
}

int main(int argc, char **argv)
{
    (void)argc;
    /* The interposer that makes calls fail (tests/faults) must see them before the sanitizer does. */
    if (*callers("LD_PRELOAD"))
        join("LD_PRELOAD", callers("LD_PRELOAD"), PRELOAD);
    else
        setenv("LD_PRELOAD", PRELOAD, 1);
    /* A leak detector cannot see what pymalloc keeps in its arenas. */
    setenv("PYTHONMALLOC", "malloc", 1);
    /* Each runtime reads its own variable, and ignores options that it does not know. */
    add_options("ASAN_OPTIONS");
    add_options("UBSAN_OPTIONS");
    add_options("TSAN_OPTIONS");
    /* Shadow memory does not cover all the addresses that the kernel may choose at random. */
    personality(ADDR_NO_RANDOMIZE);
    execv(PYTHON, argv);
    perror(PYTHON);
    return 127;
}
