//! Kernel modules in load order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Modules that the tests may need. A kernel has no file for a module that is built in or missing.
const MODULES: [&str; 56] = [
    "act_gact",
    "act_mirred",
    "act_police",
    "act_skbedit",
    "bonding",
    "bridge",
    "cls_bpf",
    "cls_flower",
    "cls_matchall",
    "cls_u32",
    // `libcrc32c` needs it, without a dependency that modinfo shows.
    "crc32c_generic",
    "dummy",
    "geneve",
    "ifb",
    "ip_gre",
    "ip_tables",
    "ipip",
    "iptable_filter",
    "iptable_mangle",
    "iptable_nat",
    "ipvlan",
    "8021q",
    "macvlan",
    "netkit",
    "nf_tables",
    "nft_chain_nat",
    "nft_compat",
    "nft_counter",
    "nft_ct",
    "nft_fib_inet",
    "nft_limit",
    "nft_log",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
    "sch_fq",
    "sch_htb",
    "sch_ingress",
    "sch_prio",
    "sch_tbf",
    "sit",
    "team",
    "team_mode_activebackup",
    "team_mode_roundrobin",
    "tun",
    "veth",
    "vrf",
    "vxlan",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_nat",
    "xt_tcpudp",
];

/// A module that guest.sh loads with insmod.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// Returns the needed modules below `dir`, each after its dependencies.
pub(super) fn load_order(dir: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    collect(dir, &mut files).with_context(|| format!("failed to list {}", dir.display()))?;
    let mut order = Order { files, seen: BTreeSet::new(), modules: Vec::new() };
    for name in MODULES {
        order.add(name)?;
    }
    Ok(order.modules)
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn add(&mut self, name: &str) -> Result<()> {
        let Some(path) = self.files.get(name).cloned() else { return Ok(()) };
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let content = read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        for needed in needs(&content) {
            self.add(&needed)?;
        }
        self.modules.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(canonical(name), path);
        }
    }
    Ok(())
}

/// Returns the kernel's name of a module. File names may contain hyphens instead of underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// Returns the dependencies of a module: `depends=a,b` in its section `.modinfo`.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[start + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_follow_their_dependencies() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("kernel/net");
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, needs: &str| {
            fs::write(dir.join(name), format!("ELF\0depends={needs}\0name=x\0")).unwrap();
        };
        write("bridge.ko", "stp,llc");
        write("stp.ko", "llc");
        write("llc.ko", "");
        write("ipvlan.ko", "l3-mdev");
        write("l3_mdev.ko", "");
        write("unwanted.ko", "");
        let modules = load_order(root.path()).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["llc", "stp", "bridge", "l3_mdev", "ipvlan"]);
    }
}
