//! Addresses of the server for metrics and health.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, de};
use toml::Spanned;

use super::source::Diagnostics;

const DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9254);
/// Upper bound of the number of addresses.
const MAX_LISTENERS: usize = 8;
/// Longest path of a Unix socket in bytes (`sun_path` of unix(7), without the byte that ends it).
const MAX_PATH_LEN: usize = 107;

/// Address that the metrics server listens on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Listen {
    /// TCP socket address, with a port.
    Tcp(SocketAddr),
    /// Unix socket at an absolute path.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MetricsTable {
    listen: Spanned<ListenList>,
    pub(super) program_run_time: bool,
}

/// One address or a list of them. Serialized as a list.
#[derive(Serialize)]
#[serde(transparent)]
struct ListenList(Vec<Spanned<String>>);

impl<'de> Deserialize<'de> for ListenList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ListenList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<ListenList, E> {
                Ok(ListenList(vec![Spanned::new(0..0, text.to_owned())]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<ListenList, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(ListenList)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl Default for MetricsTable {
    fn default() -> Self {
        Self {
            listen: Spanned::new(0..0, ListenList(vec![Spanned::new(0..0, DEFAULT.to_string())])),
            program_run_time: false,
        }
    }
}

impl Listen {
    pub(super) fn parse(table: &MetricsTable, diagnostics: &mut Diagnostics<'_>) -> Vec<Self> {
        let mut addresses = Vec::new();
        let ListenList(texts) = table.listen.get_ref();
        // A single string has the location of its value.
        let span = |text: &Spanned<String>| {
            if text.span().is_empty() { table.listen.span() } else { text.span() }
        };
        for text in texts {
            let address = text.as_ref().parse().and_then(|address| {
                if addresses.contains(&address) {
                    Err(format!("{address} is listed twice"))
                } else {
                    Ok(address)
                }
            });
            let address = address.map_err(|message| format!("metrics.listen: {message}"));
            addresses.extend(diagnostics.ok(span(text), address));
        }
        if let Some(beyond) = texts.get(MAX_LISTENERS) {
            let message = format!("metrics.listen: at most {MAX_LISTENERS} addresses are supported");
            diagnostics.error(beyond.span(), message);
        }
        addresses
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            if text.len() > MAX_PATH_LEN {
                return Err(format!("the path of a Unix socket has more than {MAX_PATH_LEN} bytes"));
            }
            return Ok(Self::Unix(text.into()));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Self::Tcp(address)),
            Ok(_) => Err(format!("{text:?} has no port")),
            Err(_) => Err(format!(
                "{text:?} is neither an address with a port, like 127.0.0.1:9254 or [::1]:9254, nor an absolute path"
            )),
        }
    }
}
