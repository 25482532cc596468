//! Attack vectors to the metadata service, and the hooks that deny them.

use crate::{
    Agent, Cgroup, TestEnv,
    poll::try_poll,
    probe::LONG,
    scale::scaled_timeout,
    skip::{WHOLE_TEST, lacks_netns_cookie, skip},
};

/// TC hooks, which see packets.
const TC_HOOKS: [&str; 2] = ["from_pod", "node_egress"];
const SOCKET: &str = "socket";
const HOST_NETWORK: &str = "host_network";

/// Attack vectors of pods to the metadata service. Each of the hooks alone must deny all of them.
#[must_use]
pub struct AttackVectors<'w> {
    env: &'w TestEnv,
    hooks: Vec<&'static str>,
    also: Vec<&'static str>,
    config: String,
    cgroup: Option<&'w Cgroup>,
    all: Vec<(String, Box<dyn Fn() -> bool + Sync + 'w>)>,
}

impl TestEnv {
    /// Returns an empty set of vectors that these hooks must deny.
    pub fn vectors(&self, hooks: &[&'static str]) -> AttackVectors<'_> {
        AttackVectors {
            env: self,
            hooks: hooks.to_vec(),
            also: Vec::new(),
            config: String::new(),
            cgroup: None,
            all: Vec::new(),
        }
    }

    /// Reports whether any packet that `send` sends arrives at the metadata service.
    pub fn arrives(&self, send: impl FnOnce()) -> bool {
        let before = self.received_packets();
        send();
        self.received_packets() != before
    }
}

impl<'w> AttackVectors<'w> {
    /// Sets the agent's configuration in TOML.
    pub fn config(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.config);
        self
    }

    /// Adds a hook that is tested only together with all others, because the agent refuses to start with it alone.
    pub fn also(mut self, hook: &'static str) -> Self {
        self.also.push(hook);
        self
    }

    /// Tries all vectors in this cgroup.
    pub fn in_cgroup(mut self, cgroup: &'w Cgroup) -> Self {
        self.cgroup = Some(cgroup);
        self
    }

    /// Adds a vector. `is_open` returns whether it reaches the service. The vector runs in the environment's cgroup
    /// unless another one is set.
    pub fn vector(mut self, name: impl Into<String>, is_open: impl Fn() -> bool + Sync + 'w) -> Self {
        self.all.push((name.into(), Box::new(is_open)));
        self
    }

    /// Adds a vector without a response, which is open if packets arrive.
    pub fn one_vector(self, name: impl Into<String>, send: impl Fn() + Sync + 'w) -> Self {
        let env = self.env;
        self.vector(name, move || env.arrives(&send))
    }

    /// Asserts that each vector is open without the agent, denied by each hook alone and by all hooks together, and
    /// open again afterwards.
    #[track_caller]
    pub fn assert_blocked_all(self) {
        self.assert_open("without the agent");
        let mut is_tested = false;
        for hook in &self.hooks {
            if *hook == SOCKET && lacks_netns_cookie() {
                skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
                continue;
            }
            self.assert_blocked_by(&[hook]);
            is_tested = true;
        }
        if !is_tested && !self.hooks.is_empty() {
            return skip(WHOLE_TEST, "no hook can deny it on this kernel");
        }
        let mut all = TC_HOOKS.to_vec();
        if !lacks_netns_cookie() {
            all.push(SOCKET);
        }
        if self.hooks.contains(&HOST_NETWORK) {
            all.push(HOST_NETWORK);
        }
        all.extend(&self.also);
        self.assert_blocked_by(&all);
    }

    /// Returns the vectors that are open with these hooks. The list is empty if all are denied.
    #[must_use]
    pub fn open_with(&self, hooks: &[&'static str]) -> Vec<&str> {
        let agent = self.start(hooks);
        let open = self.all.iter().filter(|(_, is_open)| {
            let before = self.env.received_packets();
            self.is_open(is_open) || self.env.received_packets() != before
        });
        let open = open.map(|(name, _)| name.as_str()).collect();
        drop(agent);
        self.env.unload();
        open
    }

    #[track_caller]
    fn assert_blocked_by(&self, hooks: &[&'static str]) {
        let open = self.open_with(hooks);
        assert!(open.is_empty(), "open with {hooks:?}: {open:#?}");
        self.assert_open(&format!("after {hooks:?}"));
    }

    #[track_caller]
    fn assert_open(&self, when: &str) {
        for (name, is_open) in &self.all {
            let found = try_poll(scaled_timeout(LONG), || self.is_open(is_open).then_some(()));
            assert!(found.is_some(), "{name} is not open {when}");
        }
    }

    fn is_open(&self, is_open: impl FnOnce() -> bool + Send) -> bool {
        match self.cgroup {
            Some(cgroup) => cgroup.run(is_open),
            None => self.env.in_cgroup(is_open),
        }
    }

    #[track_caller]
    fn start(&self, hooks: &[&'static str]) -> Agent<'w> {
        self.env.agent().hooks(hooks).config(&self.config).spawn_ready()
    }
}
