# Sourced by the other scripts: a virtual environment in the clone, with `gpu` and what was asked for in it.
# Does nothing when it is there already and neither the packages' list nor this file has changed.

fail() { printf '%s\n' "$*" >&2; exit 3; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        printf '%s\n' "$candidate"
        return
    done
    fail "gpu needs Python 3.11 or newer; none was found. Install one, or name it: PYTHON=/path/to/python bash $0"
}

make_environment() { # make_environment EXTRAS: what stands between the brackets of pip install '.[EXTRAS]'
    local python stamp wanted lock
    case "$(uname -s)" in MINGW* | MSYS* | CYGWIN*) fail "gpu does not run on native Windows. Use WSL2." ;; esac
    stamp=.venv/.made-for
    wanted="$1 $(cat pyproject.toml worker/locks/train-*.txt scripts/setup.sh | cksum)"
    if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then return; fi
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || exit 3
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "This Python has no venv (Debian and Ubuntu ship it apart). Type: apt-get install python3-venv"
        echo "Making a virtual environment in .venv with $("$python" --version)."
        "$python" -m venv .venv
    fi
    lock=worker/locks/train-$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
    [ -f "$lock" ] || lock=worker/locks/train-3.11.txt
    echo "Installing gpu and its worker into .venv: about 1.5 GB with a CPU build of PyTorch,"
    echo "about 6 GB where pip brings PyTorch with CUDA (Linux, by default). This happens once."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24'
    # PyTorch first and by its exact version: whatever depends on it then keeps the build that is there.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$lock")"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$lock" --editable ".[$1]"
    .venv/bin/python -m compileall -q jobs orchestrator worker
    echo "$wanted" >>"$stamp"
}
