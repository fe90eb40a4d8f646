#!/usr/bin/env bash
# System packages (as root, with apt), then the Python environment in .venv. `setup.sh tests` also installs the browser
# and the LaTeX that tests open reports and tables with. docs/installation.md says what MUGS_PYTHON and MUGS_TORCH choose,
# and how to install without network. FFCV is optional: without its system libraries everything else is installed, and the
# plain loader does the same work; once they are there, the next `make setup` adds FFCV.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${MUGS_PYTHON:-python3}"
# The last choice holds until another one is made: every target of the Makefile comes here.
torch="${MUGS_TORCH:-$(cat .venv/.torch 2>/dev/null || echo cuda13)}"
venv_options=()
constraints=constraints.txt
case "$torch" in
    cuda13) ;;
    cuda12) constraints=constraints-cuda12.txt ;;
    installed)
        venv_options=(--system-site-packages)
        # The torch that is there decides about everything that goes with it.
        constraints="$(mktemp)"
        trap 'rm -f "$constraints"' EXIT
        grep -viE '^(torch|torchvision|triton|numpy|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' constraints.txt >"$constraints"
        ;;
    *)
        echo "setup: stopped: MUGS_TORCH is '$torch', expected cuda13, cuda12 or installed"
        exit 1
        ;;
esac
PATH="$PATH:/usr/sbin:/sbin"

has() { command -v "$1" >/dev/null 2>&1; }
library() { has pkg-config && pkg-config --exists "$1"; }
python_ok() { "$python" -c 'import sys, ensurepip, venv; assert sys.version_info >= (3, 11)' 2>/dev/null; }
headers() {
    "$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null
}
ffcv_can_be_built() { library opencv4 && library libturbojpeg && has g++ && headers; }
state() {
    cat constraints*.txt pyproject.toml .ci/setup.sh | sha256sum
    echo "torch: $torch"
    ffcv_can_be_built && echo "with FFCV" || echo "without FFCV"
}

install() {
    echo "setup: installing $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
can_install() { [ "$(id -u)" = 0 ] && has apt-get; }

if [ "${1:-}" = tests ]; then
    tests=()
    has chromium || has google-chrome || has chromium-browser || tests+=(chromium)
    has pdflatex || tests+=(texlive-latex-base texlive-latex-recommended)
    if [ ${#tests[@]} -gt 0 ] && can_install; then
        install "${tests[@]}"
    elif [ ${#tests[@]} -gt 0 ]; then
        echo "setup: the tests of reports and LaTeX tables will be skipped: they need ${tests[*]}"
        echo "       Debian, Ubuntu: sudo apt-get install ${tests[*]}"
    fi
fi

stamp=.venv/.complete
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state)" ] && exit 0

base=() ffcv=() slurm=()
python_ok || base+=(python3-venv)
library libturbojpeg || ffcv+=(libturbojpeg0-dev)
library opencv4 || ffcv+=(libopencv-dev)
has pkg-config || ffcv+=(pkg-config)
has g++ || ffcv+=(g++)
headers || ffcv+=(python3-dev)
has slurmctld && has slurmd || slurm+=(slurm-wlm)
has munged || slurm+=(munge)
missing=("${base[@]}" "${ffcv[@]}" "${slurm[@]}")

if [ ${#missing[@]} -gt 0 ] && can_install; then
    install "${missing[@]}"
else
    if [ ${#ffcv[@]} -gt 0 ]; then
        echo "setup: FFCV needs system packages that are not here: ${ffcv[*]}"
        echo "       Debian, Ubuntu: sudo apt-get install ${ffcv[*]}"
        echo "       conda:          conda install -c conda-forge opencv libjpeg-turbo pkg-config gxx"
        echo "       then again:     make setup"
    fi
    if [ ${#slurm[@]} -gt 0 ]; then
        echo "setup: the tests that start a Slurm cluster will be skipped: they need ${slurm[*]}"
        echo "       Debian, Ubuntu: sudo apt-get install ${slurm[*]}"
    fi
fi
if ! python_ok; then
    echo "setup: stopped: '$python' is not Python 3.11 or newer with the modules venv and ensurepip"
    echo "       Debian, Ubuntu: sudo apt-get install python3-venv"
    echo "       conda:          conda create -n mugs python=3.11 && conda activate mugs"
    echo "       another one:    MUGS_PYTHON=/path/to/python3.11 make setup"
    exit 1
fi

if [ "$torch" = installed ] && ! "$python" -c 'import torch, torchvision' 2>/dev/null; then
    echo "setup: stopped: MUGS_TORCH=installed, but '$python' cannot import torch and torchvision"
    echo "       load their module or environment first, or name its Python with MUGS_PYTHON"
    exit 1
fi
if [ "$torch" = installed ] && ls -d .venv/lib/python*/site-packages/torch >/dev/null 2>&1; then
    echo "setup: stopped: .venv has a torch of its own, which would hide the installed one; remove .venv first"
    exit 1
fi

# torch with its CUDA libraries and the rest take 6.5 GiB; pip unpacks beside what it downloaded.
free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
if [ "$torch" != installed ] && ! ls -d .venv/lib/python*/site-packages/torch >/dev/null 2>&1 && [ "$free_gib" -lt 8 ]; then
    echo "setup: stopped: $free_gib GiB are free in $PWD, and the Python environment needs 8"
    echo "       free some, or clone the repository to another disk"
    exit 1
fi

echo "setup: installing Python packages into .venv, which takes minutes the first time"
"$python" -m venv "${venv_options[@]}" .venv
echo "$torch" >.venv/.torch
.venv/bin/python -m pip install -qq --upgrade pip
.venv/bin/python -m pip install -qq -c "$constraints" -e '.[dev]'
now="$(state)"
if ! ffcv_can_be_built; then
    echo "setup: FFCV is left out; the thread loader gives the same batches"
elif ! .venv/bin/python -m pip install -qq -c "$constraints" -e '.[ffcv]' || ! .venv/bin/python -c 'import ffcv'; then
    .venv/bin/python -m pip uninstall -qq -y ffcv 2>/dev/null || true
    echo "setup: FFCV did not build or does not start (see above) and is left out; the thread loader gives the same batches"
fi
echo "$now" > "$stamp"
