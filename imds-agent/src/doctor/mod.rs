//! What works here and what does not, and what to do: asked of the kernel by trying, and nothing is attached.

mod cgroups;
mod devices;
mod firewall;
mod kernel;
mod mark_rules;
mod marks;
mod place;
mod programs;
mod report;
mod rulesets;

pub use self::report::{Check, MarkWriter, Program, Report, Rule, State};
use self::{marks::MarkUse, rulesets::Rulesets};
use crate::{
    datapath::{DatapathError, pins::PinDir},
    node::netlink::Netlink,
    version::VERSION,
};

/// Version of the JSON form: within one, fields are only added.
const SCHEMA: u32 = 1;

/// Looks at everything.
pub async fn examine(pins: &PinDir, netlink: &Netlink) -> Result<Report, DatapathError> {
    let mut checks = vec![
        kernel::release(),
        kernel::btf(),
        place::bpffs(pins),
        place::cgroup2(),
        place::capabilities(),
        place::locked_memory(),
        kernel::jit(),
        kernel::attaching(),
        kernel::netns_cookie(),
        kernel::netns_cookie_tc(),
        kernel::netns_cookie_cgroup_skb(),
        kernel::ring_buffer(),
        kernel::ipv6(),
        place::pods(pins),
        place::agent(pins),
    ];
    let devices = devices::list(netlink).await?;
    checks.extend(programs::of_interfaces(pins, netlink, &devices).await?);
    checks.extend(cgroups::programs(pins)?);
    let rulesets = Rulesets::list();
    checks.extend(firewall::rules(&rulesets, pins));
    let mark = MarkUse::read(pins, &devices);
    checks.extend(marks::rules(&rulesets, &mark));
    checks.extend(marks::tunnels(&devices, &mark));
    Ok(Report {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        ready: checks.iter().all(|check| check.state != State::Missing),
        checks,
    })
}
