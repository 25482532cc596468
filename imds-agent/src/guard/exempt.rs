//! Who is exempt, as pods come and go.

use std::time::Duration;

use imds_ebpf_common::Role;
use tokio::time::sleep;

use super::Guard;
use crate::{config::Exempt, datapath::DatapathError, exempt::Grants, node::links::Link};

/// How often it is asked for what the kernel sends no news of: names of network namespaces, and processes in cgroups.
const PERIOD: Duration = Duration::from_millis(250);

impl Guard {
    /// Waits until the rules may find others than they did.
    pub async fn exemptions_changed(&self) {
        if !self.rules.are_to_be_asked() {
            return std::future::pending().await;
        }
        loop {
            sleep(PERIOD).await;
            if self.rules.may_have_changed() {
                return;
            }
        }
    }

    /// Grants what the rules say of the pods that are there, and takes the rest away.
    pub async fn restore_exemptions(&mut self) -> Result<(), DatapathError> {
        let wanted = self.find_exempt().await;
        let writes = self.datapath.grant(&wanted)?;
        if writes > 0 {
            log::info!("{} exemptions are in force", wanted.len());
        }
        Ok(())
    }

    /// Puts other rules in force, but takes nothing away before [`Guard::restore_exemptions`] does: what is granted by
    /// both is so at every moment between.
    pub(super) async fn change_rules(&mut self, rules: Vec<Exempt>) -> Result<(), DatapathError> {
        self.rules.set(rules);
        let mut either = self.datapath.granted()?;
        either.extend(self.find_exempt().await);
        self.datapath.grant(&either).map(drop)
    }

    async fn find_exempt(&mut self) -> Grants {
        let pods: Vec<&Link> = self.links.values().filter(|link| self.role(link) == Role::Pod).collect();
        self.rules.find(&self.netlink, &self.links, &pods).await
    }
}
