#!/usr/bin/env bash
# Regenerates the Python code of loopsway/v1/*.proto in place. Commit the output; never edit it.
# PYTHON: an interpreter that has the project's `dev` extra (default: .venv's, else python3).
# grpcio-tools is pinned low on purpose: its output runs on every protobuf runtime from its own on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x ../.venv/bin/python ]] && PYTHON=../.venv/bin/python
fi
scripts="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"

"$PYTHON" -m grpc_tools.protoc \
    --plugin="protoc-gen-mypy=$scripts/protoc-gen-mypy" \
    --plugin="protoc-gen-mypy_grpc=$scripts/protoc-gen-mypy_grpc" \
    -I . --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
    loopsway/v1/*.proto
