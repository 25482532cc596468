//! `[kubernetes]`: settings of the pod watch.

use std::{
    env,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize};
use toml::Spanned;

use super::{names, source::Diagnostics, switch::Switch};

/// File that Kubernetes mounts into a pod for access to the API server.
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Settings of the pod watch. The default is to watch the pods of the cluster in which the agent runs, if it does.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Kubernetes {
    /// Condition under which the pod watch runs.
    pub enabled: Enabled,
    /// Absolute path of a kubeconfig file for access to the API server.
    pub kubeconfig: Option<PathBuf>,
    /// Name of this node in the cluster, if it is neither `NODE_NAME` nor the host name.
    pub node_name: Option<String>,
    /// True if the agent writes Events about denied pods and about the node.
    pub events: bool,
    /// True if the agent sets the condition `MetadataProtected` of the node.
    pub node_condition: bool,
}

/// Setting of the pod watch: `"auto"`, `"yes"` or true, `"no"` or false in the configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Enabled {
    /// Watch pods if the agent runs in a pod or a kubeconfig is set.
    #[default]
    Auto,
    /// Watch pods in any case.
    Yes,
    /// Do not watch pods, even in a cluster.
    No,
}

impl<'de> Deserialize<'de> for Enabled {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = &[("auto", Self::Auto), ("yes", Self::Yes), ("no", Self::No)];
        let expected = "\"auto\", \"yes\", \"no\", true or false";
        deserializer.deserialize_any(Switch { off: Self::No, on: Self::Yes, words, expected })
    }
}

/// Source of address and credentials of the API server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Access {
    /// Service account of the pod in which the agent runs.
    InCluster,
    /// Kubeconfig file at this path.
    Kubeconfig(PathBuf),
}

/// Environment of the process, as far as the pod watch depends on it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Environment {
    /// True if the agent runs in a pod.
    pub in_pod: bool,
    /// Value of the environment variable `NODE_NAME`.
    pub node_name: Option<String>,
    /// Host name as returned by gethostname(2).
    pub hostname: String,
}

impl Environment {
    /// Reads the environment of this process.
    pub fn read() -> Self {
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        Self {
            in_pod: env::var_os("KUBERNETES_SERVICE_HOST").is_some()
                || Path::new(SERVICE_ACCOUNT_TOKEN).exists(),
            node_name: env::var("NODE_NAME").ok().filter(|name| !name.is_empty()),
            hostname: hostname.to_string_lossy().into_owned(),
        }
    }
}

impl Kubernetes {
    /// Returns how to access the API server, or `None` if pods are not watched.
    pub fn access(&self, environment: &Environment) -> Option<Access> {
        let is_enabled = match self.enabled {
            Enabled::Auto => environment.in_pod || self.kubeconfig.is_some(),
            Enabled::Yes => true,
            Enabled::No => false,
        };
        is_enabled.then(|| self.kubeconfig.clone().map_or(Access::InCluster, Access::Kubeconfig))
    }

    /// Returns the name of this node in the cluster.
    pub fn node_name(&self, environment: &Environment) -> String {
        let configured = self.node_name.as_ref().or(environment.node_name.as_ref());
        // Like the kubelet, which registers the host name in lower case.
        configured.cloned().unwrap_or_else(|| environment.hostname.to_lowercase())
    }

