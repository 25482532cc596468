#!/bin/sh
# Installs imds-agent on a machine: downloads the package that fits, verifies signature and checksum, and starts the service.
# `install.sh --help` lists the options.
set -eu

# The publisher of a release sets these. {version} in the URL stands for the version; the key is the last line of minisign.pub.
VERSION=0.1.0
BASE_URL=
PUBLIC_KEY=

usage() {
    cat <<'END'
Usage: install.sh [OPTION]...

  --version VERSION   version to install
  --base-url URL      directory of the release; {version} stands for the version
  --public-key KEY    minisign key of the publisher
  --from DIR          take the files of the release from DIR, without network
  --format FORMAT     deb, rpm or tar; default: the format of the machine's package manager, else tar
  --root DIR          install the tarball below DIR, such as a mounted machine image
  --no-start          enable the service, but do not start it now
  --no-signature      do not verify the signature, only the checksum
  --dry-run           download and verify, but change nothing
END
}

die() {
    echo "install.sh: $*" >&2
    exit 1
}

say() {
    echo "install.sh: $*"
}

warn() {
    say "WARNING: $*" >&2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# Runs a command that changes the machine.
change() {
    if [ -n "$dry_run" ]; then
        say "would run: $*"
    else
        "$@"
    fi
}

# Gets a file of the release into the current directory. curl gives up after a minute without data; not every wget has such an option.
fetch() {
    if [ -n "$from" ]; then
        [ -f "$from/$1" ] || die "$from/$1 does not exist"
        cp "$from/$1" "$1"
    elif has curl; then
        curl --fail --silent --show-error --location --connect-timeout 60 --speed-limit 1 --speed-time 60 --output "$1" "$base_url/$1" ||
            die "failed to download $base_url/$1"
    elif has wget; then
        wget --quiet --output-document "$1" "$base_url/$1" || die "failed to download $base_url/$1"
    else
        die "failed to download: install curl or wget, or use --from"
    fi
}

# Prints COUNT bytes of FILE from OFFSET on.
bytes() {
    dd if="$1" bs=1 skip="$2" count="$3" 2>/dev/null
}

# Verifies the signature of SHA256SUMS with openssl: Ed25519 over the file, or over its BLAKE2b hash. Key and signature start
# with 2 bytes for the algorithm and 8 for the id of the key.
verify_with_openssl() {
    printf '%s\n' "$public_key" | openssl base64 -d -A >key || die "the public key is not base64"
    sed -n 2p SHA256SUMS.minisig | openssl base64 -d -A >signature || die "the signature is not base64"
    if [ "$(wc -c <key)" -ne 42 ] || [ "$(bytes key 0 2)" != Ed ]; then
        die "the public key is not one of minisign"
    fi
    [ "$(wc -c <signature)" -eq 74 ] || die "the signature is not one of minisign"
    case $(bytes signature 0 2) in
    Ed) cp SHA256SUMS message ;;
    ED) openssl dgst -blake2b512 -binary SHA256SUMS >message ;;
    *) die "the signature has an unknown algorithm" ;;
    esac
    # Header of an Ed25519 key in DER (RFC 8410).
    printf '\060\052\060\005\006\003\053\145\160\003\041\000' >key.der
    bytes key 10 32 >>key.der
    bytes signature 10 64 >signature.raw
    openssl pkeyutl -verify -pubin -keyform DER -inkey key.der -rawin -in message -sigfile signature.raw >/dev/null 2>&1
}

verify_signature() {
    if [ -n "$no_signature" ]; then
        warn "the signature is not verified"
        return
    fi
    [ -n "$public_key" ] || die "no public key is set: use --public-key, or --no-signature to install without verification"
    fetch SHA256SUMS.minisig
    if has minisign; then
        minisign -V -q -P "$public_key" -m SHA256SUMS || die "the signature of SHA256SUMS is wrong: nothing was installed"
    elif has openssl && openssl pkeyutl -help 2>&1 | grep -q -e -rawin; then
        verify_with_openssl || die "the signature of SHA256SUMS is wrong: nothing was installed"
    else
        die "the signature cannot be verified: install minisign or OpenSSL 3, or use --no-signature"
    fi
}

