#!/tools/busybox sh
# Runs the tests as the init process of a virtual machine. console.rs parses the output on the machine's console.

/tools/busybox mkdir -p /bin /dev /proc /run /sys /tmp
/tools/busybox --install -s /bin
export PATH=/tools:/bin

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
# Exists only if SELinux is enabled on the kernel command line.
[ ! -d /sys/fs/selinux ] || mount -t selinuxfs selinuxfs /sys/fs/selinux
echo "@kernel $(uname -r)"
# No other program collects entropy here. The kernel generates some for a read, but not for a poll, as in a test.
head -c 1 /dev/random > /dev/null

# New network namespaces must not get fallback tunnel devices.
echo 1 > /proc/sys/net/core/fb_tunnels_only_for_init_net
while read -r module; do
    insmod "/modules/$module.ko" || echo "@complaint failed to load the module $module"
done < /modules/order
# busybox's shell prefers its own `ip`.
/tools/ip link set lo up

while read -r variable; do
    export "$variable"
done < /environment
# The machine exists for the tests only, which may therefore change it.
export IMDS_DISPOSABLE=1
# Lists the features of this kernel on the console.
/imds-agent doctor

if [ -e /brief ]; then
    echo "@brief"
else
    # Prints the features that the agent uses where it has a choice.
    /tools/ip netns add pod
    /tools/ip link add pod0 type veth peer name eth0 netns pod
    if ! /imds-agent run --once; then
        # Every test would fail as well.
        echo "@complaint failed to start the agent: $(/imds-agent run --once 2>&1 | tail -n 1)"
        echo "TEST-RC=1"
        poweroff -f
    fi
    pins=/sys/fs/bpf/imds
    # One line for each JSON object. One of them is the attachment of from_pod to the pod's interface.
    attach_mode=$(/imds-agent status -o json | tr -d ' \n' | tr '{' '\n' \
        | sed -n '/"hook":"from_pod"/s/.*"attach_mode":"\([a-z]*\)".*/\1/p' | head -n 1)
    echo "@took attach_mode: $attach_mode"
    case $(bpftool -j map dump pinned $pins/maps/imds_policy) in
        *'"netns_cookie":0'[,}]*) echo "@took node: initial namespace" ;;
        *'"netns_cookie":'*) echo "@took node: cookie" ;;
    esac
    case $(bpftool prog dump xlated pinned $pins/progs/imds_egress | grep ' call ') in
        *netns_cookie*) echo "@took node_egress: cookie" ;;
        *' call '*) echo "@took node_egress: ifindex" ;;
    esac
    type=$(bpftool -j map show pinned $pins/maps/imds_events | sed 's/.*"type":"\([a-z_]*\)".*/\1/')
    echo "@took events: $type"
    /imds-agent unload
    /tools/ip link delete pod0
    /tools/ip netns delete pod
fi

if [ -d /selinux ]; then
    # The confined agent reads files of the tests here.
    export TMPDIR=/etc/imds-agent
    mkdir -p $TMPDIR
fi
result=0
export IMDS_AGENT=/imds-agent
if [ -e /confined ]; then
    # The directories of the tests.
    mkdir -p /etc/apparmor.d/local
    printf '%s\n' '/tmp/** rwk,' '/run/{,**} rwk,' '/sys/fs/cgroup/{,**} rw,' > /etc/apparmor.d/local/imds-agent
    apparmor_parser --base /etc/apparmor.d --replace --skip-cache /etc/apparmor.d/imds-agent \
        || echo "@complaint failed to load the AppArmor profile"
    export IMDS_AGENT=/confined
fi
for test in /tests/*; do
    name=${test##*/}
    set --
    while read -r argument; do
        set -- "$@" "$argument"
    done < "/arguments/$name"
    echo "@begin $name $*"
    read -r start _ < /proc/uptime
    "$test" --show-output "$@"
    code=$?
    read -r end _ < /proc/uptime
    echo "@end $name $code $((${end%.*} - ${start%.*}))"
    [ $code = 0 ] || result=1
done

dmesg | grep -E 'BUG|Oops|WARNING' | sed 's/^/@complaint the kernel says: /'
echo "TEST-RC=$result"
poweroff -f
