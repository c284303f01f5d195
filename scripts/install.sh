#!/usr/bin/env bash
# Makes this clone ready to use: Debian's programs that are missing, and a virtual environment from the lock.
#
#   scripts/install.sh               what `make install` runs; a second run has nothing to do and says so
#   HOSTS=containers scripts/install.sh    with what the tests need, and boots the hosts of tests/system as containers
#   HOSTS=all scripts/install.sh           as virtual machines, too, for `make test-system`
#   PYTHON=python3.12 make install   with another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A non-login shell of root may lack the folders where ip, etcd and sysctl live.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/installed-from

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

# One line each: the program that is looked for, and the Debian package that brings it.
missing_packages() {
    local program package
    while read -r program package; do
        command -v "$program" >/dev/null || printf '%s\n' "$package"
    done <<'LIST'
etcd etcd-server
etcdctl etcd-client
ip iproute2
iptables iptables
nft nftables
ping iputils-ping
sysctl procps
LIST
    # What only tests need; and clang, with which the udp backend gets its fast path.
    if [ -n "${HOSTS:-}" ]; then
        command -v /usr/lib/cni/bridge >/dev/null || printf 'containernetworking-plugins\n'
        command -v clang >/dev/null || printf 'clang\n'
        command -v prometheus >/dev/null || printf 'prometheus\n'
        command -v systemd-analyze >/dev/null || printf 'systemd\n'
        command -v tcpdump >/dev/null || printf 'tcpdump\n'
        command -v mmdebstrap >/dev/null || printf 'mmdebstrap\n'
        command -v systemd-nspawn >/dev/null || printf 'systemd-container\n'
    fi
    if [ "${HOSTS:-}" = all ]; then
        command -v buildah >/dev/null || printf 'buildah\n'
        command -v qemu-system-x86_64 >/dev/null || printf 'qemu-system-x86\n'
    fi
    if [ "$python" = python3 ]; then
        command -v python3 >/dev/null || printf 'python3\n'
        python3 -c 'import ensurepip, venv' 2>/dev/null || printf 'python3-venv\n'
    fi
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "this is no Debian; install what these Debian packages hold, then run it again: ${missing[*]}"
    [ "$(id -u)" = 0 ] ||
        die "missing Debian packages; as root run: apt-get install -y ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    policy=/usr/sbin/policy-rc.d
    if [ -e $policy ]; then policy=; fi
    trap 'rm -f "$log" $policy' EXIT
    # Debian starts what it installs: no etcd of the system shall run because of a demo.
    if [ -n "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"; fi
    if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "apt-get could not install ${missing[*]}; what it said stands above"
    fi
    hash -r
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -eq 0 ] || die "still missing after apt-get: ${missing[*]} (is $(command -v python3) Debian's own?)"
}

check_python() {
    command -v "$python" >/dev/null || die "PYTHON=$python is not a program here"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version 2>&1) is too old; flannelpy needs 3.11 or newer: make install PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments (no ensurepip or venv module)"
}

# Where and with what the environment was made: programs in it hold the path that they were installed at.
made_with() {
    pwd
    "$python" -c 'import platform, sys; print(platform.python_version(), sys.base_prefix)'
}

made_from() {
    sha256sum requirements/dev.lock pyproject.toml setup.py backends/udp/fast.bpf.c
    command -v clang || echo 'no clang'
}

# The stamp holds both. Another path or interpreter makes the environment anew; another lock or pyproject.toml only
# installs what differs, which is quick and works without a network when nothing new is needed.
make_venv() {
    local with from
    with=$(made_with)
    from=$(made_from)
    if [ -f $stamp ] && [ "$(head -n 2 $stamp)" = "$with" ] && $venv/bin/python -c '' 2>/dev/null; then
        if [ "$(tail -n +3 $stamp)" = "$from" ]; then
            say "$venv is up to date"
            return
        fi
        say "bringing $venv up to date with requirements/dev.lock"
    else
        say "making $venv with $("$python" --version) from requirements/dev.lock"
        "$python" -m venv --clear $venv
    fi
    rm -f $stamp # an interrupted installation must not look like a whole one
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    $venv/bin/pip install --quiet --require-hashes -r requirements/dev.lock
    # compat: a path instead of an import hook, which every start of the daemon would pay for.
    $venv/bin/pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
    printf '%s\n%s\n' "$with" "$from" >$stamp
}

install_packages
check_python
make_venv
# An installed package comes compiled; so shall this one, even where PYTHONDONTWRITEBYTECODE is set.
$venv/bin/python -m compileall -q flannelpy backends
say "ready: $venv/bin/flannelpy --help"
