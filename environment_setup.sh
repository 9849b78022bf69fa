#!/usr/bin/env bash
# Installs what training, evaluation, the demo and the tests need, in the pinned versions of requirements.lock:
#   bash environment_setup.sh         into .venv beside this script
#   bash environment_setup.sh NAME    into the conda environment NAME (made if it does not exist) where there is conda,
#                                     otherwise into .venv
# A second run costs seconds; an interrupted one is taken up again; a .venv that was moved or copied is made anew.
# About 6 GB with the CUDA libraries, which a machine without a GPU gets as well.
#
# After changing the dependencies in pyproject.toml, renew the pins by
#   uv pip compile --universal --python-version 3.11 --extra demo --extra dev --no-annotate --no-header \
#       pyproject.toml -o requirements.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # packages of ~/.local do not count as installed

lock=requirements.lock
fail() {
    echo "error: $*" >&2
    exit 1
}
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [[ $# -gt 1 || ${1:-} == -* ]]; then
    echo "usage: bash environment_setup.sh [NAME]    (NAME: a conda environment; without it, .venv)" >&2
    exit 2
fi
[[ -f $lock ]] || fail "$lock is missing; run this script from a complete checkout."

name=${1:-}
conda=${CONDA_EXE:-conda}
if [[ -n $name ]] && ! command -v "$conda" >/dev/null; then
    echo "conda is not installed: using .venv in place of a conda environment '$name'"
    name=
fi

# 1. An interpreter with pip, in an environment of its own.
if [[ -n $name ]]; then
    if ! "$conda" env list | awk '{ print $1 }' | grep -qxF -- "$name"; then
        echo "making the conda environment '$name' with Python 3.12"
        "$conda" create --yes --quiet --name "$name" --override-channels --channel conda-forge python=3.12 pip ||
            fail "conda could not make the environment '$name' (see above); without a NAME this script uses .venv."
    fi
    prefix=$("$conda" run -n "$name" python -c 'import sys; print(sys.prefix)') ||
        fail "the conda environment '$name' has no working Python; remove it by: conda env remove -n $name"
    activate="conda activate $name"
    redo="conda env remove -n $name"
else
    prefix=$PWD/.venv
    activate="source .venv/bin/activate"
    redo="rm -r .venv"
    # The scripts of an environment name the place where it was made: moved or copied, they lead back there.
    made_as=$(source "$prefix/bin/activate" 2>/dev/null && echo "$VIRTUAL_ENV") || made_as=
    if ! "$prefix/bin/python" -c '' 2>/dev/null || [[ ! $made_as -ef $prefix ]]; then
        base= lacking=
        for candidate in python3 python3.13 python3.12 python3.11; do
            supported "$candidate" || continue
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                base=$candidate
                break
            fi
            lacking=$candidate
        done
        if [[ -z $base && -n $lacking ]]; then
            version=$("$lacking" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
            fail "$lacking lacks its venv module; install it (Debian, Ubuntu: apt install $version-venv) and run again."
        fi
        [[ -n $base ]] || fail "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1 || true));" \
            "install one of them, or conda, and run again."
        [[ -z $made_as || $made_as -ef $prefix ]] || echo "making .venv anew: it was made as $made_as"
        echo "making .venv with $("$base" --version)"
        "$base" -m venv --clear .venv || fail "$base could not make .venv (see above)."
    fi
fi
python=$prefix/bin/python
supported "$python" || fail "$prefix has $("$python" --version 2>&1), needed is 3.11, 3.12 or 3.13; remove it by: $redo"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || fail "$python has no pip."

# 2. The packages, unless the stamp says that just these are there.
stamp=$prefix/lpd_environment.stamp
wanted="$(sha256sum <"$lock") $("$python" -VV | tr '\n' ' ')"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "the environment is up to date; activate it by: $activate"
    exit 0
fi
rm -f "$stamp"
# A package whose installation was cut off has no INSTALLER yet, but pip would take it for installed.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$packages" -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' \; -exec rm -r '{}' +

log=$prefix/lpd_environment.log
echo "installing the packages of $lock into $prefix (minutes the first time; log: $log)"
if ! "$python" -m pip install --no-input --progress-bar off -r "$lock" 2>&1 | tee "$log" | awk '
    $NF == "MB)" && substr($(NF - 1), 2) + 0 >= 20 { sub(/^ +/, ""); print "  " $0; fflush() }
    /^Installing collected packages/ { print "  unpacking"; fflush() }'; then
    grep -E 'ERROR|error:' "$log" | tail -n 5 >&2
    fail "the packages could not be installed (log: $log); without a network connection or disk space that is bound to" \
        "fail. Run the same command again to continue."
fi
printf '%s\n' "$wanted" >"$stamp"
echo "the environment is ready; activate it by: $activate"
