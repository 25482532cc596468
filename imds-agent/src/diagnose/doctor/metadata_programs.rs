//! Other programs that restrict or proxy requests to a metadata service: systemd-imdsd and Azure's Guest Proxy Agent.

use std::{fs, path::Path};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    rule::{RuleAttribute, RuleMessage},
};

use super::doctor_report::{DoctorCheck, or_ok};
use crate::node::netlink::{Netlink, NetlinkError};

const NAME: &str = "metadata_programs";
/// Socket of systemd-imdsd (systemd-imdsd.socket of systemd 261).
const IMDSD_SOCKET: &str = "/run/systemd/io.systemd.InstanceMetadata";
/// Packet mark of systemd-imdsd. A routing rule lets packets with it bypass the prohibit route (85-imds-early.network of
/// systemd 261).
const IMDSD_MARK: u32 = 0x7fff_0815;
/// Name of Azure's Guest Proxy Agent in /proc/PID/comm, which has room for 15 bytes of `azure-proxy-agent`.
const GPA_COMM: &str = "azure-proxy-age";

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Observed {
    has_imdsd_socket: bool,
    has_imdsd_rule: bool,
    gpa: Option<u32>,
}

/// Lists the programs that run here, with the requests that each covers.
pub(crate) async fn checks(netlink: &Netlink) -> Result<Vec<DoctorCheck>, NetlinkError> {
    let observed = Observed {
        has_imdsd_socket: has_imdsd_socket(&fs::read("/proc/net/unix").unwrap_or_default()),
        has_imdsd_rule: has_imdsd_rule(netlink).await?,
        gpa: process(Path::new("/proc"), GPA_COMM),
    };
    Ok(observed.checks())
}

/// Reports whether the list of sockets has that of systemd-imdsd. Names of other sockets need not be UTF-8.
fn has_imdsd_socket(sockets: &[u8]) -> bool {
    let name = format!(" {IMDSD_SOCKET}");
    sockets.split(|&byte| byte == b'\n').any(|line| line.ends_with(name.as_bytes()))
}

async fn has_imdsd_rule(netlink: &Netlink) -> Result<bool, NetlinkError> {
    let mut request = RuleMessage::default();
    request.header.family = AddressFamily::Inet;
    let rules = netlink.dump("failed to list routing rules", RouteNetlinkMessage::GetRule(request)).await?;
    let is_of_imdsd = |message: &RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewRule(rule) => rule.attributes.contains(&RuleAttribute::FwMark(IMDSD_MARK)),
        _ => false,
    };
    Ok(rules.iter().any(is_of_imdsd))
}

fn process(proc: &Path, name: &str) -> Option<u32> {
    let processes = fs::read_dir(proc).ok()?.flatten();
    let mut ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // The name of a process need not be UTF-8.
    ids.find(|id| {
        fs::read(proc.join(id.to_string()).join("comm"))
            .is_ok_and(|comm| comm.trim_ascii() == name.as_bytes())
    })
}

impl Observed {
    fn checks(self) -> Vec<DoctorCheck> {
        let imdsd = (self.has_imdsd_socket || self.has_imdsd_rule).then(|| self.imdsd());
        let checks = imdsd.into_iter().chain(self.gpa.map(gpa));
        or_ok(checks, NAME, "neither systemd-imdsd nor Azure's Guest Proxy Agent")
    }

    fn imdsd(self) -> DoctorCheck {
        let socket = if self.has_imdsd_socket {
            format!("systemd-imdsd.socket serves metadata to every process that can open {IMDSD_SOCKET}")
        } else {
            "systemd-imdsd.socket is not active".to_owned()
        };
        let network = if self.has_imdsd_rule {
            "network locked: a prohibit route stops IPv4 packets to the metadata service without the mark 0x7fff0815"
        } else {
            "network unlocked: no routing rule for the mark 0x7fff0815, direct requests are not restricted"
        };
        let mut remedy = "imds-agent does not see requests through the socket, because systemd-imdsd sends them as the node: do not \
                          mount the node's /run into pods"
            .to_owned();
        if self.has_imdsd_rule {
            remedy.push_str(
                "; the route stops exempt pods too, and processes of the node that do not set the mark; it covers neither other \
                 protected addresses nor frames that a pod sends past the node's routes, so keep imds-agent; to let exempt pods \
                 pass, boot with systemd.imds.network=unlocked",
            );
        }
        DoctorCheck::degraded(NAME, format!("systemd-imdsd: {socket}; {network}"), remedy)
    }
}

fn gpa(pid: u32) -> DoctorCheck {
    let observed = format!(
        "Azure's Guest Proxy Agent (azure-proxy-agent.service, pid {pid}): a connect4 program redirects TCP connections to \
         169.254.169.254:80, 168.63.129.16:80 and 168.63.129.16:32526 to a proxy at 127.0.0.1, which authorizes processes of \
         the node"
    );
    let remedy = "the proxy covers neither UDP, IPv6, other ports nor crafted packets, so keep imds-agent; in a pod the redirection \
                  leads to the pod's own loopback, so that exempt pods cannot connect either, and imds-agent neither denies nor \
                  counts such a call";
    DoctorCheck::degraded(NAME, observed, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::doctor::doctor_report::State;

    #[test]
    fn each_program_is_named_with_its_coverage() {
        let none = Observed::default().checks();
        assert!(none.len() == 1 && none.iter().all(|check| check.state == State::Ok), "{none:?}");
        let both = Observed { has_imdsd_socket: true, has_imdsd_rule: true, gpa: Some(7) }.checks();
        let [imdsd, gpa] = &both[..] else { panic!("{both:?}") };
        assert!(
            imdsd.observed.contains(IMDSD_SOCKET) && imdsd.observed.contains("network locked"),
            "{imdsd:?}"
        );
        assert!(imdsd.remedy.as_ref().unwrap().contains("stops exempt pods too"), "{imdsd:?}");
        assert!(gpa.observed.contains("pid 7") && gpa.observed.contains("168.63.129.16:32526"), "{gpa:?}");
        let unlocked = Observed { has_imdsd_socket: true, ..Observed::default() }.checks();
        assert!(unlocked[0].observed.contains("network unlocked"), "{unlocked:?}");
    }

    #[test]
    fn socket_is_found_beside_names_with_any_bytes() {
        let sockets = |name: &str| {
            [b"0: 2 0 0 1 1 7 /run/\xff\n".to_vec(), format!("0: 2 0 0 1 1 8 {name}\n").into()].concat()
        };
        assert!(has_imdsd_socket(&sockets(IMDSD_SOCKET)));
        assert!(!has_imdsd_socket(&sockets("/run/other")) && !has_imdsd_socket(b""));
    }

    #[test]
    fn process_is_found_by_name() {
        let name = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(process(Path::new("/proc"), name.trim()).is_some());
        assert_eq!(process(Path::new("/proc"), "no process has"), None);
        assert_eq!(process(Path::new("/nonexistent"), GPA_COMM), None);
    }
}
