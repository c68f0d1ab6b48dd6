#!/usr/bin/env bash
# An MLflow server for the tests of its hook, in the folder given: an environment of its own, so that what MLflow asks for
# changes nothing of ours. Without it those tests are skipped by name, or fail under SAFER_REQUIRE_ALL=1.
set -euo pipefail
folder=${1:?a folder to install into}
python=${2:?the Python to make it with}
find=()
[ -n "${PIP_FIND_LINKS:-}" ] && find=(--find-links "$PIP_FIND_LINKS")
"$python" -m uv venv --quiet --clear --python "$python" "$folder"
if "$python" -m uv pip install --quiet --python "$folder/bin/python" "${find[@]}" 'mlflow==3.17.2'; then
    exit 0
fi
rm -rf "$folder"
echo "MLflow could not be installed; the tests of its hook will be skipped"
[ "${SAFER_REQUIRE_ALL:-}${CI:-}" = "" ]
