//! The hooks of the kernel from which packets reach the chains of a firewall.

use std::collections::{BTreeMap, BTreeSet};

use strum::EnumString;

use super::traffic::Action;

/// A netfilter hook to which base chains are attached. Parses from its name in nftables, and from that of a built-in chain of
/// iptables.
#[derive(Clone, Copy, Debug, EnumString, Eq, Ord, PartialEq, PartialOrd)]
#[strum(ascii_case_insensitive)]
pub(crate) enum BaseHook {
    Ingress,
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    Egress,
}

/// A chain: the program or family that it belongs to, its table and its name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct ChainId {
    pub(crate) family: String,
    pub(crate) table: String,
    pub(crate) name: String,
}

#[derive(Debug, Default)]
pub(crate) struct Chains {
    hooks: BTreeMap<ChainId, BTreeSet<BaseHook>>,
    denying: BTreeSet<ChainId>,
}

impl BaseHook {
    /// Reports whether the node's own processes send packets through the hook.
    pub(crate) const fn sees_node(self) -> bool {
        matches!(self, Self::Output | Self::Postrouting | Self::Egress)
    }

    /// Reports whether only packets that the node itself sends or receives pass the hook.
    pub(crate) const fn is_local(self) -> bool {
        matches!(self, Self::Input | Self::Output)
    }

    /// Reports whether packets that pods send to other machines pass the hook.
    pub(crate) const fn sees_pods(self) -> bool {
        !self.is_local()
    }
}

impl Chains {
    /// Follows the jumps of all rules from the chains in `base`, and back from the chains that deny or redirect.
    pub(crate) fn new<'a>(
        base: impl IntoIterator<Item = (ChainId, BaseHook)>,
        actions: impl Iterator<Item = (&'a ChainId, &'a Action)>,
    ) -> Self {
        let (mut targets_of, mut sources_of) =
            (BTreeMap::<_, BTreeSet<_>>::new(), BTreeMap::<_, BTreeSet<_>>::new());
        let mut chains = Self::default();
        let mut denying = Vec::new();
        for (chain, action) in actions {
            match action {
                Action::Jump(name) => {
                    let target = ChainId { name: name.clone(), ..chain.clone() };
                    sources_of.entry(target.clone()).or_default().insert(chain.clone());
                    targets_of.entry(chain.clone()).or_default().insert(target);
                }
                Action::Deny | Action::Redirect(_) => denying.push(chain.clone()),
                Action::Accept | Action::Other => {}
            }
        }
        for (chain, hook) in base {
            for chain in reached(vec![chain], &targets_of) {
                chains.hooks.entry(chain).or_default().insert(hook);
            }
        }
        chains.denying = reached(denying, &sources_of);
        chains
    }

    pub(crate) fn hooks(&self, chain: &ChainId) -> BTreeSet<BaseHook> {
        self.hooks.get(chain).cloned().unwrap_or_default()
    }

    /// Reports whether a rule of the chain, or of one that it leads to, denies or redirects.
    pub(crate) fn can_deny(&self, chain: &ChainId) -> bool {
        self.denying.contains(chain)
    }
}

fn reached(start: Vec<ChainId>, edges: &BTreeMap<ChainId, BTreeSet<ChainId>>) -> BTreeSet<ChainId> {
    let (mut pending, mut reached) = (start, BTreeSet::new());
    while let Some(chain) = pending.pop() {
        if reached.insert(chain.clone()) {
            pending.extend(edges.get(&chain).into_iter().flatten().cloned());
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str) -> ChainId {
        ChainId { family: "inet".to_owned(), table: "t".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn jumps_are_followed_through_loops() {
        let jump = |to: &str| Action::Jump(to.to_owned());
        let rules = [
            (chain("out"), jump("a")),
            (chain("fwd"), jump("b")),
            (chain("a"), jump("b")),
            (chain("b"), jump("a")),
            (chain("b"), Action::Deny),
            (chain("c"), Action::Accept),
        ];
        let base = [(chain("out"), BaseHook::Output), (chain("fwd"), BaseHook::Forward)];
        let chains = Chains::new(base, rules.iter().map(|(chain, action)| (chain, action)));
        assert_eq!(chains.hooks(&chain("a")), BTreeSet::from([BaseHook::Output, BaseHook::Forward]));
        assert_eq!(chains.hooks(&chain("out")), BTreeSet::from([BaseHook::Output]));
        assert_eq!(chains.hooks(&chain("c")), BTreeSet::new());
        assert!(["out", "fwd", "a", "b"].iter().all(|name| chains.can_deny(&chain(name))));
        assert!(!chains.can_deny(&chain("c")));
    }
}
