//! Pods that the reference CNI plugins connect to the node.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    process::{Output, Stdio},
    sync::Arc,
};

use serde_json::{Value, json};

use crate::{Netns, Pod, TestEnv, netns::unique};

/// Debian's directory of the reference plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Newest version that Debian 12's plugins speak.
const VERSION: &str = "0.4.0";

/// A network of a container runtime: a chain of plugins that runs for each pod.
#[derive(Debug)]
pub struct CniNetwork<'w> {
    env: &'w TestEnv,
    name: String,
    plugins: Vec<Value>,
}

/// A network namespace that is connected to a [`CniNetwork`]. Dropping the pod disconnects it.
#[derive(Debug)]
pub struct CniPod<'n> {
    /// The pod's network namespace.
    pub netns: Arc<Netns>,
    /// IPv4 address that the plugins gave the pod.
    pub address: Ipv4Addr,
    /// Host-side veth, if the plugins made one.
    pub host_ifname: Option<String>,
    network: &'n CniNetwork<'n>,
    /// Last result of `ADD`, which `DEL` receives.
    result: Value,
}

/// Path of a reference plugin.
#[must_use]
pub fn plugin(name: &str) -> String {
    format!("{PLUGINS}/{name}")
}

impl TestEnv {
    /// Configures a network of these plugins. The first one connects pods; IP addresses come from `addresses`, options
    /// of the IPAM plugin `host-local`.
    #[must_use]
    pub fn cni_network(&self, addresses: &Value, plugins: &[Value]) -> CniNetwork<'_> {
        let (name, mut plugins) = (unique("cni-"), plugins.to_vec());
        let mut ipam = addresses.clone();
        ipam["type"] = "host-local".into();
        ipam["routes"] = json!([{ "dst": "0.0.0.0/0" }]);
        ipam["dataDir"] = self.scratch_dir().join(&name).to_str().expect("a UTF-8 path").into();
        plugins[0]["ipam"] = ipam;
        for plugin in &mut plugins {
            plugin["cniVersion"] = VERSION.into();
            plugin["name"] = name.as_str().into();
        }
        CniNetwork { env: self, name, plugins }
    }
}

impl CniNetwork<'_> {
    /// Connects a new pod, which must succeed.
    #[must_use]
    #[track_caller]
    pub fn add_pod(&self) -> CniPod<'_> {
        self.connect(Arc::new(Netns::new("cni"))).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Connects a pod in this network namespace. Returns the message of the plugin that fails.
    pub fn connect(&self, netns: Arc<Netns>) -> Result<CniPod<'_>, String> {
        netns.ip("link set lo up");
        let mut result = Value::Null;
        for plugin in &self.plugins {
            let output = self.call("ADD", plugin, &netns, &result)?;
            result = serde_json::from_slice(&output.stdout)
                .map_err(|error| format!("{}: {error}", plugin["type"]))?;
        }
        let address = result["ips"][0]["address"].as_str().and_then(|address| address.split('/').next());
        let address = address.and_then(|address| address.parse().ok());
        let address = address.ok_or_else(|| format!("no IPv4 address: {result}"))?;
        let interfaces = result["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
        let host_ifname = interfaces
            .iter()
            .filter(|interface| interface["sandbox"].as_str().is_none_or(str::is_empty))
            .filter_map(|interface| interface["name"].as_str())
            .find(|name| name.starts_with("veth"))
            .map(str::to_owned);
        Ok(CniPod { netns, address, host_ifname, network: self, result })
    }

    /// Calls one plugin in the node's network namespace.
    fn call(&self, verb: &str, plugin: &Value, netns: &Netns, previous: &Value) -> Result<Output, String> {
        let mut configuration = plugin.clone();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
        }
        let kind = plugin["type"].as_str().expect("the type of a plugin");
        let file = self.env.scratch_dir().join(unique(&format!("{}-", self.name)));
        fs::write(&file, configuration.to_string()).expect("write a CNI configuration");
        let mut command = self.env.node.command(Path::new(PLUGINS).join(kind));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", netns.name());
        command.env("CNI_NETNS", netns.path()).env("CNI_IFNAME", Pod::IFNAME).env("CNI_PATH", PLUGINS);
        command.stdin(fs::File::open(&file).expect("open a CNI configuration")).stderr(Stdio::inherit());
        let output = command.output().map_err(|error| format!("{kind}: {error}"))?;
        if output.status.success() {
            Ok(output)
        } else {
            // Plugins write their errors as JSON to standard output.
            Err(format!("{kind} {verb}: {}", String::from_utf8_lossy(&output.stdout)))
        }
    }
}

impl CniPod<'_> {
    /// Returns the name of the host-side veth, which the network's plugins must have created.
    #[must_use]
    #[track_caller]
    pub fn veth(&self) -> &str {
        self.host_ifname.as_deref().expect("a host-side veth")
    }

    /// Disconnects the pod, which must succeed.
    #[track_caller]
    pub fn delete(mut self) {
        let result = self.disconnect();
        assert_eq!(result, Ok(()));
    }

    /// Calls `DEL` of each plugin, the last one first. Later calls do nothing.
    fn disconnect(&mut self) -> Result<(), String> {
        let result = self.result.take();
        if result.is_null() {
            return Ok(());
        }
        let mut plugins = self.network.plugins.iter().rev();
        plugins.try_for_each(|plugin| self.network.call("DEL", plugin, &self.netns, &result).map(drop))
    }
}

impl Drop for CniPod<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.disconnect() {
            eprintln!("{error}");
        }
    }
}
