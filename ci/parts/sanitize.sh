# shellcheck shell=bash disable=SC2034,SC2153,SC2154,SC2164 # variables, and set -e, are those of ci/test
# Sourced by ci/test: what tests alone do not detect. They run on instrumented builds of the extension,
# in .cache/sanitize. `address` includes the undefined-behaviour and leak sanitizers. With --quick, only
# half of the black-box suite and fewer examples of the property are run. Arguments are those of pytest.

SANITIZE=$ROOT/tests/sanitize
SANITIZED=$CACHE/sanitize
WORKERS=$(nproc)

# Called first by every part below.
use_compiler() {
    export CC=${CC:-gcc}
    have "$CC" || { apt_install gcc libc6-dev && have "$CC"; } || skip "no C compiler: $CC"
    mkdir -p "$SANITIZED"
    results=()
}

# --- instrumented builds --------------------------------------------------------------------------

# Debian's Python compiles with -fwrapv, which defines the overflows that are to be found here. Frame
# pointers are for the stack traces in reports.
COMMON_FLAGS='-g -fno-wrapv -fno-omit-frame-pointer'
declare -A FLAGS=(
    [address]="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -include $SANITIZE/address.h"
    [thread]='-O1 -fsanitize=thread'
    [coverage]="-O0 --coverage -fprofile-update=atomic -include $SANITIZE/coverage.h"
)
declare -A RUNTIME=([address]=libasan.so [thread]=libtsan.so)
declare -A OPTIONS=(
    # A malloc of too much must return NULL, which the program handles. The interposer that makes calls
    # fail (tests/faults) is loaded before libasan.
    [address]='detect_leaks=1:allocator_may_return_null=1:print_stacktrace=1:verify_asan_link_order=0'
    # The tests fork while they have threads.
    [thread]='die_after_fork=0'
)

# use_build KIND [NAME] : sets BUILD, the folder of the build, and the paths in it.
use_build() {
    KIND=$1
    BUILD=$SANITIZED/${2:-$1}
    BUILD_PYTHON=$BUILD/venv/bin/python
    BUILD_COMMAND=$BUILD/venv/bin/systemd-socket-proxyd
}

# make_build KIND : compiles the extension for KIND, and installs it in a virtual environment with
# what the tests need, unless that has been done with the same sources.
make_build() {
    local key runtime tools=(-r "$ROOT/ci/requirements-test.txt")
    use_build "$1"
    runtime=$(runtime_of "$KIND")
    key=$({
        python_identity
        "$CC" --version
        declare -p COMMON_FLAGS FLAGS OPTIONS
        cd "$ROOT"
        built_files | xargs -0 sha256sum
        sha256sum ci/requirements-{test,coverage}.txt tests/sanitize/{launcher.c,coverage.h,address.h}
    } | hash_of)
    if ! is_current "sanitize-$KIND" "$key" || ! [ -x "$BUILD_PYTHON" ]; then
        say "building for ${BUILD##*/}"
        rm -rf "$BUILD"
        copy_sources
        compile
        [ "$KIND" != coverage ] || tools+=(-r "$ROOT/ci/requirements-coverage.txt")
        install_build "${tools[@]}"
        set_current "sanitize-$KIND" "$key"
    fi
    finish_build "$runtime"
}

copy_sources() {
    mkdir -p "$BUILD/source" "$BUILD/dist"
    source_files | tar -C "$ROOT" --null -T - -cf - | tar -C "$BUILD/source" -xf -
}

# The sanitizer's library of KIND, which a program must load before all others.
runtime_of() {
    local name=${RUNTIME[$1]:-} path
    [ -n "$name" ] || return 0
    path=$("$CC" -print-file-name="$name")
    [ "$path" = "$name" ] || realpath "$path"
}

# With line directives, reports and coverage refer to the lines of the .pyx and .pxd files.
compile() {
    printf '[build_ext]\ncython_line_directives = 1\n' >"$BUILD/extra.cfg"
    DIST_EXTRA_CONFIG=$BUILD/extra.cfg LDSHARED="$CC -shared" PROXYD_WERROR='' \
        CFLAGS="$COMMON_FLAGS ${FLAGS[$KIND]}" LDFLAGS="${FLAGS[$KIND]}" \
        logged "sanitize-build-${BUILD##*/}" "$TOOLS/bin/python" -m build --no-isolation --wheel \
        --outdir "$BUILD/dist" "$BUILD/source"
}

install_build() {
    logged sanitize-venv "$PYTHON" -m venv --without-pip "$BUILD/venv"
    logged sanitize-pip "$TOOLS/bin/python" -m pip --python "$BUILD_PYTHON" install \
        "$BUILD"/dist/*.whl "$@"
}

finish_build() {
    local packages
    packages=$(echo "$BUILD"/venv/lib/python3*/site-packages)
    cp "$SANITIZE/sanitize_plugin.py" "$packages"
    case $KIND in
    coverage) measure "$packages" ;;
    *) install_launcher "$1" "$packages" ;;
    esac
}

