# Sourced by the other scripts: puts the project's environment first on PATH, so that python, torchrun and pytest are its
# own. That is the active environment if it has everything, else the conda environment "lpd", else .venv, which
# environment_setup.sh makes or completes.
_complete() {
    "$1" - 2>/dev/null <<'PYTHON'
import importlib.util, sys
needed = ("torch", "torchvision", "timm", "torch_fidelity", "submitit", "sklearn", "matplotlib", "tensorboard", "pytest", "ruff", "mypy")
sys.exit(not all(importlib.util.find_spec(name) for name in needed))
PYTHON
}
if ! _complete python; then
    _root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    _prefix=$("${CONDA_EXE:-conda}" run -n lpd python -c 'import sys; print(sys.prefix)' 2>/dev/null) || _prefix=
    if [[ -z $_prefix ]] || ! _complete "$_prefix/bin/python"; then
        bash "$_root/environment_setup.sh" || exit
        _prefix=$_root/.venv
    fi
    export PATH=$_prefix/bin:$PATH
fi
# On a CPU, threads that wait in a loop take the cores from those that work: three times slower where cores are shared.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
