//! Ways to the metadata service, and which hooks hold them.

use crate::{
    Agent, Cgroup, World,
    poll::try_poll,
    probe::LONG,
    skip::{WHOLE_TEST, lacks_netns_cookie, skip},
};

/// The hooks that see packets.
const EDGES: [&str; 2] = ["from_pod", "node_egress"];
const SOCKET: &str = "socket";
const STRICT: &str = "host_network";

/// Ways by which pods reach the metadata service, and the hooks each of which is to hold all of them alone.
#[must_use]
pub struct Ways<'w> {
    world: &'w World,
    hooks: Vec<&'static str>,
    also: Vec<&'static str>,
    config: String,
    cgroup: Option<&'w Cgroup>,
    all: Vec<(String, Box<dyn Fn() -> bool + Sync + 'w>)>,
}

impl World {
    /// Ways that are held by these hooks.
    pub fn ways(&self, hooks: &[&'static str]) -> Ways<'_> {
        Ways {
            world: self,
            hooks: hooks.to_vec(),
            also: Vec::new(),
            config: String::new(),
            cgroup: None,
            all: Vec::new(),
        }
    }

    /// Whether anything arrives at the metadata service of what `send` sends.
    pub fn arrives(&self, send: impl FnOnce()) -> bool {
        let before = self.arrivals();
        send();
        self.arrivals() != before
    }
}

impl<'w> Ways<'w> {
    /// With this configuration of the agent.
    pub fn config(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.config);
        self
    }

    /// Adds a hook that is on only together with all others, as the agent refuses to start with it alone.
    pub fn also(mut self, hook: &'static str) -> Self {
        self.also.push(hook);
        self
    }

    /// Tries all of them in this cgroup.
    pub fn in_cgroup(mut self, cgroup: &'w Cgroup) -> Self {
        self.cgroup = Some(cgroup);
        self
    }

    /// A way that `is_open` where it returns true. It is tried in the world's cgroup, unless another one is chosen.
    pub fn way(mut self, name: impl Into<String>, is_open: impl Fn() -> bool + Sync + 'w) -> Self {
        self.all.push((name.into(), Box::new(is_open)));
        self
    }

    /// A way without an answer: it is open where packets arrive.
    pub fn one_way(self, name: impl Into<String>, send: impl Fn() + Sync + 'w) -> Self {
        let world = self.world;
        self.way(name, move || world.arrives(&send))
    }

    /// Each way is open without the agent, closed by each of the hooks alone, if there are any, and by all there are
    /// together, and open again after each.
    #[track_caller]
    pub fn assert_held(self) {
        self.assert_open("without the agent");
        let mut is_held = false;
        for hook in &self.hooks {
            if *hook == SOCKET && lacks_netns_cookie() {
                skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
                continue;
            }
            self.assert_closed(&[hook]);
            is_held = true;
        }
        if !is_held && !self.hooks.is_empty() {
            return skip(WHOLE_TEST, "no hook that would hold it on this kernel");
        }
        let mut all = EDGES.to_vec();
        if !lacks_netns_cookie() {
            all.push(SOCKET);
        }
        if self.hooks.contains(&STRICT) {
            all.push(STRICT);
        }
        all.extend(&self.also);
        self.assert_closed(&all);
    }

    /// The ways that are open with these hooks on: none, if all is well.
    #[must_use]
    pub fn open_with(&self, hooks: &[&'static str]) -> Vec<&str> {
        let agent = self.start(hooks);
        let open = self.all.iter().filter(|(_, is_open)| {
            let before = self.world.arrivals();
            self.is_open(is_open) || self.world.arrivals() != before
        });
        let open = open.map(|(name, _)| name.as_str()).collect();
        drop(agent);
        self.world.unload();
        open
    }

    #[track_caller]
    fn assert_closed(&self, hooks: &[&'static str]) {
        let open = self.open_with(hooks);
        assert!(open.is_empty(), "open with {hooks:?}: {open:#?}");
        self.assert_open(&format!("after {hooks:?}"));
    }

    #[track_caller]
    fn assert_open(&self, when: &str) {
        for (name, is_open) in &self.all {
            let found = try_poll(LONG, || self.is_open(is_open).then_some(()));
            assert!(found.is_some(), "{name} is not open {when}");
        }
    }

    fn is_open(&self, is_open: impl FnOnce() -> bool + Send) -> bool {
        match self.cgroup {
            Some(cgroup) => cgroup.run(is_open),
            None => self.world.in_cgroup(is_open),
        }
    }

    #[track_caller]
    fn start(&self, hooks: &[&'static str]) -> Agent<'w> {
        self.world.agent().hooks(hooks).config(&self.config).spawn_ready()
    }
}
