#!/usr/bin/env bash
# Called by run_tests.sh: installs sshd and ip, which the tests need to run four servers in network namespaces.
# It acts only as root and where there is apt, and starts no service.  If it fails, those tests are skipped.
PATH=$PATH:/usr/sbin:/sbin
command -v sshd >/dev/null && command -v ip >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

policy=/usr/sbin/policy-rc.d  # Debian's packages start no service if this exits with 101
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
echo "Installing openssh-server and iproute2"
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends openssh-server iproute2
} >/dev/null 2>&1 || echo "warning: they could not be installed; the tests on four servers will be skipped"
exit 0
