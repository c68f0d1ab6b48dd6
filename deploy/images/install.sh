#!/bin/sh
# The install steps of both images, one word each, so that what deploy/images/check.py runs is what the images are built with.
#
#   packages NAME…   Debian or Ubuntu packages, without recommended ones and without the lists that finding them left
#   venv             $VENV, empty, and $VENV-tools, whose pip fills it: pip itself stays in the builder
#   torch            $TORCH, first and alone: what depends on it would otherwise choose the build
#   product EXTRAS   the source tree of this folder with those extras, at the versions of constraints.txt
#   user             uid and gid 10001, and the one folder it may write
#   bare             fails where a compiler, make or pip can be run
set -eu

VENV=${VENV:-/opt/venv}
PIP="$VENV-tools/bin/pip --python $VENV/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

step=$1
shift
case "$step" in
packages)
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
    ;;
venv)
    python3 -m venv "$VENV-tools"
    python3 -m venv --without-pip "$VENV"
    ;;
torch)
    $PIP install -q --no-compile "$TORCH"
    ;;
product)
    # The build of the product itself is held to the same versions, under the old name of that setting and the new one.
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $PIP install -q --no-compile ".[$1]"
    $PIP check
    # Bytecode that names no file times: the same files give the same bytes, and a read-only root loses no time. Packages have
    # files for other Pythons, which do not compile: pip passes over them too.
    "$VENV/bin/python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$VENV/lib" || true
    ;;
user)
    groupadd --gid 10001 safer
    useradd --uid 10001 --gid 10001 --home-dir /var/lib/safer-audit --create-home --shell /usr/sbin/nologin safer
    chmod 0700 /var/lib/safer-audit
    ;;
bare)
    for tool in cc gcc c++ g++ clang make pip pip3; do
        if command -v "$tool" >/dev/null || [ -e "$VENV/bin/$tool" ]; then
            echo "$tool is in the image" >&2
            exit 1
        fi
    done
    ;;
*)
    echo "no such step: $step" >&2
    exit 2
    ;;
esac
