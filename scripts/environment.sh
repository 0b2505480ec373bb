# Choose a Python environment, and install the package there with one extra: source environment.sh EXTRA
# Sets `python`, and enters the repository's root.
#
# The active environment is used if it has torch and can be installed into; otherwise .venv in the repository,
# which is made where it is missing, sees the torch of the system's Python if that has one, and gets one if not.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=$1
torch=torch==2.13.0

# Threads that wait by spinning take the core from those that work, wherever something else is running too:
# measured on two busy cores, the demo took 108 s, and 35 s with this.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# Say where a Python keeps its packages, if it is new enough to be used.
prefix() {
    "$1" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.prefix)' 2>/dev/null
}

# A torch that pyproject.toml accepts: an older one would be replaced by a download of gigabytes.
has_torch() {
    "$1" -P -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 4)' 2>/dev/null
}

can_install() {
    "$1" - 2>/dev/null <<'EOF'
import os, sys, sysconfig
managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit((managed and sys.prefix == sys.base_prefix) or not os.access(sysconfig.get_path("purelib"), os.W_OK))
EOF
}

# What was installed last, beside the packages; "test" includes "examples".
stamp=$(cat <(pwd) pyproject.toml | cksum)
up_to_date() {
    local known
    for known in "$extra" test; do
        [[ "$(cat "$1/influence-pipeline.$known" 2>/dev/null)" == "$stamp" ]] && return 0
    done
    return 1
}

choose() {
    local candidate found=
    for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} python python3; do
        found=$(prefix "$candidate") || continue
        if up_to_date "$found" || { has_torch "$candidate" && can_install "$candidate"; }; then
            python=$(command -v "$candidate")
            return
        fi
    done
    python=$PWD/.venv/bin/python
    "$python" -m pip --version >/dev/null 2>&1 && return
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        found=$(prefix "$candidate") || continue
        echo "making .venv with $found" >&2
        if has_torch "$candidate"; then
            "$candidate" -m venv --clear --system-site-packages .venv
        else
            "$candidate" -m venv --clear .venv
        fi
        return
    done
    echo "error: no Python of at least 3.11 was found on PATH" >&2
    exit 2
}

choose
environment=$(prefix "$python")
if ! up_to_date "$environment"; then
    echo "installing into $environment (once)" >&2
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null  # uv makes environments without
    has_torch "$python" || "$python" -m pip install --disable-pip-version-check "$torch"
    "$python" -m pip install --disable-pip-version-check --quiet --editable ".[$extra]"
    echo "$stamp" >"$environment/influence-pipeline.$extra"
fi
