#!/usr/bin/env bash
# Makes .venv from nothing, or finds that there is nothing to do.
#   scripts/setup.sh        what serving needs (DEVICE=cpu or DEVICE=cuda; RAY=1: Ray, too)
#   scripts/setup.sh test   also what tests and benchmarks talk to: S3 server, iperf3, browser
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cpu}
LOG=.venv/setup.log
STAMP=.venv/setup.stamp
STUB=engine/cpu/torchvision_stub.py
RAY_PACKAGES='ray\|msgpack' # 244 MB that only launch.cluster --ray needs

say() { echo "set-up: $*"; }

logged() {
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 20 "$LOG" >&2
        say "failed: $*; all of its output is in $LOG" >&2
        exit 1
    fi
}

# For 5 minutes at most, while another apt-get holds the lists: it has no time-out for them itself.
update_lists() {
    local tries
    for ((tries = 0; tries < 60; tries++)); do
        apt-get update -qq >>"$LOG" 2>&1 && return
        tail -n 2 "$LOG" | grep -q lock || break
        sleep 5
    done
    logged apt-get update -qq
}

# apt_install WHY PACKAGE...: as root with apt-get, otherwise a sentence.
apt_install() {
    local why=$1
    shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "system packages for $why: $*"
        update_lists
        # another installation may be under way, such as a fresh machine's own upgrade
        logged env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
            install -y -qq --no-install-recommends "$@"
    else
        say "$why needs these system packages (Debian's names), please install them: $*" >&2
        return 1
    fi
}

install_libraries() { # what Mooncake's engine.so links
    local missing=() name
    local needed=(libibverbs1:libibverbs.so.1 libnuma1:libnuma.so.1 librdmacm1:librdmacm.so.1)
    [ "$DEVICE" = cpu ] || needed+=(ibverbs-providers:libmlx5.so.1 libcurl4:libcurl.so.4)
    for name in "${needed[@]}"; do
        ldconfig -p | grep -q "${name#*:}" || missing+=("${name%:*}")
    done
    [ ${#missing[@]} = 0 ] || apt_install "Mooncake" "${missing[@]}"
    # SGLang compiles its page hash (mem_cache/cpp_utils) at an engine's first look-up.
    command -v g++ >/dev/null && echo '#include <openssl/evp.h>' | g++ -E -x c++ - >/dev/null 2>&1 ||
        apt_install "SGLang's page hash" g++ libssl-dev
}

make_venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { say "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
    "$PYTHON" -c 'import ensurepip' 2>/dev/null || apt_install "a virtual environment" python3-venv
    local options=()
    [ "$DEVICE" = cpu ] || options=(--system-site-packages) # keep the machine's torch and SGLang
    logged "$PYTHON" -m venv "${options[@]}" .venv
}

install_packages() {
    local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if [ "$DEVICE" = cpu ]; then
        # First and alone: beside torchvision's wish for another torch, pip would fetch CUDA.
        say "torch ..."
        logged "${pip[@]}" "$(grep '^torch==' requirements.lock)"
        say "SGLang, Mooncake and the other packages of requirements.lock ..."
        grep -v "^\($RAY_PACKAGES\)==" requirements.lock >.venv/requirements
        logged "${pip[@]}" --no-deps -r .venv/requirements
        logged "${pip[@]}" --no-deps --no-build-isolation -e .
    else
        say "SGLang and Mooncake for CUDA, with their own pins ..."
        logged "${pip[@]}" -e '.[cuda,s3,test]'
    fi
    # As a module of its own: were it imported from the package, each interpreter would begin with
    # this checkout's `engine`, also one that is to run the code of another.
    local packages
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$STUB" "$packages/dualpath_torchvision_stub.py"
    echo 'import dualpath_torchvision_stub' >"$packages/zz_dualpath.pth"
    logged .venv/bin/python -c 'import mooncake.engine, sglang'
}

build_default_model() {
    say "default model (SmolLM2-135M-Instruct, a 93 MB download; once) ..."
    .venv/bin/python -m launch.models default >>"$LOG" 2>&1 ||
        say "it could not be built ($(tail -n 1 "$LOG")); serving needs --model, or make setup again" >&2
}

mkdir -p .venv
exec 9>.venv/setup.lock
flock 9
wanted=$({ cat requirements.lock pyproject.toml scripts/setup.sh "$STUB"; echo "$DEVICE $PWD"; "$PYTHON" -V; } | sha256sum)
if [ "$wanted" != "$(cat "$STAMP" 2>/dev/null)" ]; then
    began=$SECONDS
    : >"$LOG"
    install_libraries || true
    say "virtual environment in .venv for $DEVICE ..."
    make_venv
    install_packages
    build_default_model
    echo "$wanted" >"$STAMP"
    say "done in $((SECONDS - began)) s"
fi
if { [ "${RAY:-}" = 1 ] || [ "${1:-}" = test ]; } && ! .venv/bin/python -c 'import ray' 2>/dev/null; then
    say "Ray ..."
    grep "^\($RAY_PACKAGES\)==" requirements.lock >.venv/requirements
    logged .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r .venv/requirements
fi
[ "${1:-}" = test ] || exit 0
if ! { command -v radosgw && command -v ceph-mon && command -v ceph-osd; } >/dev/null; then
    apt_install "the test of the remote tier (a real S3 server)" \
        radosgw ceph-mon ceph-osd ceph-common || true
fi
if ! { command -v ip && command -v tc && command -v iperf3 && command -v nft; } >/dev/null; then
    apt_install "the testbed (hosts as network namespaces)" iproute2 iperf3 nftables || true
fi
if ! command -v mkfs.ext4 >/dev/null; then
    apt_install "the campaign of faults (disks that fail)" e2fsprogs || true
fi
if ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    apt_install "the tests of the dashboard (a browser)" chromium chromium-driver || true
fi
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    apt_install "the test of deploy/slurm (a Slurm of its own)" \
        slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins || true
fi
