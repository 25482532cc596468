//! An hour of load on a node: pods come and go, configurations are loaded and rejected, pods flood the metadata
//! service, and clients subscribe to events and read metrics. Reports whether the agent's resource usage grows, and
//! whether every packet was denied and accounted for: `cargo xtask soak`.

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

use imds_tests::{Agent, PodLink, Status, TestEnv, hook};

use load::{Cluster, Follower, Load};
use sample::{Row, Sampler};
use verdict::Outcome;

/// Environment variable with the duration in minutes.
const MINUTES: &str = "IMDS_SOAK_MINUTES";
const PERIOD: Duration = Duration::from_secs(10);
/// Time for the last packets to be processed.
const REST: Duration = Duration::from_secs(3);
/// Number of agents that run one after another. All but the last are killed.
const AGENTS: u32 = 2;

fn main() -> ExitCode {
    let minutes = env::var(MINUTES).map_or(60, |minutes| minutes.parse().expect("a number of minutes"));
    let env = TestEnv::new();
    let cluster = Cluster::new(&env);
    let flooders = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let mut outcome = Outcome::default();
    println!("{}", Row::TITLES);
    let start = Instant::now();
    for number in 1..=AGENTS {
        let agent = start_agent(&env, &cluster.config);
        outcome.objects_at_rest.push(sample::kernel_objects(&env));
        let follower = Follower::start(&env);
        let load = Load::new(&cluster, &flooders);
        let mut sampler = Sampler::new(&env, &agent, start);
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
        println!("agent {number} is {}", if number < AGENTS { "killed" } else { "terminated" });
        outcome.add(&rows, &last, follower.stop(), sampler.objects());
        outcome.objects_at_rest.push(sample::kernel_objects(&env));
        if number < AGENTS {
            agent.kill9();
        } else {
            assert!(agent.terminate().success(), "the agent must exit with success");
        }
    }
    env.unload();
    outcome.left = sample::left(&env, &outcome.objects);
    println!("\n{outcome}");
    if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn start_agent<'w>(env: &'w TestEnv, config: &Path) -> Agent<'w> {
    let cgroup = env.cgroup().to_str().expect("a path of ours");
    let config = config.to_str().expect("a path of ours");
    let agent = env.imds_agent(&["run"]).config_file(config).args(&["--cgroup", cgroup]).spawn_ready();
    if hook::has_tcx() {
        // A clsact filter denies the pod until the TCX link is attached.
        env.status_when("every pod has its TCX link", Status::all_pods_have_tcx);
    }
    agent
}