    pub(super) fn parse(table: &KubernetesTable, diagnostics: &mut Diagnostics<'_>) -> Self {
        let unless_empty = |text: &'_ Spanned<String>| (!text.get_ref().is_empty()).then(|| text.clone());
        let (kubeconfig, node_name) = (unless_empty(&table.kubeconfig), unless_empty(&table.node_name));
        if let Some(path) = &kubeconfig
            && !Path::new(path.get_ref()).is_absolute()
        {
            let message = format!("kubernetes.kubeconfig: {:?} is not an absolute path", path.get_ref());
            diagnostics.error(path.span(), message);
        }
        if let Some(name) = &node_name
            && !names::is_dns_subdomain(name.get_ref())
        {
            let message = format!("kubernetes.node_name: {:?} is not a valid node name", name.get_ref());
            diagnostics.error(name.span(), message);
        }
        for (key, value) in [("events", &table.events), ("node_condition", &table.node_condition)] {
            if *value.get_ref() && table.enabled == Enabled::No {
                let message =
                    format!("kubernetes.{key}: needs the API server, but kubernetes.enabled = \"no\"");
                diagnostics.error(value.span(), message);
            }
        }
        Self {
            enabled: table.enabled,
            kubeconfig: kubeconfig.map(|path| path.into_inner().into()),
            node_name: node_name.map(Spanned::into_inner),
            events: *table.events.get_ref(),
            node_condition: *table.node_condition.get_ref(),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct KubernetesTable {
    enabled: Enabled,
    kubeconfig: Spanned<String>,
    node_name: Spanned<String>,
    events: Spanned<bool>,
    node_condition: Spanned<bool>,
}

impl Default for KubernetesTable {
    fn default() -> Self {
        let empty = || Spanned::new(0..0, String::new());
        Self {
            enabled: Enabled::default(),
            kubeconfig: empty(),
            node_name: empty(),
            events: Spanned::new(0..0, false),
            node_condition: Spanned::new(0..0, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(text: &str) -> Result<Kubernetes, String> {
        let config = Config::parse(text, Path::new("imds.toml"));
        config.map(|config| config.kubernetes).map_err(|error| error.to_string())
    }

    #[test]
    fn pod_watch_settings() {
        let outside = Environment::default();
        let inside = Environment { in_pod: true, ..Environment::default() };
        let file = Some(Access::Kubeconfig("/etc/k.yaml".into()));
        for (text, alone, in_pod) in [
            ("", None, Some(Access::InCluster)),
            ("[kubernetes]\nenabled = 'no'", None, None),
            ("[kubernetes]\nenabled = 'no'\nkubeconfig = '/etc/k.yaml'", None, None),
            ("[kubernetes]\nenabled = 'yes'", Some(Access::InCluster), Some(Access::InCluster)),
            ("[kubernetes]\nenabled = true", Some(Access::InCluster), Some(Access::InCluster)),
            ("[kubernetes]\nenabled = false", None, None),
            ("[kubernetes]\nkubeconfig = '/etc/k.yaml'", file.clone(), file),
        ] {
            let kubernetes = parse(text).unwrap();
            assert_eq!((kubernetes.access(&outside), kubernetes.access(&inside)), (alone, in_pod), "{text}");
        }
    }

    #[test]
    fn node_name_sources() {
        let host = Environment { hostname: "Node-7.Example".to_owned(), ..Environment::default() };
        let with_node_name = Environment { node_name: Some("node-8".to_owned()), ..host.clone() };
        let named = parse("[kubernetes]\nnode_name = 'node-9'").unwrap();
        assert_eq!(Kubernetes::default().node_name(&host), "node-7.example");
        assert_eq!(Kubernetes::default().node_name(&with_node_name), "node-8");
        assert_eq!(named.node_name(&with_node_name), "node-9");
    }

    #[test]
    fn errors_name_the_key() {
        for (line, position, part) in [
            ("enabled = 1", "2:11", "true or false"),
            ("enabled = 'maybe'", "2:11", "maybe"),
            ("kubeconfig = 'k.yaml'", "2:14", "absolute"),
            ("node_name = 'Node 7'", "2:13", "node_name"),
            ("enabled = 'no'\nevents = true", "3:10", "kubernetes.events: needs the API server"),
            ("kube_config = '/k'", "2:1", "kube_config"),
        ] {
            let error = parse(&format!("[kubernetes]\n{line}")).unwrap_err();
            assert!(error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part), "{error}");
        }
    }
}
