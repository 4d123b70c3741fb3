#!/bin/sh
# Runs in the guest, as root. Prints one line for each check; the status is 1 if one failed.
status=0
check() {
    if eval "$2"; then echo "ok - $1"; else echo "FAILED - $1"; status=1; fi
}

bin/scratch /tmp/scratch 64k
check 'the folder is a mount point' 'grep -q " /tmp/scratch tmpfs" /proc/mounts'
check 'a file of 16 KiB fits' 'head -c 16384 /dev/zero > /tmp/scratch/small'
check 'a file of 128 KiB does not' '! head -c 131072 /dev/zero 2> /dev/null > /tmp/scratch/large'
exit $status
