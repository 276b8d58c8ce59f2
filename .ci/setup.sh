#!/bin/sh
# Makes the environment that the Makefile's targets run in: .venv, with the name of a simulator (pusht, libero, aloha) .venv-NAME,
# and with "next FOLDER" .venv-next, which has the LeRobot of a checkout in the place of the pinned one.
# Needs git, make and any Python 3 with pip. Finds uv or installs it into .uv/; finds a Python >= 3.12 or lets uv download one.
set -eu
cd "$(dirname "$0")/.."
# The system's certificates, as git and pip use them: behind a company's proxy uv's own list does not do. (Two names, by age of uv.)
export UV_SYSTEM_CERTS=true UV_NATIVE_TLS=true

say() { echo "[set-up] $*"; }

fail() {
    echo "[set-up] $*" >&2
    exit 1
}

# A name on PATH may be a pyenv shim that exists and does not answer: what counts is that it runs.
has_pip() { "$1" -m pip --version >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 8))'; }
is_new_enough() { "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

pyenv_versions=${PYENV_ROOT:-$HOME/.pyenv}/versions

find_python() { # $1: a check, the rest: candidates. Prints the first that passes.
    check=$1
    shift
    for candidate in "$@"; do
        if "$check" "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# Of the flags used below, `uv venv --clear` is the youngest: an older uv that happens to be on PATH will not do.
is_usable_uv() { "$1" venv --help 2>/dev/null | grep -q -e '--clear'; }

install_uv() { # Into a plain folder: `python -m venv` needs ensurepip, which Debian packs apart, and pip alone will do.
    installer=$(find_python has_pip ${python:-} python3 python /usr/bin/python3 "$pyenv_versions"/3.*/bin/python) ||
        fail "Found neither uv nor a Python 3 with pip. Install uv (https://docs.astral.sh/uv), then run make again."
    say "uv: not found, installing it into .uv/ with $installer"
    rm -rf .uv
    PIP_ROOT_USER_ACTION=ignore "$installer" -m pip install --quiet --disable-pip-version-check --target .uv uv &&
        is_usable_uv .uv/bin/uv ||
        fail "pip could not install uv (see above). Install uv (https://docs.astral.sh/uv), then run make again."
}

main_environment() {
    python=$(find_python is_new_enough python3.12 python3.13 python3 python \
        "$pyenv_versions"/3.12*/bin/python "$pyenv_versions"/3.13*/bin/python) || python=

    if is_usable_uv .uv/bin/uv; then
        uv=.uv/bin/uv
    elif is_usable_uv uv; then
        uv=uv
    else
        install_uv
        uv=.uv/bin/uv
    fi
    say "uv: $(command -v "$uv") ($("$uv" --version | cut -d ' ' -f 2))"

    if is_new_enough .venv/bin/python; then
        say "Python: .venv has one already ($(.venv/bin/python --version))"
    else
        if [ -n "$python" ]; then say "Python: $python"; else say "Python: none >= 3.12 found, uv downloads one"; fi
        "$uv" venv $quiet --clear --python "${python:-3.12}" .venv ||
            fail "No environment was made (see above). Without a way to download one, put a Python 3.12 on PATH, then run make again."
    fi

    say "packages: into .venv (6 GB on disk; the first time on a machine they are downloaded)"
    "$uv" pip install $quiet --python .venv --constraints .ci/constraints.txt --editable . --group dev
    touch .venv/ready
}

simulator_environment() { # $1: an extra that clashes with .venv: pusht brings another cv2, libero and aloha need an older MuJoCo.
    uv=uv
    [ -x .uv/bin/uv ] && uv=.uv/bin/uv
    say "packages: into .venv-$1"
    "$uv" venv $quiet --clear --python .venv/bin/python ".venv-$1"
    constraints=.ci/constraints.txt
    if [ "$1" != pusht ]; then
        constraints=.venv-$1/constraints.txt
        sed 's/^mujoco==.*/mujoco==3.8.1/' .ci/constraints.txt >"$constraints"
    fi
    # LIBERO's egl-probe is built by cmake, which .venv has. What it was written for is older than cmake 4 accepts unasked.
    PATH="$PWD/.venv/bin:$PATH" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        "$uv" pip install $quiet --python ".venv-$1" --constraints "$constraints" --editable ".[$1]" --group dev
    touch ".venv-$1/ready"
}

next_environment() { # $1: a checkout of LeRobot. The other packages stay as they are pinned, as far as it allows.
    [ -f "${1:-}/src/lerobot/__init__.py" ] ||
        fail "'${1:-}' is no checkout of LeRobot (git clone https://github.com/huggingface/lerobot): make test-next LEROBOT=FOLDER"
    checkout=$(cd "$1" && pwd)
    uv=uv
    [ -x .uv/bin/uv ] && uv=.uv/bin/uv
    say "packages: into .venv-next, with the LeRobot in $checkout"
    "$uv" venv $quiet --clear --python .venv/bin/python .venv-next
    grep -v '^lerobot==' .ci/constraints.txt >.venv-next/constraints.txt
    # What pyproject.toml requires, with the checkout in the place of LeRobot's releases that it bounds.
    .venv-next/bin/python - "$checkout" >.venv-next/requirements.txt <<'END'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
for line in (*project["project"]["dependencies"], *project["dependency-groups"]["dev"]):
    print(line.partition("]")[0] + "] @ file://" + sys.argv[1] if line.startswith("lerobot[") else line)
END
    # Not from the index of torch that the checkout names, but from that of the other environments.
    "$uv" pip install $quiet --no-sources --python .venv-next --constraints .venv-next/constraints.txt \
        --requirements .venv-next/requirements.txt
    "$uv" pip install $quiet --python .venv-next --no-deps --editable .
}

quiet=--quiet
[ -t 2 ] && quiet= # A person gets uv's progress bars, a log file does not.
started=$(date +%s)
case ${1:-main} in
main) main_environment ;;
pusht | libero | aloha) simulator_environment "$1" ;;
next) next_environment "${2:-}" ;;
*) fail "unknown environment '$1': nothing (for .venv), pusht, libero, aloha, or next FOLDER" ;;
esac
say "ready after $(($(date +%s) - started)) s"
