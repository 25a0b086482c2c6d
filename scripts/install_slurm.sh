#!/usr/bin/env bash
# Called by run_tests.sh: installs Slurm and munge, which the tests need to run a cluster of two nodes on this machine.
# It acts only as root and where there is apt, and starts no service.  If it fails, those tests are skipped.
PATH=$PATH:/usr/sbin:/sbin
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

policy=/usr/sbin/policy-rc.d  # Debian's packages start no service if this exits with 101
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
echo "Installing slurm and munge"
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
} >/dev/null 2>&1 || echo "warning: they could not be installed; the tests on Slurm will be skipped"
exit 0
