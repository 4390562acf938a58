# shellcheck shell=bash
# Sourced by the other scripts here. Makes what they need, in folders that git ignores:
#
#   .cache/tools   venv with pip, build, setuptools, Cython and the linters
#   dist/          the sdist of this working tree, and the wheel built from that sdist
#   .venv/         venv with the installed wheel, without pip and setuptools, whose .pth file would
#                  slow every start down; for the tests also pytest
#
# Each is made again when its sources have changed. Set PYTHON= to choose the interpreter.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
CACHE=$ROOT/.cache
TOOLS=$CACHE/tools
LOGS=$CACHE/logs
COMMAND=$VENV/bin/systemd-socket-proxyd

# Only the venv may be imported from, whatever the caller's shell has set.
unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONSTARTUP VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() { warn "error: $*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- system packages ------------------------------------------------------------------------------

apt_updated=

# apt_install PACKAGE... : return 1 if they cannot be installed on this machine or by this user.
apt_install() {
    have apt-get && [ "$(id -u)" = 0 ] || return 1
    say "installing with apt-get: $*"
    apt_alone apt_install_now "$@" >>"$LOGS/apt" 2>&1 </dev/null
}

# The lists of packages are brought up to date only where there are none, or where they are too old.
apt_install_now() {
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@")
    "${install[@]}" && return
    [ -z "$apt_updated" ] && apt-get -qq update || return 1
    apt_updated=yes
    "${install[@]}"
}

# apt_alone COMMAND... : apt does not wait for another apt, but fails; ours wait for each other. The lock
# is that of tests/kit/containers/host.py.
apt_alone() {
    local lock status
    if ! have flock || ! [ -w /run/lock ]; then "$@"; return; fi
    exec {lock}>/run/lock/systemd-socket-proxyd-apt
    flock "$lock"
    "$@" {lock}>&- # a service that is installed must not keep the lock
    status=$?
    exec {lock}>&-
    return $status
}

# want COMMAND PACKAGE : install the package unless the command exists; return 0 if it exists now.
want() {
    have "$1" || { apt_install "$2" && have "$1"; }
}

# nginx, with its module for streams, which Debian has apart.
want_nginx() {
    want nginx nginx-light || return 1
    [ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || apt_install libnginx-mod-stream
}

# --- the interpreter ------------------------------------------------------------------------------

python_is_new_enough() {
    have "$1" && "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# What the interpreter $1 lacks for a build, as names of Debian packages, one per line.
python_lacks() {
    "$1" -I - <<'END'
import importlib.util, os, shutil, sysconfig

if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
    print("python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")
compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
if not shutil.which(compiler.split()[0]) or not os.path.exists("/usr/include/stdlib.h"):
    print("gcc\nlibc6-dev")
END
}

# Sets PYTHON. The distribution's interpreter comes first: it starts fastest and has its headers.
choose_python() {
    local candidate lacks first_lack=
    local candidates=(/usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    if [ -z "${PYTHON:-}" ] && ! have /usr/bin/python3; then
        apt_install python3 python3-venv python3-dev gcc libc6-dev || true
    fi
    for candidate in "${candidates[@]}"; do
        python_is_new_enough "$candidate" || continue
        lacks=$(python_lacks "$candidate")
        # These packages complete the distribution's own interpreter, and include gcc.
        # shellcheck disable=SC2086
        [ -z "$lacks" ] || { apt_install $lacks && lacks=$(python_lacks "$candidate"); } || true
        if [ -z "$lacks" ]; then
            PYTHON=$(command -v "$candidate")
            return
        fi
        first_lack=${first_lack:-"$candidate lacks "${lacks//$'\n'/ }}
    done
    [ -z "$first_lack" ] || die "$first_lack: please install"
    die "Python 3.11 or newer is needed (${candidates[*]}): install it, or set PYTHON="
}

python_identity() { "$PYTHON" -I -c 'import sys; print(sys.executable, sys.version)'; }

# --- sources and stamps ---------------------------------------------------------------------------

# The project's files, relative to ROOT, NUL-separated: those of a clone, changed or not, and new ones.
source_files() (
    cd "$ROOT"
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard
    else
        find . \( -path ./.git -o -path ./.venv -o -path ./.cache -o -path ./build -o -path ./dist \
            -o -name __pycache__ -o -name '*.egg-info' -o -name '.*_cache' -o -name .hypothesis \) \
            -prune -o -type f -printf '%P\0'
    fi | while IFS= read -r -d '' file; do # git still lists files whose deletion is not committed
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done
)

# Those of them that the installed package depends on.
built_files() {
    source_files |
        grep -zE '^((proxyd|scripts|man|examples|completions|doc|systemd)/|(setup|make_bundle|pyproject|MANIFEST|README|CHANGELOG)\.)' |
        LC_ALL=C sort -z
}

hash_of() { sha256sum | cut -d' ' -f1; }

# is_current NAME KEY ; set_current NAME KEY : compare or record what NAME was made from.
is_current() { [ -f "$CACHE/$1.made-from" ] && [ "$(<"$CACHE/$1.made-from")" = "$2" ]; }
set_current() { printf '%s\n' "$2" >"$CACHE/$1.made-from"; }

# logged NAME COMMAND... : run it with its output in a log, whose end is shown if it fails.
logged() {
    local log=$LOGS/$1
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        die "failed: $* (whole output: $log)"
    fi
}

# --- the steps ------------------------------------------------------------------------------------

build_requirements() {
    "$PYTHON" -I -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")' "$ROOT/pyproject.toml"
}

# make_tools [REQUIREMENTS-FILE...]
make_tools() {
    local key wanted
    wanted=$(build_requirements; [ $# = 0 ] || cat "$@")
    key=$({ python_identity; printf '%s\n' "$wanted"; } | hash_of)
    # A venv that has more than is needed now is kept.
    if [ -x "$TOOLS/bin/python" ] && grep -qsx "$key" "$CACHE/tools.made-from"; then return; fi
    say "preparing build tools in ${TOOLS#"$ROOT/"}"
    if ! [ -x "$TOOLS/bin/python" ] || ! grep -qsxF "$(python_identity)" "$CACHE/tools.python"; then
        rm -rf "$TOOLS" "$CACHE/tools.made-from"
        logged tools-venv "$PYTHON" -m venv "$TOOLS"
        python_identity >"$CACHE/tools.python"
    fi
    printf '%s\n' "$wanted" >"$CACHE/tools.requirements"
    logged tools-pip "$TOOLS/bin/python" -m pip install --upgrade build -r "$CACHE/tools.requirements"
    printf '%s\n' "$key" >>"$CACHE/tools.made-from"
}

# Copies the sources to an empty folder first, like a clone: setuptools walks the whole tree that it
# is started in, and a stray file must neither help nor break the build.
make_wheel() {
    local copy=$CACHE/source
    rm -rf "$copy"
    rm -f "$ROOT"/dist/*.whl "$ROOT"/dist/*.tar.gz # not dist/packages
    mkdir -p "$copy" "$ROOT/dist"
    source_files | tar -C "$ROOT" --null -T - -cf - | tar -C "$copy" -xf -
    # Without --sdist and --wheel, build makes the sdist and then the wheel from that sdist.
    logged build "$TOOLS/bin/python" -m build --no-isolation --outdir "$ROOT/dist" "$copy"
}

make_venv() {
    if ! is_current venv "$(python_identity)" || ! [ -x "$VENV/bin/python" ]; then
        rm -rf "$VENV" "$CACHE"/{venv,installed,tests}.made-from
        logged venv "$PYTHON" -m venv --without-pip "$VENV"
        set_current venv "$(python_identity)"
    fi
}

pip_into_venv() { "$TOOLS/bin/python" -m pip --python "$VENV/bin/python" install "$@"; }

# Build and install, unless these sources are installed. PROXYD_WERROR=1 counts as another build. The
# sdist has all files, so that one more or less counts, too.
install_project() {
    local key
    key=$({
        python_identity
        cd "$ROOT"
        source_files | LC_ALL=C sort -z
        built_files | xargs -0 sha256sum
    } | hash_of)
    if [ -x "$COMMAND" ] && [ -n "$(ls "$ROOT"/dist/*.whl 2>/dev/null)" ] &&
        { is_current installed "$key werror" || is_current installed "$key$werror"; }; then
        return
    fi
    say "building the sdist, and from it the wheel${werror:+ (compiler warnings are errors)}"
    make_wheel
    logged install pip_into_venv --no-deps --no-index --force-reinstall "$ROOT"/dist/*.whl
    set_current installed "$key$werror"
}

# Runs in one tree wait for each other. `flock COMMAND` could not run a function of this shell.
with_lock() {
    local lock
    mkdir -p "$LOGS"
    exec {lock}>"$CACHE/lock"
    if have flock; then flock "$lock"; fi
    "$@" {lock}>&- # what it leaves running must not keep the lock
    exec {lock}>&-
}

# make_folder NAME REQUIREMENTS-FILE : make .cache/NAME with packages that not every test needs.
make_folder() {
    local key
    key=$({ python_identity; cat "$2"; } | hash_of)
    if is_current "$1" "$key"; then return; fi
    say "preparing .cache/$1"
    rm -rf "${CACHE:?}/$1"
    logged "$1-pip" "$TOOLS/bin/python" -m pip install --target "$CACHE/$1" -r "$2"
    set_current "$1" "$key"
}

prepare_demo() {
    choose_python
    make_tools
    make_venv
    install_project
}

prepare_tests() {
    choose_python
    make_tools "$ROOT/ci/requirements-lint.txt"
    make_venv
    install_project
    local key
    key=$(hash_of <"$ROOT/ci/requirements-test.txt")
    if ! is_current tests "$key"; then
        say "preparing test tools in ${VENV#"$ROOT/"}"
        logged tests-pip pip_into_venv -r "$ROOT/ci/requirements-test.txt"
        set_current tests "$key"
    fi
}

werror=
[ "${PROXYD_WERROR:-}" != 1 ] || werror=' werror'
