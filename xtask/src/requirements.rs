//! Programs that the tasks need, with the packages that contain them.

/// Task that has requirements.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Purpose {
    Build,
    Ebpf,
    Demo,
    Bench,
    Test,
    Lint,
    Fuzz,
    Deny,
    Vm,
    CrossAmd64,
    CrossArm64,
    Dist,
    Image,
    EndToEnd,
    Runtimes,
    Manifests,
}

/// Programs that some tasks need.
pub(crate) struct Tools {
    /// Owner of the programs in messages.
    pub(crate) owner: &'static str,
    pub(crate) purposes: &'static [Purpose],
    /// Each program with the Debian package that contains it.
    pub(crate) programs: &'static [(&'static str, &'static str)],
}

pub(crate) const TOOLS: [Tools; 14] = [
    // Interpreter of `prose.py`.
    Tools { owner: "the prose check's", purposes: &[Purpose::Lint], programs: &[("python3", "python3")] },
    Tools { owner: "the demo's", purposes: &[Purpose::Demo], programs: &[("ip", "iproute2")] },
    Tools {
        owner: "the tests'",
        purposes: &[Purpose::Bench, Purpose::Test, Purpose::Vm, Purpose::EndToEnd],
        programs: &[
            ("/usr/lib/cni/bandwidth", "containernetworking-plugins"),
            ("ip", "iproute2"),
            ("iptables", "iptables"),
            ("tc", "iproute2"),
            ("nft", "nftables"),
            ("bpftool", "bpftool"),
            ("nsenter", "util-linux"),
            ("pasta", "passt"),
            ("slirp4netns", "slirp4netns"),
        ],
    },
    // Tests of the installation script and of the release.
    Tools {
        owner: "the tests'",
        purposes: &[Purpose::Test],
        programs: &[
            ("curl", "curl"),
            ("minisign", "minisign"),
            ("openssl", "openssl"),
            ("rpmbuild", "rpm"),
            ("shellcheck", "shellcheck"),
            ("skopeo", "skopeo"),
        ],
    },
    // C++ compiler, with which libFuzzer is built.
    Tools { owner: "the fuzzer's", purposes: &[Purpose::Fuzz], programs: &[("c++", "g++")] },
    // `vm` itself downloads QEMU and other programs.
    Tools {
        owner: "the virtual machines'",
        purposes: &[Purpose::Vm],
        programs: &[
            ("apt-get", "apt"),
            ("bzip2", "bzip2"),
            ("dpkg-deb", "dpkg"),
            ("gpgv", "gpgv"),
            ("setpriv", "util-linux"),
            ("xz", "xz-utils"),
        ],
    },
    // Compilers and C libraries of the other architecture.
    Tools {
        owner: "the x86_64 build's",
        purposes: &[Purpose::CrossAmd64],
        programs: &[
            ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
            ("/usr/x86_64-linux-gnu/lib/ld-linux-x86-64.so.2", "libc6-dev-amd64-cross"),
        ],
    },
    Tools {
        owner: "the arm64 build's",
        purposes: &[Purpose::CrossArm64],
        programs: &[
            ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
            ("/usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1", "libc6-dev-arm64-cross"),
        ],
    },
    Tools { owner: "the benchmarks'", purposes: &[Purpose::Bench], programs: &[("ip6tables", "iptables")] },
    Tools {
        owner: "the release's",
        purposes: &[Purpose::Dist, Purpose::EndToEnd],
        programs: &[("minisign", "minisign"), ("rpmbuild", "rpm")],
    },
    Tools { owner: "the image's", purposes: &[Purpose::Image], programs: &[("podman", "podman")] },
    // Container runtimes, and the programs in their images.
    Tools {
        owner: "the container runtimes'",
        purposes: &[Purpose::Runtimes, Purpose::EndToEnd],
        programs: &[
            ("/usr/lib/cni/bridge", "containernetworking-plugins"),
            ("/usr/lib/podman/netavark", "netavark"),
            ("busybox", "busybox-static"),
            ("catatonit", "catatonit"),
            ("containerd", "containerd"),
            ("curl", "curl"),
            ("podman", "podman"),
            ("runc", "runc"),
            ("unshare", "util-linux"),
        ],
    },
    Tools {
        owner: "the end-to-end tests'",
        purposes: &[Purpose::EndToEnd],
        programs: &[("debootstrap", "debootstrap")],
    },
    Tools {
        owner: "the manifests'",
        purposes: &[Purpose::Manifests],
        programs: &[("kubectl", "kubernetes-client"), ("python3", "python3"), ("pip3", "python3-pip")],
    },
];

/// A program from crates.io, built with cargo.
#[derive(Debug)]
pub(crate) struct CargoTool {
    pub(crate) program: &'static str,
    pub(crate) version: &'static str,
    /// Additional arguments of `cargo install`.
    pub(crate) arguments: &'static [&'static str],
    pub(crate) purposes: &'static [Purpose],
}

pub(crate) static CARGO_TOOLS: [CargoTool; 2] = [
    // Cargo subcommand that builds the Debian package.
    CargoTool {
        program: "cargo-deb",
        version: "3.8.0",
        arguments: &[],
        purposes: &[Purpose::Dist, Purpose::EndToEnd],
    },
    // Checks dependencies. A debug build takes half the time, and the program runs for seconds only.
    CargoTool {
        program: "cargo-deny",
        version: "0.20.2",
        arguments: &["--debug"],
        purposes: &[Purpose::Deny],
    },
];
