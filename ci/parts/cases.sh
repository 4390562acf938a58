# shellcheck shell=bash disable=SC2034,SC2153,SC2154,SC2164 # variables, and set -e, are those of ci/test
# Sourced by ci/test: the cases that every relay must survive (tests/cases), run on several programs.
#
# Arguments: names of contenders, as at the top of doc/reports/cases.md, then `--` and arguments of
# pytest. Without a name: all of them, and the report is written. With --quick: this program only.

OURS=(ours ours-copy ours-2-threads ours-2-threads-copy)
OTHERS=(original newest-original haproxy haproxy-copy nginx direct)
SEEN=$CACHE/cases
CASES_REPORT=doc/reports/cases.md
CONTENDERS=$ROOT/tests/cases/contenders

# --- the contenders -------------------------------------------------------------------------------

# Each contender_NAME sets `command`, `is` (its name in the tests), `version` and `arguments`; it
# returns 1 if the program is not available here.

contender_ours() {
    command=$COMMAND is=ours
    version=$("$COMMAND" --version | head -n 1)
    arguments=()
}

contender_ours-copy() {
    contender_ours
    arguments=(--no-splice)
}

contender_ours-2-threads() {
    contender_ours
    arguments=('--arguments=--threads=2 --hand-over=always')
}

contender_ours-2-threads-copy() {
    contender_ours
    arguments=('--arguments=--threads=2 --hand-over=always' --no-splice)
}

systemd_version() { "$1" --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p'; }

contender_original() {
    local candidate
    command=
    for candidate in {/usr,}/lib/systemd/systemd-socket-proxyd; do
        [ ! -x "$candidate" ] || command=$candidate
    done
    [ -n "$command" ] || return 1
    version="systemd $(systemd_version "$command")" is=original-$(systemd_version "$command")
    arguments=()
}

# The newest original is started by the dynamic loader of its own folder, because libc is newer there.
contender_newest-original() {
    local folder libraries loader
    folder=$("$ROOT/bench/newest-original" "$CACHE/bench/unstable") || return 1
    loader=$(find "$folder/usr/lib" -maxdepth 2 -name 'ld-linux*.so*' | head -n 1)
    libraries=${loader%/*}
    command=$SEEN/newest-original
    printf '#!/bin/sh\nexec %q --library-path %q %q "$@"\n' "$loader" \
        "$libraries:$libraries/systemd" "$folder/usr/lib/systemd/systemd-socket-proxyd" >"$command"
    chmod +x "$command"
    version="systemd $(systemd_version "$command")" is=original-$(systemd_version "$command")
    arguments=()
}

contender_haproxy() {
    want haproxy haproxy || return 1
    command=$CONTENDERS/haproxy is=haproxy
    version=$(haproxy -v | sed -n '1s/.*version \([^ ]*\).*/HAProxy \1/p')
    arguments=()
}

contender_haproxy-copy() {
    contender_haproxy || return 1
    arguments=(--arguments=--copy)
}

contender_nginx() {
    want_nginx || return 1
    command=$CONTENDERS/nginx is=nginx
    version=$(nginx -v 2>&1 | sed -n 's,.*nginx/\([^ ]*\).*,nginx \1,p')
    arguments=()
}

contender_direct() {
    command=/bin/true is=direct version="Linux $(uname -r)" arguments=()
}

# --- running them ---------------------------------------------------------------------------------

# run_cases NAME : return 0 if it survived all cases, 1 if not. Any other status of pytest is an error.
run_cases() {
    local name=$1 status=0 command is version arguments
    if ! "contender_$name"; then
        warn "SKIPPED: $name is not available here"
        rm -f "$SEEN/$name.json"
        return
    fi
    printf '\n=== %s: %s\n' "$name" "$version"
    (cd "$CACHE/empty" && "$VENV/bin/pytest" -c "$ROOT/pyproject.toml" --rootdir="$ROOT" \
        -o cache_dir="$CACHE/pytest/$part" -n4 -q --tb=no -r "$report" "$ROOT/tests/cases" \
        --executable="$command" --contender="$is" "${arguments[@]}" \
        --record="$SEEN/$name.json" "${pytest_args[@]}") || status=$?
    [ "$status" -le 1 ] || die "$name: pytest ended with $status"
    printf '%s\n' "$version" >"$SEEN/$name.version"
    return "$status"
}

is_contender() { [[ " ${OURS[*]} ${OTHERS[*]} " == *" $1 "* ]]; }

# Print the report as Markdown; with --summary, one line per contender.
cases_table() { "$VENV/bin/python" -I "$ROOT/tests/cases/table.py" "$@"; }

write_cases_report() {
    cases_table "$SEEN" "$@" >"$SEEN/cases.md"
    mv "$SEEN/cases.md" "$ROOT/$CASES_REPORT"
    say "written: $CASES_REPORT"
}

ABOUT[cases]='the cases that every relay must survive; without --quick, on other programs too'
part_cases() {
    local wanted=() pytest_args=() failed=() name report
    while [ ${#ARGS[@]} -gt 0 ]; do
        if [ "${ARGS[0]}" = -- ]; then pytest_args=("${ARGS[@]:1}"); break; fi
        is_contender "${ARGS[0]}" || die "no contender '${ARGS[0]}'; there are: ${OURS[*]} ${OTHERS[*]}"
        wanted+=("${ARGS[0]}")
        ARGS=("${ARGS[@]:1}")
    done
    local named=${#wanted[@]}
    [ "$named" != 0 ] || wanted=("${OURS[@]}")
    [ "$named" != 0 ] || [ -n "$quick" ] || wanted+=("${OTHERS[@]}")
    want ip iproute2 || warn "not there: ip"
    mkdir -p "$SEEN" "$CACHE/empty"
    for name in "${wanted[@]}"; do
        # Failures of this program are printed; those of the others are only in the report.
        if [[ $name == ours* ]]; then report=fEs; else report=E; fi
        run_cases "$name" || [[ $name != ours* ]] || failed+=("$name")
    done
    printf '\n'
    cases_table --summary "$SEEN" "${wanted[@]}"
    [ -n "$quick" ] || [ "$named" != 0 ] || write_cases_report "${wanted[@]}"
    [ ${#failed[@]} = 0 ] || die "not all cases were survived by: ${failed[*]}"
}