verify_checksum() {
    expected=$(awk -v name="$1" '$2 == name { print $1 }' SHA256SUMS)
    [ -n "$expected" ] || die "SHA256SUMS does not list $1"
    if has sha256sum; then
        actual=$(sha256sum "$1")
    elif has openssl; then
        actual=$(openssl dgst -sha256 -r "$1")
    else
        die "the checksum cannot be verified: install sha256sum or openssl"
    fi
    [ "${actual%% *}" = "$expected" ] || die "the checksum of $1 is wrong: nothing was installed"
}

# Prints the format of the package for this machine. The package manager must own the system: distributions also offer the
# others as tools.
machine_format() {
    if [ -n "$root" ]; then
        echo tar
    elif has apt-get && dpkg --status dpkg >/dev/null 2>&1; then
        echo deb
    elif rpm --query --whatprovides /bin/sh >/dev/null 2>&1; then
        echo rpm
    else
        echo tar
    fi
}

# Fails if a symlink leads from the directory of a file out of the root: an absolute one of an image points into this machine.
check_directory() {
    dir=$root/${1%/*}
    while [ ! -d "$dir" ]; do
        [ ! -L "$dir" ] || die "the symlink $dir has no directory below $root: nothing was installed"
        dir=${dir%/*}
    done
    inside=$(cd "$root" && pwd -P)
    case $(cd "$dir" && pwd -P)/ in
    "${inside%/}"/*) ;;
    *) die "$dir is not below $root, because of a symlink: nothing was installed" ;;
    esac
}

# Installs one file of the tarball. Keeps a configuration that exists, and replaces a running program atomically.
install_file() {
    target=$root/$1
    case $1 in
    etc/*)
        # The target of a symlink may be mounted later, or lie in the image.
        if [ -e "$target" ] || [ -L "$target" ]; then
            if cmp -s "$1" "$target"; then
                return
            fi
            say "keeping $target; the new default is $target.new"
            target=$target.new
        fi
        ;;
    esac
    mkdir -p "${target%/*}"
    partial=$target.tmp
    # cp would write through a symlink.
    rm -f "$partial"
    cp -p "$1" "$partial"
    mv -f "$partial" "$target"
    partial=''
    # A new file has the SELinux type of its directory. Without SELinux, the program does nothing.
    if [ -z "$root" ] && has restorecon; then
        restorecon "$target" || warn "failed to set the SELinux type of $target"
    fi
}

install_tarball() {
    # Directories that the installation creates are readable by all.
    umask 022
    tar -xpozf "$1"
    cd "${1%.tar.gz}"
    find . -type f >../found || die "failed to list the files of $1: nothing was installed"
    sed 's,^\./,,' ../found | sort >../files
    [ -s ../files ] || die "$1 has no files: nothing was installed"
    if [ -n "$root" ]; then
        while IFS= read -r file; do
            check_directory "$file"
        done <../files
        check_directory etc/systemd/system/multi-user.target.wants/imds-agent.service
    fi
    if [ -n "$dry_run" ]; then
        sed "s,^,install.sh: would install $root/," ../files
    else
        changing=1
        while IFS= read -r file; do
            install_file "$file"
        done <../files
    fi
    cd ..
    has systemctl || return 0
    # The removal of the .deb masks the service until the package is purged. This keeps the mask of an administrator.
    if [ -z "$root" ] && has deb-systemd-helper; then
        change env DPKG_MAINTSCRIPT_PACKAGE=imds-agent deb-systemd-helper unmask imds-agent.service || :
    fi
    change systemctl ${root:+"--root=$root"} enable imds-agent.service
    if [ -z "$root" ] && [ -d /run/systemd/system ]; then
        change systemctl daemon-reload
        # The caller reports a service that does not run.
        [ -n "$no_start" ] || change systemctl restart imds-agent.service || :
    fi
}

# Runs a package manager. systemctl in its scripts does not start the service if SYSTEMD_OFFLINE is set.
install_package() {
    changing=1
    if [ -n "$no_start" ]; then
        change env SYSTEMD_OFFLINE=1 "$@"
    else
        change "$@"
    fi
}

# Reports what keeps the service from running.
check_service() {
    if ! has systemctl; then
        if [ -n "$root" ]; then
            warn "the service is not enabled: run systemctl enable imds-agent in the image"
        else
            warn "nothing starts the agent on a machine without systemd"
        fi
    elif [ -z "$root$no_start" ] && [ -d /run/systemd/system ]; then
        if ! systemctl --quiet is-enabled imds-agent.service; then
            warn "the service is disabled"
        elif ! systemctl --quiet is-active imds-agent.service; then
            die "imds-agent $version is installed, but does not run: see systemctl status imds-agent"
        fi
    fi
}

# Removes the files of this run, and reports an installation that stopped in between.
finish() {
    status=$?
    rm -rf "$work"
    if [ "$status" -ne 0 ] && [ -n "$changing" ] && [ -z "$dry_run" ]; then
        [ -z "$partial" ] || rm -f "$partial"
        echo "install.sh: the installation is incomplete: run the script again" >&2
    fi
}

main() {
    # `cd` prints directories that it finds in CDPATH. The others change which files tar unpacks.
    unset CDPATH TAR_OPTIONS GZIP
    version=$VERSION base_url=$BASE_URL public_key=$PUBLIC_KEY
    from='' format='' root='' no_start='' no_signature='' dry_run='' changing='' partial=''
    while [ $# -gt 0 ]; do
        case $1 in
        --version | --base-url | --public-key | --from | --format | --root)
            [ $# -gt 1 ] || die "$1 needs a value"
            case $1 in
            --version) version=$2 ;;
            --base-url) base_url=$2 ;;
            --public-key) public_key=$2 ;;
            --from) from=$2 ;;
            --format) format=$2 ;;
            --root)
                # An unset variable must not select the running machine.
                [ -n "$2" ] || die "--root needs a directory"
                root=$2
                ;;
            esac
            shift
            ;;
        --no-start) no_start=1 ;;
        --no-signature) no_signature=1 ;;
        --dry-run) dry_run=1 ;;
        --help)
            usage
            exit 0
            ;;
        *) die "unknown option $1: see --help" ;;
        esac
        shift
    done

    [ "$(uname -s)" = Linux ] || die "imds-agent needs Linux"
    case $(uname -m) in
    x86_64 | amd64) arch=amd64 machine=x86_64 ;;
    aarch64 | arm64) arch=arm64 machine=aarch64 ;;
    *) die "there is no release for the architecture $(uname -m)" ;;
    esac
    case $version in
    '' | *[!0-9A-Za-z.+~-]*) die "wrong version $version" ;;
    esac
    [ -n "$format" ] || format=$(machine_format)
    case $format in
    deb) name=imds-agent_$version-1_$arch.deb ;;
    rpm) name=imds-agent-$version-1.$machine.rpm ;;
    tar) name=imds-agent-$version-linux-$arch.tar.gz ;;
    *) die "unknown format $format: the formats are deb, rpm and tar" ;;
    esac
    [ -z "$root" ] || [ "$format" = tar ] || die "--root needs the format tar"
    [ -n "$root$dry_run" ] || [ "$(id -u)" -eq 0 ] || die "run as root, or with --dry-run"
    [ -n "$from$base_url" ] || die "no source is set: use --base-url or --from"
    base_url=$(printf '%s\n' "$base_url" | sed "s,{version},$version,g; s,/*\$,,")
    [ -z "$from" ] || from=$(cd "$from" && pwd) || die "failed to open the directory of --from"
    if [ -n "$root" ]; then
        root=$(cd "$root" && pwd) || die "failed to open the directory of --root"
    fi

    work=$(mktemp -d)
    # TMPDIR may be relative.
    work=$(cd "$work" && pwd)
    trap finish EXIT
    trap 'exit 1' HUP INT TERM
    cd "$work"
    fetch SHA256SUMS
    verify_signature
    fetch "$name"
    verify_checksum "$name"
    case $format in
    # Unlike apt-get and dnf, these need no package lists. They install older versions, too, and keep the configuration.
    deb) install_package dpkg --force-confold --install "$name" ;;
    rpm) install_package rpm --upgrade --oldpackage --replacepkgs "$name" ;;
    tar) install_tarball "$name" ;;
    esac
    changing=''
    if [ -z "$dry_run" ]; then
        check_service
        say "installed imds-agent $version from $name"
    fi
}

main "$@"
