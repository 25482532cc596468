#!/tools/busybox sh
# Prepares a machine with only Debian's essential packages for install_check.sh.

tools() {
    /tools/busybox "$@"
}
tools mkdir -p /dev /proc /run /sys /tmp
tools mount -t proc proc /proc
tools mount -t sysfs sysfs /sys
tools mount -t devtmpfs dev /dev
tools mount -t tmpfs tmp /tmp
tools mount -t tmpfs run /run
tools mount -t bpf bpf /sys/fs/bpf
tools mount -t cgroup2 cgroup /sys/fs/cgroup
tools ip link set lo up
while read -r module; do
    tools insmod "/modules/$module.ko" || echo "failed to load the module $module"
done < /modules/order
# The kernel generates entropy for a read, but not for a poll.
tools head -c 1 /dev/random > /dev/null
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
touch /var/lib/dpkg/status
# Scripts of packages create this link.
[ -e /bin/sh ] || tools ln -s dash /bin/sh
# busybox's shell prefers its own programs, such as dpkg.
exec /bin/dash /install