# measure SITE-PACKAGES : lets every process of the build record the lines of Python that it runs,
# whatever its environment is.
measure() {
    # A line that is left out must give the reason. proxyd/units is tested elsewhere.
    cat >"$BUILD/coveragerc" <<END
[run]
parallel = true
source_pkgs = proxyd
data_file = $BUILD/python/data
omit = */proxyd/units/*
[report]
exclude_lines = pragma: no cover - \w
show_missing = true
skip_covered = true
fail_under = 100
END
    printf 'import os, coverage; os.environ["%s"] = "%s"; coverage.process_startup()\n' \
        COVERAGE_PROCESS_START "$BUILD/coveragerc" >"$1/measured.pth"
}

# install_launcher RUNTIME SITE-PACKAGES : puts launcher.c in place of the interpreter.
install_launcher() {
    local bin=$BUILD/venv/bin options=${OPTIONS[$KIND]}:exitcode=99:log_path=$BUILD/reports/report
    "$CC" -Wall -Wextra -o "$bin/launcher" "$SANITIZE/launcher.c" -DPYTHON="\"$PYTHON\"" \
        -DPRELOAD="\"$1\"" -DOPTIONS="\"$options\""
    mv "$bin/launcher" "$bin/python"
    cp "$SANITIZE/launcher.pth" "$2"
}

# make_ready KIND : makes the build, or skips the part if the compiler cannot.
make_ready() {
    [ "$1" = coverage ] || [ -n "$(runtime_of "$1")" ] || skip "$CC has no ${RUNTIME[$1]}"
    with_lock make_build "$1"
    rm -rf "$BUILD/reports"
}

# --- tests in a build -----------------------------------------------------------------------------

# In an instrumented build, an example of the property takes several times as long.
examples() {
    if [ -n "$quick" ]; then echo 60; else echo 400; fi
}

# run_suite ARGS... : runs pytest; fails if a test fails or has a report.
run_suite() {
    local status=0 empty=$CACHE/empty
    mkdir -p "$empty" "$BUILD/reports"
    chmod 777 "$BUILD/reports" # some programs of the tests run as another user
    (cd "$empty" && SANITIZE_REPORTS=$BUILD/reports RELAY_EXAMPLES=${RELAY_EXAMPLES:-$(examples)} \
        HYPOTHESIS_STORAGE_DIRECTORY=$CACHE/hypothesis "$BUILD_PYTHON" -m pytest \
        -c "$ROOT/pyproject.toml" --rootdir="$ROOT" -o cache_dir="$CACHE/pytest/$part" \
        --hypothesis-seed=0 -p sanitize_plugin -q -n "$WORKERS" "$@" "${ARGS[@]}") 2>&1 |
        tee "$SANITIZED/pytest-$part" || status=$?
    results+=("$(tail -n 1 "$SANITIZED/pytest-$part" | grep -E ' in [0-9.]+s' | sed 's/ in .*//' ||
        echo 'ended without a result')")
    [ $status = 0 ]
}

