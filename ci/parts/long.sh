# shellcheck shell=bash disable=SC2034,SC2153,SC2154,SC2164 # variables, and set -e, are those of ci/test
# Sourced by ci/test: suites that take minutes. Each is a program of its own with arguments of its own,
# which `ci/test PART -- --help` describes.

ABOUT[e2e]='real systemd and real clients in a container'
part_e2e() {
    local status=0
    "$PYTHON" -B "$ROOT/tests" e2e --sdist="$(echo "$ROOT"/dist/*.tar.gz)" "${ARGS[@]}" 2>&1 |
        tee "$LOGS/e2e" || status=$?
    note "$(tail -n 1 "$LOGS/e2e")"
    return $status
}

ABOUT[matrix]='the package built and tested with the interpreters and tools of other Debian suites'
# Other compilers have other warnings.
part_matrix() { env -u PROXYD_WERROR "$PYTHON" -B "$ROOT/tests" matrix "${ARGS[@]}"; }

ABOUT[soak]='mixed traffic for minutes or hours: every byte is compared, nothing grows'
part_soak() {
    [ -z "$quick" ] || ARGS=(--minutes 2 --threads 2 "${ARGS[@]}")
    "$VENV/bin/python" -B "$ROOT/tests" soak --executable="$COMMAND" "${ARGS[@]}"
}

ABOUT[hostile]='hostile clients: others are served, the log stays readable, memory stays bounded'
part_hostile() { "$VENV/bin/python" -B "$ROOT/tests" hostile --executable="$COMMAND" "${ARGS[@]}"; }

ABOUT[fuzz]='thousands of bad command lines, environments and passed fds'
part_fuzz() {
    # Not in .venv, where its packages might slow every start down.
    with_lock make_folder fuzz "$ROOT/ci/requirements-fuzz.txt"
    "$VENV/bin/python" -B "$ROOT/tests" fuzz --executable="$COMMAND" --packages="$CACHE/fuzz" "${ARGS[@]}"
}

ABOUT[faults]='every call that can fail fails once, in many runs of the program'
part_faults() {
    [ -z "$quick" ] || ARGS=(--quick "${ARGS[@]}")
    [[ " ${ARGS[*]} " != *" --left-out "* ]] || want strace strace || skip "no strace"
    walk "$VENV/bin/python" "$CACHE/faults/interpose.so" "$COMMAND" "${ARGS[@]}"
}

# walk PYTHON LIBRARY EXECUTABLE ARGS... : run tests/faults with the library that makes calls fail.
walk() {
    must_walk
    build_interposer "$2"
    "$1" -B "$ROOT/tests" faults.walk --library "$2" --executable "$3" "${@:4}"
}

must_walk() {
    [ "$(id -u)" = 0 ] || skip "not root: the walk needs a network namespace"
    unshare --net true 2>/dev/null || skip "no network namespace can be made here"
    getconf GNU_LIBC_VERSION >/dev/null 2>&1 || skip "the C library is not glibc"
}

build_interposer() {
    mkdir -p "${1%/*}"
    # shellcheck disable=SC2086
    ${CC:-cc} -shared -fPIC -O2 -Wall -Wextra -Werror -o "$1" "$ROOT/tests/faults/interpose.c" ||
        die "the interposer does not compile"
}
