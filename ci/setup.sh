# shellcheck shell=bash
# Sourced by the other commands, as `source setup.sh EXTRA`, from the root of the project: finds or
# makes the environment, installs the project with that extra and leaves its Python in $PY. An
# active environment whose torch is in range is used; otherwise .venv, made if there is none. A
# torch that imports is never replaced: everything else is installed around that very version.

torch_in_range() {
    "$1" - <<'PYTHON' 2>/dev/null
import re, sys, torch
version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
sys.exit(sys.version_info < (3, 11) or version < (2, 7))
PYTHON
}

# prints the first Python that runs, is new enough and can make environments; $PYTHON comes first
find_python() {
    local candidate new_enough='import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python3.14; do
        if "$candidate" -c "$new_enough" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "dbmtl needs Python 3.11 or newer with the venv module, and none was found" >&2
    echo "(set PYTHON=/path/to/python)" >&2
    return 1
}

# sets PY, and own_environment=no where somebody else's environment is used
choose_environment() {
    local base active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    own_environment=yes
    if [ -n "$active" ] && [ "$active" != "$PWD/.venv" ] && torch_in_range "$active/bin/python"; then
        own_environment=no
        PY=$active/bin/python
        return
    fi
    PY=$PWD/.venv/bin/python
    if ! "$PY" -c 'import pip' 2>/dev/null; then
        base=$(find_python) || return 1
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv || return 1
        # pip 23, which Debian 12 has, takes many minutes to resolve the extras
        "$PY" -m pip install -qq --upgrade 'pip>=24' || return 1
    fi
}

# prints the constraints; an installed torch keeps its version
pins() {
    local version
    if ! version=$("$PY" -c 'import torch' 2>/dev/null &&
        "$PY" -c 'from importlib.metadata import version; print(version("torch"))'); then
        cat ci/constraints.txt
    elif torch_in_range "$PY"; then
        grep -v '^torch==' ci/constraints.txt
        echo "torch==$version"
    else
        echo "torch $version in $PY is older than 2.7: update it, or remove .venv" >&2
        return 1
    fi
}

# install PROJECT: the project in this folder with an extra, such as '.[dev]'
install() {
    local constraints quiet=()
    [ -t 1 ] || quiet=(-qq) # pip's progress is for a terminal
    constraints=$(mktemp)
    pins >"$constraints" || return 1
    echo "installing into $("$PY" -c 'import sys; print(sys.prefix)'): a few minutes the first time"
    "$PY" -m pip install "${quiet[@]}" --constraint "$constraints" setuptools wheel || return 1
    "$PY" -m pip install "${quiet[@]}" --constraint "$constraints" --no-build-isolation \
        --config-settings editable_mode=compat --editable "$1" || return 1
    rm -f "$constraints"
    # in somebody's own environment a warning
    "$PY" -m pip check || [ "$own_environment" = no ]
}

# prints the extras that hold all that an extra holds
extras_with() {
    case $1 in
    reproduce) echo "reproduce notebooks book dev" ;;
    notebooks) echo "notebooks dev" ;;
    *) echo "$1" ;;
    esac
}

setup() {
    local stamp key extra bin
    choose_environment || return 1
    # nothing to do where this folder was set up from these very files
    stamp=$("$PY" -c 'import sys; print(sys.prefix)')/.dbmtl-setup
    key=$(cat ci/constraints.txt pyproject.toml settings.ini ci/setup.sh |
        "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    key="$PWD $key"
    bin=$(dirname "$PY")
    export PATH="$bin:$PATH"
    for extra in $(extras_with "$1"); do
        if grep -qsxF "$key $extra" "$stamp"; then
            return
        fi
    done
    install ".[$1]" || return 1
    grep -qsF "$key " "$stamp" || rm -f "$stamp" # of other files, or of another folder
    echo "$key $1" >>"$stamp"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
unset PYTHONPATH PYTHONHOME IN_TEST
setup "$1" || exit 1
