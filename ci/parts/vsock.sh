# shellcheck shell=bash disable=SC2034,SC2153,SC2154,SC2164 # variables, and set -e, are those of ci/test
# Sourced by ci/test: the tests of VSOCK on a real vsock loopback, in an emulated machine with Debian's
# kernel. Arguments are pytest's.
#
# qemu and the kernel are downloaded with apt-get and unpacked in .cache/vsock; nothing is installed.
# The machine's initial RAM disk holds this machine's Python, the virtual environment and the tests. It
# needs neither root nor hardware support, and takes a minute or two.

VSOCK=$CACHE/vsock
MACHINE=$VSOCK/machine
MACHINE_SECONDS_MAX=600

# unpack_machine : download qemu, a kernel and busybox, and unpack them in $MACHINE.
unpack_machine() {
    local kernel packages
    if ! have apt-get || ! have dpkg; then skip "no apt-get: qemu and a kernel are Debian's"; fi
    [ "$(uname -m)" = x86_64 ] || skip "only prepared for x86-64"
    kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$kernel" ] || skip "no linux-image-cloud-amd64"
    packages=$(apt-get install -s --no-install-recommends qemu-system-x86 2>/dev/null | awk '/^Inst/ { print $2 }')
    rm -rf "$MACHINE" "$VSOCK/packages"
    mkdir -p "$MACHINE" "$VSOCK/packages"
    # shellcheck disable=SC2086
    (cd "$VSOCK/packages" && apt-get -qq download $packages qemu-system-x86 "$kernel" busybox-static) \
        >"$LOGS/vsock-download" 2>&1 || skip "cannot download: see $LOGS/vsock-download"
    for package in "$VSOCK"/packages/*.deb; do
        dpkg -x "$package" "$MACHINE"
    done
    rm -rf "$VSOCK/packages"
    touch "$MACHINE/complete"
}

# with_libraries PROGRAM... : copy the libraries they are linked with into $RAM.
with_libraries() {
    ldd "$@" 2>/dev/null | grep -o '/[^ :)]*' | sort -u | while read -r file; do
        [ ! -f "$file" ] || cp -Ln --parents "$file" "$RAM"
    done
}

# fill_machine PYTEST_ARGS... : copy what the machine needs into $RAM, at the same paths as here.
fill_machine() {
    local base modules link
    base=$("$VENV/bin/python" -c 'import os; print(os.path.dirname(os.__file__))')
    modules=$(dirname "$(find "$MACHINE/lib/modules" -name vsock.ko)")
    mkdir -p "$RAM"/{bin,proc,sys,dev,tmp,run,etc,modules}
    cp "$MACHINE/bin/busybox" "$RAM/bin/"
    cp "$modules"/{vsock,vmw_vsock_virtio_transport_common,vsock_loopback}.ko "$RAM/modules/"
    for link in "$VENV/bin/python" "$VENV/bin/python3"; do
        cp -Ln --parents "$(readlink -f "$link")" "$RAM"
        [[ $(readlink "$link") != /* ]] || cp -Ln --parents "$(readlink "$link")" "$RAM"
    done
    tar -C / -c --exclude=__pycache__ --exclude='*/test' --exclude='*/dist-packages' --exclude='*/config-*' \
        "${base#/}" "${VENV#/}" "${ROOT#/}"/tests/{blackbox,kit} "${ROOT#/}/pyproject.toml" | tar -C "$RAM" -x
    with_libraries "$VENV/bin/python" "$base"/lib-dynload/*.so
    printf 'root:x:0:0:root:/:/bin/sh\n' >"$RAM/etc/passwd"
    # The arguments are quoted for the shell that reads them again.
    cat >"$RAM/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
ip link set lo up
for module in vsock vmw_vsock_virtio_transport_common vsock_loopback; do insmod /modules/\$module.ko; done
cd $ROOT && export PATH=/bin:/usr/bin HOME=/tmp PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
$VENV/bin/python -B -m pytest -p no:cacheprovider -c pyproject.toml --rootdir=$ROOT --color=no -v $(printf '%q ' "$@")
echo "STATUS \$?"
poweroff -f
END
    chmod +x "$RAM/init"
}

# boot_machine RAM-DISK
boot_machine() {
    local libraries
    libraries=$(find "$MACHINE" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
    LD_LIBRARY_PATH=$libraries timeout $MACHINE_SECONDS_MAX "$MACHINE/usr/bin/qemu-system-x86_64" \
        -L "$MACHINE/usr/share/qemu" -L "$MACHINE/usr/share/seabios" -machine pc -cpu max -smp 1 \
        -m 1024 -nographic -no-reboot -nic none -kernel "$MACHINE"/boot/vmlinuz-* -initrd "$1" \
        -append 'console=ttyS0 quiet panic=-1' </dev/null
}

ABOUT[vsock]='the tests of VSOCK on a real vsock loopback, in an emulated machine'
part_vsock() {
    local status
    [ ${#ARGS[@]} != 0 ] || ARGS=(tests/blackbox/test_vsock.py)
    [ -e "$MACHINE/complete" ] || unpack_machine
    RAM=$(mktemp -d)
    trap 'rm -rf "$RAM"' EXIT
    fill_machine "${ARGS[@]}"
    (cd "$RAM" && find . | "$MACHINE/bin/busybox" cpio -o -H newc 2>/dev/null) >"$VSOCK/ram"
    say "an emulated machine with $(basename "$MACHINE"/boot/vmlinuz-*)"
    boot_machine "$VSOCK/ram" | tr -d '\r' | tee "$LOGS/vsock"
    status=$(sed -n 's/^STATUS //p' "$LOGS/vsock")
    [ -n "$status" ] || die "the machine has not come to an end: see $LOGS/vsock"
    return "$status"
}
