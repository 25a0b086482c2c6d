#!/usr/bin/env bash
# Called by run_tests.sh: sshd and ip, with which the tests make four servers out of network namespaces.
# Only as root where there is apt; no service is started.  Where it fails, those tests are skipped and say why.
PATH=$PATH:/usr/sbin:/sbin
command -v sshd >/dev/null && command -v ip >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

policy=/usr/sbin/policy-rc.d  # what Debian's packages ask before they start a service
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
echo "Installing openssh-server and iproute2"
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends openssh-server iproute2
} >/dev/null 2>&1 || echo "they could not be installed"
exit 0
