#!/usr/bin/env bash
# Makes the environment that the programs beside this file run in, with every tool at a pinned version.
#
#     tests/benchmarks/peers/make_venv.sh [FOLDER]      (default: runs/peers-venv, which git ignores)
#
# PYTHON=... names the interpreter: 3.11 or newer. The tools go in without their dependencies. bergson and Kronfluence
# ask for torchvision, whose builds don't go with a CPU build of torch: `import transformers` then fails. Neither
# imports it here. logix-ai says that it wants a Python older than 3.11, and runs on 3.11 all the same. What they do
# import is in requirements.txt. Not installed: bitsandbytes and torchaudio (bergson, for GPUs and sound), fast_jl
# (TRAK, for GPUs), pretty_midi (dattri, for its music benchmark).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$(cd "$here/../../.." && pwd)"
folder="${1:-$repo/runs/peers-venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is not Python 3.11 or newer; name another: PYTHON=/path/to/python3.11 $0" >&2
    exit 1
}
"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" -c "$repo/constraints.txt" -r "$here/requirements.txt"
"${pip[@]}" --no-deps --ignore-requires-python -r "$here/peers.txt"

# loopsway as it is in this clone, and the modules that the benchmarks share.
site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
printf '%s\n' "$repo/indexer" "$repo/tests/benchmarks" > "$site/loopsway-benchmarks.pth"
"$folder/bin/python" -c 'import bergson, captum, dattri, kronfluence, logix, sdi, trak, transformers'
echo "made $folder; now: $folder/bin/python $here/who_is_right.py"
