/* Included first in the build for the address, undefined and leak sanitizers. */

#include <Python.h>

#include <dlfcn.h>
#include <string.h>

/* gcc's libubsan ignores log_path if libasan is loaded too: set the path explicitly. */
static void tell_log_path(void)
{
    void *library = dlopen("libubsan.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void (*tell)(const char *) = NULL;
    const char *options = getenv("UBSAN_OPTIONS"), *found = NULL;
    char path[4096];
    if (library)
        *(void **)&tell = dlsym(library, "__sanitizer_set_report_path");
    while (options && (options = strstr(options, "log_path="))) {
        options += strlen("log_path=");
        found = options; /* the last one counts */
    }
    if (!tell || !found || strcspn(found, ":") >= sizeof(path))
        abort();
    memcpy(path, found, strcspn(found, ":"));
    path[strcspn(found, ":")] = '\0';
    tell(path);
}

void __lsan_do_leak_check(void);
int __lsan_do_recoverable_leak_check(void);
void __lsan_register_root_region(const void *start, size_t size);
void __lsan_unregister_root_region(const void *start, size_t size);

/* Local variables of running Python functions are in memory from mmap(2), which LeakSanitizer does
   not search unless it is registered. */
static void tell_frames(void (*tell)(const void *, size_t))
{
    PyThreadState *thread = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
    for (; thread; thread = PyThreadState_Next(thread)) {
        _PyStackChunk *chunk = thread->datastack_chunk;
        for (; chunk; chunk = chunk->previous)
            tell(chunk, chunk->size);
    }
}

/* Look for leaks now and write the report; true if there are any. Called with the GIL held. */
__attribute__((visibility("default"))) int proxyd_leaks(void);
int proxyd_leaks(void)
{
    int found;
    PyGC_Collect();
    tell_frames(__lsan_register_root_region);
    found = __lsan_do_recoverable_leak_check();
    tell_frames(__lsan_unregister_root_region);
    return found;
}

static PyObject *look_for_leaks(PyObject *self, PyObject *arguments)
{
    (void)self;
    (void)arguments;
    PyGC_Collect();
    tell_frames(__lsan_register_root_region);
    __lsan_do_leak_check(); /* there is no further check when the process ends */
    Py_RETURN_NONE;
}

static PyMethodDef leak_check = {"look_for_leaks", look_for_leaks, METH_NOARGS, NULL};

/* Check when main() has returned and the interpreter is still complete. Later, memory that belongs to
   threads that never end (such as look-ups) would count as leaked, since the interpreter drops their
   frames. */
static void look_for_leaks_before_the_end(void)
{
    PyObject *atexit = PyImport_ImportModule("atexit");
    PyObject *check = PyCFunction_New(&leak_check, NULL);
    PyObject *done = atexit && check ? PyObject_CallMethod(atexit, "register", "O", check) : NULL;
    if (!done)
        abort();
    Py_DECREF(done);
    Py_DECREF(check);
    Py_DECREF(atexit);
}

/* Runs when the interpreter loads the extension, with the GIL held. */
__attribute__((constructor)) static void at_load(void)
{
    tell_log_path();
    look_for_leaks_before_the_end();
}
