#!/usr/bin/env bash
# System packages (as root, with apt), then the Python environment in .venv. FFCV is optional: without its system
# libraries the plain loader does the same work.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.complete
wanted="$(cat constraints.txt pyproject.toml .ci/setup.sh | sha256sum)"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

packages=()
pkg-config --exists libturbojpeg 2>/dev/null || packages+=(libturbojpeg0-dev)
pkg-config --exists opencv4 2>/dev/null || packages+=(libopencv-dev)
command -v pkg-config >/dev/null || packages+=(pkg-config)
command -v g++ >/dev/null || packages+=(g++)
command -v slurmd >/dev/null || packages+=(slurm-wlm)
command -v munged >/dev/null || packages+=(munge)
python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
python3 -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null \
    || packages+=(python3-dev)
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing ${packages[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    else
        echo "setup: these system packages are missing: ${packages[*]}"
        echo "       Debian or Ubuntu: sudo apt-get install ${packages[*]}"
        echo "       conda:            conda install -c conda-forge opencv libjpeg-turbo pkg-config compilers"
        echo "       (slurm-wlm and munge are for the tests alone). Going on without."
    fi
fi

python3 -m venv .venv
.venv/bin/python -m pip install -q --upgrade pip
.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
    .venv/bin/python -m pip install -q -c constraints.txt -e '.[ffcv]' \
        || echo "setup: FFCV did not build; the thread loader, which gives the same batches, is used instead"
else
    echo "setup: FFCV is left out (no OpenCV or TurboJPEG headers); the thread loader gives the same batches"
fi
echo "$wanted" > "$stamp"
