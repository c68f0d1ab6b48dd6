#!/usr/bin/env bash
# The servers that tests start for themselves: Redis, PostgreSQL, an S3 server (Ceph RGW) and Prometheus, libfaketime for
# processes whose clock is off, debootstrap for the roots that stand in for images, and Slurm; from Debian's packages, when root.
# Without them those tests are skipped by name, or fail under SAFER_REQUIRE_ALL=1.
set -euo pipefail
wanted=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || wanted+=(redis-server)
command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || wanted+=(postgresql)
command -v promtool >/dev/null || wanted+=(prometheus)
compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null || wanted+=(libfaketime)
command -v debootstrap >/dev/null || wanted+=(debootstrap)
for tool in ceph-mon ceph-osd radosgw; do
    command -v "$tool" >/dev/null || wanted+=("$tool")
done
for tool in slurmctld slurmd munged:munge sbatch:slurm-client; do
    command -v "${tool%:*}" >/dev/null || wanted+=("${tool#*:}")
done
[ ${#wanted[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # No service is to start by itself: the tests run private ones on free ports.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null && exit 0
fi
echo "missing here: ${wanted[*]}; their tests will be skipped (install these Debian packages)"
[ "${SAFER_REQUIRE_ALL:-}${CI:-}" = "" ]
