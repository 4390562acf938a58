# shellcheck shell=bash disable=SC2034,SC2153,SC2154,SC2164 # variables, and set -e, are those of ci/test
# Sourced by ci/test: real clients and servers of datagrams through the installed program. Arguments are
# pytest's.
#
# The programs are downloaded with apt-get and unpacked in .cache/datagrams; nothing is installed, and
# no service is started. aioquic comes from PyPI, into a virtual environment of its own.

DATAGRAMS=$CACHE/datagrams
DATAGRAM_PACKAGES=(dnsmasq-base bind9-dnsutils iperf3 rsyslog mosh wireguard-tools wireguard-go minetest-server)

# unpack_datagram_programs : download them with what they need, and unpack all in $DATAGRAMS/root.
unpack_datagram_programs() {
    local package packages folder part=$DATAGRAMS/root.part
    if ! have apt-get || ! have dpkg; then
        warn "not there: apt-get, for ${DATAGRAM_PACKAGES[*]}"
        return
    fi
    rm -rf "$part" "$DATAGRAMS/packages"
    mkdir -p "$part/usr" "$DATAGRAMS/packages"
    apt-get -qq update >"$LOGS/datagrams-download" 2>&1 || true
    for package in "${DATAGRAM_PACKAGES[@]}"; do
        # A suite may lack one of them, such as a game under its old name.
        packages=$(apt-get install -s --no-install-recommends "$package" 2>/dev/null | awk '/^Inst/ { print $2 }')
        # shellcheck disable=SC2086
        (cd "$DATAGRAMS/packages" && apt-get -qq download $packages "$package") \
            >>"$LOGS/datagrams-download" 2>&1 || warn "cannot download $package: see $LOGS/datagrams-download"
    done
    for package in "$DATAGRAMS"/packages/*.deb; do
        [ ! -e "$package" ] || dpkg -x "$package" "$part"
    done
    for folder in bin sbin lib lib64; do # links to those in /usr, where the tests lay this over /
        [ ! -d "$part/$folder" ] || { mkdir -p "$part/usr/$folder" && cp -a "$part/$folder/." "$part/usr/$folder/" && rm -r "${part:?}/$folder"; }
    done
    rm -rf "$DATAGRAMS/packages" "$DATAGRAMS/root"
    mv "$part" "$DATAGRAMS/root"
}

# make_quic_venv : a virtual environment with aioquic.
make_quic_venv() {
    local venv=$DATAGRAMS/venv
    rm -rf "$venv"
    logged datagrams-venv "$PYTHON" -m venv --without-pip "$venv"
    logged datagrams-pip tool python -m pip --python "$venv/bin/python" install \
        -r "$ROOT/ci/requirements-datagrams.txt"
}

ABOUT[datagrams]='real clients and servers of datagrams: DNS, QUIC, syslog, iperf3, mosh, WireGuard, a game'
part_datagrams() {
    local wanted
    wanted=$(printf '%s\n' "${DATAGRAM_PACKAGES[@]}" | hash_of)
    if [ "$(cat "$DATAGRAMS/stamp" 2>/dev/null)" != "$wanted" ]; then
        apt_alone unpack_datagram_programs
        printf '%s\n' "$wanted" >"$DATAGRAMS/stamp"
    fi
    if ! cmp -s "$ROOT/ci/requirements-datagrams.txt" "$DATAGRAMS/venv/requirements"; then
        if (make_quic_venv); then
            cp "$ROOT/ci/requirements-datagrams.txt" "$DATAGRAMS/venv/requirements"
        else
            warn "cannot install aioquic: see $LOGS/datagrams-pip"
        fi
    fi
    run_pytest "$ROOT/tests/datagrams" --executable="$COMMAND" --contender=ours \
        --programs="$DATAGRAMS/root" --quic="$DATAGRAMS/venv/bin/python"
}
