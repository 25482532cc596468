# Installs the release artifacts on a machine with only Debian's essential packages. install_check.rs reads the lines with an at sign,
# which end with the machine's clock.

# A pod, without which `verify` fails.
ip netns add pod
ip link add pod0 type veth peer name eth0 netns pod
ip link set pod0 up

# Prints the seconds since the boot.
stamp() {
    read -r now _ < /proc/uptime
    echo "@$1 $2 $now"
}

# Starts the installed agent, verifies it, and ends enforcement.
verify() {
    imds-agent run 2> /tmp/log &
    agent=$!
    until imds-agent status > /tmp/status 2>&1; do
        kill -0 $agent || break
    done
    if imds-agent verify > /tmp/verify 2>&1; then
        stamp verified "$1"
    else
        echo "$1: verify failed"
        cat /tmp/status /tmp/verify /tmp/log
    fi
    kill $agent
    wait $agent
    imds-agent unload
}

stamp install tarball
tar -xzf /artifacts/imds-agent.tar.gz --no-same-owner --strip-components 1 --directory /
verify tarball
rm -r /usr/bin/imds-agent /usr/bin/imds-broker /etc/imds-agent

stamp install deb
dpkg --install /artifacts/imds-agent.deb
verify deb

/tools/busybox poweroff -f
