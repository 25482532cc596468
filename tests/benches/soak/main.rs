//! A node for an hour: pods come and go, configurations are loaded and refused, pods flood the metadata service, and somebody
//! follows events and reads metrics. Says whether the agent takes no more at the end than before, and whether each packet was
//! denied and accounted for: `cargo xtask soak`.

mod load;
mod sample;
mod verdict;

use std::{
    env,
    path::Path,
    process::ExitCode,
    thread::{self, sleep},
    time::{Duration, Instant},
};

use imds_tests::{Agent, PodLink, Status, World, hook};

use load::{Cluster, Follower, Load};
use sample::{Row, Sampler};
use verdict::Outcome;

/// Names how long it takes, in minutes.
const MINUTES: &str = "IMDS_SOAK_MINUTES";
const PERIOD: Duration = Duration::from_secs(10);
/// How long what was sent last may be on its way.
const REST: Duration = Duration::from_secs(3);
/// How many agents do it one after another: each but the last is killed.
const AGENTS: u32 = 2;

fn main() -> ExitCode {
    let minutes = env::var(MINUTES).map_or(60, |minutes| minutes.parse().expect("a number of minutes"));
    let world = World::new();
    let cluster = Cluster::new(&world);
    let flooders = [PodLink::Routed, PodLink::Bridged].map(|link| world.add_pod(link));
    let mut outcome = Outcome::default();
    println!("{}", Row::TITLES);
    let start = Instant::now();
    for number in 1..=AGENTS {
        let agent = start_agent(&world, &cluster.config);
        outcome.held_at_rest.push(sample::held(&world));
        let follower = Follower::start(&world);
        let load = Load::new(&cluster, &flooders);
        let mut sampler = Sampler::new(&world, &agent, start);
        let rows = thread::scope(|scope| {
            load.start(scope);
            let end = Instant::now() + Duration::from_mins(minutes) / AGENTS;
            let mut rows = Vec::new();
            while Instant::now() < end {
                sleep(PERIOD);
                let row = sampler.row(&load, &follower);
                println!("{row}");
                rows.push(row);
            }
            load.stop();
            rows
        });
        sleep(REST);
        let last = sampler.row(&load, &follower);
        println!("{last}");
        println!("agent {number} is {}", if number < AGENTS { "killed" } else { "told to stop" });
        outcome.add(&rows, &last, follower.stop(), sampler.objects());
        outcome.held_at_rest.push(sample::held(&world));
        if number < AGENTS {
            agent.kill9();
        } else {
            assert!(agent.terminate().success(), "the agent does not end well");
        }
    }
    world.unload();
    outcome.left = sample::left(&world, &outcome.objects);
    println!("\n{outcome}");
    if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn start_agent<'w>(world: &'w World, config: &Path) -> Agent<'w> {
    let cgroup = world.cgroup().to_str().expect("a path of ours");
    let config = config.to_str().expect("a path of ours");
    let agent = world.imds_agent(&["run"]).config_file(config).args(&["--cgroup", cgroup]).spawn_ready();
    if hook::has_tcx() {
        // A filter holds a pod until there is time for TCX.
        world.status_when("every pod has its TCX link", Status::all_pods_have_tcx);
    }
    agent
}
