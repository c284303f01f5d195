#!/usr/bin/env bash
# Makes what tests/system boots: a Debian with systemd, Docker and etcd, and a kernel for virtual machines. Once.
#
#   scripts/machine.sh root     prints the folder of the root (first time: about a minute, 530 MB)
#   scripts/machine.sh kernel   prints the folder of vmlinuz, initrd and the layer over the root that goes with them
#   scripts/machine.sh folder   prints where they go: a folder per version of this script, safe to delete
#
# FLANNELPY_CACHE=/path chooses another place than ~/.cache/flannelpy. Needs root, mmdebstrap and a Debian mirror.
set -euo pipefail
script=$(realpath "${BASH_SOURCE[0]}")

release=bookworm
packages=systemd,systemd-sysv,dbus,udev,kmod,iproute2,iptables,nftables,iputils-ping,procps,python3,python3-venv
packages+=,docker.io,etcd-server,etcd-client,busybox-static,qemu-guest-agent,ca-certificates

base=${FLANNELPY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flannelpy}/machine
folder=$base/$(sha256sum <"$script" | cut -c 1-12)

say() { printf 'machine: %s\n' "$*" >&2; }
die() { printf 'machine: error: %s\n' "$*" >&2; exit 1; }

# Both steps mount things. They do so in namespaces of their own, which end with this script, however it ends.
alone() { setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc "$script" "$@" "$folder"; }

# Run with the output in a file that is shown only on failure, then put the result in its place in one step.
once() {
    local what=$1
    if [ -e "$folder/$what" ]; then return; fi
    [ "$(id -u)" = 0 ] || die "making the $what needs root"
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    if [ -e "$folder/$what" ]; then return; fi
    rm -rf "$folder/$what.new"
    say "making the $what in $folder"
    if ! alone "make-$what" >"$folder/$what.log" 2>&1; then
        tail -n 20 "$folder/$what.log" >&2
        rm -rf "$folder/$what.new"
        die "could not make the $what; what was said stands above"
    fi
    mv "$folder/$what.new" "$folder/$what"
}

make_root() {
    command -v mmdebstrap >/dev/null || die "mmdebstrap is not installed: apt-get install mmdebstrap"
    # Nothing here must survive a power cut, and nobody reads the manual there.
    mmdebstrap --mode=root --variant=minbase --include="$packages" --skip=check/empty \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' "$release" "$1/root.new"
    local root=$1/root.new unit
    # A machine gets its name and id when it boots. Only one of the machines shall be an etcd.
    : >"$root/etc/machine-id"
    rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
    chroot "$root" systemctl --quiet disable etcd apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
    chroot "$root" systemctl --quiet enable systemd-networkd
    # The console of a virtual machine is for its log.
    for unit in getty@tty1 serial-getty@ttyS0 console-getty e2scrub_reap; do
        chroot "$root" systemctl --quiet mask "$unit.service"
    done
}

make_kernel() {
    local out=$1/kernel.new merged=$1/kernel.new/merged
    mkdir -p "$out"/{layer,work,merged}
    mount -t overlay overlay -o "lowerdir=$1/root,upperdir=$out/layer,workdir=$out/work" "$merged"
    cp --remove-destination /etc/resolv.conf "$merged/etc/resolv.conf"
    mount -t proc proc "$merged/proc"
    mount -t tmpfs lists "$merged/var/lib/apt/lists"
    mount -t tmpfs debs "$merged/var/cache/apt"
    export DEBIAN_FRONTEND=noninteractive
    chroot "$merged" apt-get -q update
    chroot "$merged" apt-get -q install -y --no-install-recommends initramfs-tools
    # A small initrd boots faster in an emulator: the modules of the disk and nothing else.
    printf 'MODULES=list\nCOMPRESS=gzip\n' >"$merged/etc/initramfs-tools/conf.d/small"
    printf '%s\n' virtio_pci virtio_blk >>"$merged/etc/initramfs-tools/modules"
    chroot "$merged" apt-get -q install -y --no-install-recommends linux-image-cloud-amd64
    rm "$merged/etc/resolv.conf"
    cp "$merged"/boot/vmlinuz-* "$out/vmlinuz"
    cp "$merged"/boot/initrd.img-* "$out/initrd"
    rm "$merged"/boot/*
    umount "$merged"/{proc,var/lib/apt/lists,var/cache/apt,}
    rm -rf "$out"/{work,merged}
}

case ${1:-} in
    root) once root; printf '%s\n' "$folder/root" ;;
    kernel) once root; once kernel; printf '%s\n' "$folder/kernel" ;;
    folder) printf '%s\n' "$folder" ;;
    make-root) make_root "$2" ;;
    make-kernel) make_kernel "$2" ;;
    *) die "usage: scripts/machine.sh root|kernel|folder" ;;
esac