# Shows the reports that have not failed a test; 1 if there is any report at all.
no_reports() {
    local all new
    # The warning that malloc has returned NULL is not an error.
    mapfile -t all < <(find "$BUILD/reports" -name '*report.*' \
        -exec grep -lvE '^$|WARNING: AddressSanitizer failed to allocate' {} +)
    mapfile -t new < <(printf '%s\n' "${all[@]}" | grep '/report\.')
    [ ${#new[@]} = 0 ] || cat "${new[@]}"
    results+=("${#all[@]} reports")
    [ ${#all[@]} = 0 ]
}

# Half of the black-box suite: together, these files cover every way in which a connection ends, and
# what is done with datagrams.
HALF=(forwarding half_close hold last_words limits reset signals stalled_reader datagrams datagrams_held
    datagrams_limits)

blackbox_files() {
    local name
    [ -n "$quick" ] || { echo "$ROOT/tests/blackbox"; return; }
    for name in "${HALF[@]}"; do echo "$ROOT/tests/blackbox/test_$name.py"; done
}

ABOUT[address]='address, undefined and leak sanitizers: unit, relay and black-box tests'
part_address() {
    local status=0 files
    use_compiler
    make_ready address
    mapfile -t files < <(blackbox_files)
    run_suite "$ROOT/tests/unit" "$ROOT/tests/relay" || status=1
    run_suite "${files[@]}" --executable="$BUILD_COMMAND" || status=1
    no_reports || status=1
    note "$(join "${results[@]}")"
    return $status
}

ABOUT[thread]='thread sanitizer: tests of relay threads; black-box tests with --threads=3'
part_thread() {
    local status=0 files
    use_compiler
    make_ready thread
    run_suite "$ROOT"/tests/relay/test_{threads,workers,balance,snapshot,datagram_rights,datagram_limits}.py ||
        status=1
    mapfile -t files < <(blackbox_files)
    # If no thread can be started, the program logs this of relay threads too: one line too many for
    # test_few_tasks. And under this sanitizer, clients are too slow to keep the program busy.
    run_suite "${files[@]}" --executable="$BUILD_COMMAND" --arguments='--threads=3 --hand-over=always' \
        -k 'not (test_tasks_max or test_threads_start_when_one_is_too_busy)' || status=1
    no_reports || status=1
    note "$(join "${results[@]}")"
    return $status
}

join() {
    local text=$1
    shift
    [ $# = 0 ] || text+=$(printf '; %s' "$@")
    printf '%s\n' "$text"
}

# --- the walk of tests/faults ------------------------------------------------------------------------

walk_build() { walk "$BUILD_PYTHON" "$BUILD/interpose.so" "$BUILD_COMMAND" "$@"; }

ABOUT[address-faults]='address, undefined and leak sanitizers: the walk of `faults`'
part_address-faults() {
    local status=0
    use_compiler
    must_walk
    make_ready address
    mkdir -p "$BUILD/reports"
    walk_build --quick 2>&1 | tee "$SANITIZED/faults" || status=1
    results=("$(tail -n 1 "$SANITIZED/faults")")
    no_reports || status=1
    note "$(join "${results[@]}")"
    return $status
}

# --- the analyzer ---------------------------------------------------------------------------------

# analyze SOURCE-FOLDER : prints what gcc finds in the generated C, as "function warning", one a line.
# With call summaries and without inlining it analyzes the whole file; otherwise it gives up early.
analyze() {
    local work=$SANITIZED/analyzer name
    mkdir -p "$work"
    : >"$work/log"
    for name in _relay _datagram; do
        (cd "$1" && "$TOOLS/bin/cython" --line-directives -3 "proxyd/$name.pyx" -o "$work/$name.c" \
            2>"$work/cython") || die "Cython failed: $(<"$work/cython")"
        (cd "$1" && LC_ALL=C "$CC" -fanalyzer -fanalyzer-call-summaries -O1 -fno-inline \
            -I"$(include_folder)" -c "$work/$name.c" -o /dev/null -fno-diagnostics-show-caret \
            -fdiagnostics-path-format=none 2>>"$work/log") || die "gcc failed: $(tail -n 20 "$work/log")"
    done
    awk '/: In function / { gsub(/\047/, " "); name = $(NF - 1) }
        / warning: / { gsub(/[][]/, " "); print name, $NF }' "$work/log" | sort -u
}

include_folder() { "$PYTHON" -I -c 'import sysconfig; print(sysconfig.get_path("include"))'; }

# Lines of analyzer.known are "function warning reason".
known_findings() { awk '!/^(#|$)/ { print $1, $2 }' "$SANITIZE/analyzer.known" | sort -u; }

can_analyze() { "$CC" -fanalyzer -x c -c -o /dev/null - </dev/null 2>/dev/null; }

ABOUT[analyzer]='gcc -fanalyzer: the generated C'
part_analyzer() {
    local found new
    use_compiler
    can_analyze || skip "$CC has no -fanalyzer"
    found=$(analyze "$ROOT")
    new=$(comm -23 - <(known_findings) <<<"$found")
    if [ -n "$new" ]; then
        warn "not in ${SANITIZE#"$ROOT/"}/analyzer.known (details: $SANITIZED/analyzer/log):"
        die "$new"
    fi
    note "nothing new; $(wc -l <<<"$found") findings are known, each with its reason"
}

# --- planted faults -------------------------------------------------------------------------------

# planted NAME KIND WORD FILE SED TEST... : SED makes a fault in FILE; a report of the tests must then
# match WORD.
planted() {
    local name=$1 kind=$2 word=$3 file=$4 edit=$5 results=()
    shift 5
    use_build "$kind" "planted-$name"
    rm -rf "$BUILD"
    copy_sources
    sed -i "$edit" "$BUILD/source/$file"
    if cmp -s "$ROOT/$file" "$BUILD/source/$file"; then
        warn "$name: $file has changed, and the fault cannot be planted any more"
        return 1
    fi
    if [ "$kind" = analyzer ]; then
        analyze "$BUILD/source" >"$BUILD/found"
    else
        compile
        install_build --no-deps --no-index
        echo "$SANITIZED/$kind"/venv/lib/python3*/site-packages >"$(
            echo "$BUILD"/venv/lib/python3*/site-packages)/tools.pth"
        finish_build "$(runtime_of "$kind")"
        [[ $* != */blackbox/* ]] || set -- "$@" --executable="$BUILD_COMMAND"
        run_suite -x "$@" || true
        find "$BUILD/reports" -name '*report.*' -exec cat {} + >"$BUILD/found"
    fi
    grep -q -- "$word" "$BUILD/found" || { warn "$name: NOT SEEN"; return 1; }
    say "$name: seen, $(grep -m 1 -- "$word" "$BUILD/found")"
}

ABOUT[planted]='the sanitizers find faults that are planted, each in a build of its own'
part_planted() {
    local failed=0 seen=0 kind name word file tests edit
    use_compiler
    for kind in address thread; do make_ready $kind; done
    can_analyze || skip "$CC has no -fanalyzer"
    while read -r name kind word file tests edit; do
        seen=$((seen + 1))
        # Not as a condition, in which `set -e` would have no effect.
        (planted "$name" "$kind" "$word" "proxyd/$file" "$edit" "$ROOT/tests/$tests") \
            >"$SANITIZED/planted-log" 2>&1 </dev/null &
        if ! wait $!; then
            cat "$SANITIZED/planted-log"
            failed=$((failed + 1))
        fi
        tail -n 1 "$SANITIZED/planted-log"
    done < <(grep -vE '^(#|$)' "$SANITIZE/planted")
    note "$((seen - failed)) of $seen seen"
    [ $failed = 0 ]
}

# --- coverage -------------------------------------------------------------------------------------

ABOUT[coverage]='lines run by the unit, relay and black-box tests; the source says why others are not'
part_coverage() {
    local results=() status=0
    use_compiler
    must_walk
    make_ready coverage
    find "$BUILD" -name '*.gcda' -delete
    rm -rf "$BUILD/python"
    mkdir -p "$BUILD/python"
    # Some programs of the tests run as another user, and must be able to write their counts.
    umask 000
    chmod -R a+rwX "$BUILD/python" "$BUILD/source/build"
    run_suite "$ROOT/tests/unit" "$ROOT/tests/relay" || status=1
    run_suite "$ROOT/tests/blackbox" --executable="$BUILD_COMMAND" || status=1
    run_suite "$ROOT/tests/blackbox" --executable="$BUILD_COMMAND" --arguments='--threads=3 --hand-over=always' \
        -k 'forwarding or hold or (tasks_max and not localhost)' || status=1
    # Without coverage of Python, which allocates memory: the walk waits until all of it is freed. The
    # faults that the walk finds are ignored here: gcov cannot handle a failed malloc or open.
    rm "$BUILD"/venv/lib/python3*/site-packages/measured.pth
    walk_build --quick >"$SANITIZED/faults" 2>&1 || true
    walk_build --only relay. threads full-pipe >>"$SANITIZED/faults" 2>&1 || true
    grep 'points walked' "$SANITIZED/faults"
    [ $status = 0 ] || warn "the counts are those of a run with failed tests"
    count_lines 2>&1 | tee "$SANITIZED/coverage-report" || status=1
    note "$(join "${results[@]}" "$(grep TOTAL "$SANITIZED/coverage-report" | tr -s ' \n' ' ')")"
    return $status
}

# Lines of the .pyx and .pxd files that are not statements: blank lines, comments, decorators, headers,
# and declarations without a value, to which Cython attributes code of its own.
NO_STATEMENT='\s*($|#|"""|@|\)|(cdef|def) (?!\w[^()]* = ))'

# Prints the reports; 1 if a line was not run, unless its source leaves it out and gives the reason:
# `# GCOVR_EXCL_LINE - REASON` in Cython, `# pragma: no cover - REASON` in Python.
count_lines() {
    local status=0
    if grep -rnE 'GCOVR_EXCL|pragma: no cover' "$ROOT/proxyd" --include='*.p*' |
        grep -vE '(GCOVR_EXCL_LINE|pragma: no cover) - \w'; then
        warn "without a reason"
        status=1
    fi
    # gcovr takes the names of Cython's functions for those of the compiler's internal functions. A
    # source that gcov does not find is part of Cython.
    (cd "$BUILD/source" && "$BUILD_PYTHON" -m gcovr --root . --filter 'proxyd/.*\.(pyx|px[di])$' \
        --include-internal-functions --gcov-ignore-errors=source_not_found --merge-lines \
        --exclude-lines-by-pattern "$NO_STATEMENT" --fail-under-line 100 build) || status=1
    (cd "$BUILD" && venv/bin/python -m coverage combine --rcfile=coveragerc -q &&
        venv/bin/python -m coverage report --rcfile=coveragerc) || status=1
    return $status
}
