/* Stands in for bin/python in the environment of an instrumented build: starts PYTHON with the
   sanitizer's runtime, which must be loaded before everything else.

   Many tests start the interpreter or the command with an environment of their own, so nothing is
   taken from the caller's; and nothing is left to the shells and mounts that the interpreter starts
   in turn: launcher.pth removes the two variables again. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <unistd.h>

/* OPTIONS, and then the caller's: the last word counts. */
static void add_options(const char *name)
{
    const char *more = getenv(name);
    size_t size = sizeof(OPTIONS) + (more ? strlen(more) : 0) + 1;
    char *all = malloc(size);
    if (!all)
        abort();
    snprintf(all, size, "%s:%s", OPTIONS, more ? more : "");
    setenv(name, all, 1);
}

int main(int argc, char **argv)
{
    (void)argc;
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
