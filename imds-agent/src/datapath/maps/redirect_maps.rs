//! Listeners of scoped exemptions, to which the socket hook redirects connections.

use std::{collections::BTreeMap, net::IpAddr};

use aya::maps::MapError;
use imds_ebpf_common::{
    ExemptionKey, ListenerKey, RedirectRecord, Subject, SubjectKind,
    names::{MAP_LISTENERS, MAP_REDIRECT},
};

use crate::{
    datapath::{
        Datapath, DatapathError, map_error,
        object::{self, Maps},
    },
    encode::address_key,
};

/// Network namespace, by its cookie, and endpoint whose connections are redirected.
pub type RedirectKey = (u64, IpAddr);

/// Reads the listeners to which the programs redirect.
pub fn read(maps: &Maps) -> Result<BTreeMap<ExemptionKey, RedirectRecord>, MapError> {
    object::present(maps.redirects.iter()).collect()
}

impl Datapath {
    /// Redirects connections to a listener, instead of the one that the key had before.
    pub fn set_redirect(
        &mut self,
        redirect: RedirectKey,
        record: RedirectRecord,
    ) -> Result<(), DatapathError> {
        let before = self.maps.redirects.get(&map_key(redirect), 0).ok();
        let listener = listener_key(redirect, record.port);
        // First, so that getpeername(2) shows the endpoint to the first caller.
        self.maps.listeners.insert(listener, address_key(redirect.1), 0).map_err(map_error(MAP_LISTENERS))?;
        self.maps.redirects.insert(map_key(redirect), record, 0).map_err(map_error(MAP_REDIRECT))?;
        match before.filter(|before| before.port != record.port) {
            Some(before) => self.remove_listener(listener_key(redirect, before.port)),
            None => Ok(()),
        }
    }

    /// Ends the redirection of connections.
    pub fn remove_redirect(&mut self, redirect: RedirectKey) -> Result<(), DatapathError> {
        let key = map_key(redirect);
        let Ok(record) = self.maps.redirects.get(&key, 0) else { return Ok(()) };
        object::removed(self.maps.redirects.remove(&key)).map_err(map_error(MAP_REDIRECT))?;
        self.remove_listener(listener_key(redirect, record.port))
    }

    /// Removes all listeners, such as those of an earlier agent, whose broker has ended.
    pub fn clear_redirects(&mut self) -> Result<(), DatapathError> {
        for key in object::present(self.maps.redirects.keys())
            .collect::<Result<Vec<_>, _>>()
            .map_err(map_error(MAP_REDIRECT))?
        {
            object::removed(self.maps.redirects.remove(&key)).map_err(map_error(MAP_REDIRECT))?;
        }
        for key in object::present(self.maps.listeners.keys())
            .collect::<Result<Vec<_>, _>>()
            .map_err(map_error(MAP_LISTENERS))?
        {
            self.remove_listener(key)?;
        }
        Ok(())
    }

    fn remove_listener(&mut self, listener: ListenerKey) -> Result<(), DatapathError> {
        object::removed(self.maps.listeners.remove(&listener)).map_err(map_error(MAP_LISTENERS))
    }
}

fn map_key((cookie, endpoint): RedirectKey) -> ExemptionKey {
    ExemptionKey { address: address_key(endpoint), subject: Subject::new(SubjectKind::Netns, cookie) }
}

fn listener_key((cookie, endpoint): RedirectKey, port: u32) -> ListenerKey {
    let version = if endpoint.is_ipv4() { ListenerKey::V4 } else { ListenerKey::V6 };
    ListenerKey { cookie, port, version }
}
