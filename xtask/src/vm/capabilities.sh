#!/bin/sh
# Says what a kernel has: in a virtual machine and on this one alike. $1 is the agent. Its lines are read by console.rs.

# Whether there are devices of a kind, in a namespace of its own.
device() {
    name=$1
    shift
    # shellcheck disable=SC2016
    if said=$(unshare --net sh -c 'ip link add lower0 type veth peer name lower1 && ip link add "$@"' sh "$@" 2>&1); then
        echo "@capability $name: yes"
    else
        echo "@capability $name: no ($(echo "$said" | tr '\n' ' '))"
    fi
}

# On one line: within strings, JSON has no line ends.
printf "@doctor %s\n" "$("$1" doctor --output json | tr -d '\n')"
device netkit upper0 type netkit
device macvlan upper0 link lower0 type macvlan mode bridge
device ipvlan upper0 link lower0 type ipvlan mode l2
device vlan upper0 link lower0 type vlan id 5
