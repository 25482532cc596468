//! Attaches and detaches `local_service` when a route to a protected address becomes local or stops being so.

use super::Reconciler;
use crate::datapath::DatapathError;

impl Reconciler {
    /// Attaches the `local_service` hook while a protected address is local to the node, and detaches it otherwise.
    pub(super) async fn reconcile_local_service(&mut self) -> Result<(), DatapathError> {
        let is_local = self.netlink.has_local_endpoint().await?;
        let changes = self.datapath.restore_local_service(is_local)?;
        self.report_cgroups(changes);
        Ok(())
    }
}
