#!/usr/bin/env bash
# A Chromium for the browser tests: from Debian's packages, when root; else what is on PATH.
set -euo pipefail
if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
fi
echo "no Chromium here: browser tests will be skipped (install Debian's package 'chromium')"
[ "${SAFER_REQUIRE_ALL:-}${CI:-}" = "" ]
