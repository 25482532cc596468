//! `imds-agent config check` and `imds-agent config show`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand, ValueEnum};
use imds_ebpf_common::{DenyAction, DenyErrno, Hook, Mode};
use toml::{Table, Value};

use super::{
    Failure, PinDirArg,
    config_summary::summary,
    output::{ensure_loaded, write_stdout},
};
use crate::{
    config::{
        self, Config, ConfigErrors, Environment, Hooks, NodeIdentity,
        node_pool::{Labels, parse_labels},
        provider::{DMI_DIR, Dmi},
    },
    datapath::{maps::config_record, object::Maps, pin::dir::PinDir},
    diagnose::preflight,
    escape::{escape, escape_lines},
    telemetry::logging,
};

#[derive(Args, Debug)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file. Prints `ok` and the effective configuration, or each error with its line and key. Resolves
    /// `provider = "auto"` for this machine
    Check(CheckArgs),
    /// Show the effective configuration with all defaults. Works without a running agent
    Show(ShowArgs),
}

#[derive(Args, Debug)]
struct CheckArgs {
    /// Configuration file (TOML), or `-` for standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Labels of the node whose `[[node_pool]]` is checked, such as `pool=gpu,zone=1`
    #[arg(long, value_name = "LABELS", value_parser = parse_labels)]
    node_labels: Option<Labels>,
    /// Name of the node whose `[[node_pool]]` is checked, which decides with `percent`. Default: as in `run`
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Directory of the firmware files (DMI) from which `provider = "auto"` detects the provider
    #[arg(long, value_name = "DIR", default_value = DMI_DIR, hide = true)]
    dmi_dir: PathBuf,
}

#[derive(Args, Debug)]
struct ShowArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Toml)]
    output: Output,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// A configuration file for `run --config`
    Toml,
    /// One JSON object with the keys of the configuration file
    Json,
}

pub(super) fn config(args: &ConfigArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        ConfigCommand::Check(args) => check(args),
        ConfigCommand::Show(args) => show(args),
    }
}

fn check(args: &CheckArgs) -> Result<ExitCode, Failure> {
    match resolve(args) {
        Ok(summary) => {
            write_stdout(&*escape_lines(&format!("ok\n{summary}")))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(errors) => {
            errors.iter().for_each(|error| logging::write_final_error(&escape(&error.to_string())));
            Ok(ExitCode::from(2))
        }
    }
}

fn resolve(args: &CheckArgs) -> Result<String, ConfigErrors> {
    let config = if args.file.as_os_str() == "-" {
        Config::parse(&config::read_stdin()?, &args.file)?
    } else {
        Config::load(&args.file)?
    };
    let dmi = Dmi::read(&args.dmi_dir);
    let mut pools = Vec::new();
    for (name, pool) in config.node_pools() {
        // Other nodes than this one have the pool.
        pool.resolve(&dmi)?;
        pools.push(name.to_owned());
    }
    let config = if args.node_labels.is_some() || args.node_name.is_some() {
        let name = args.node_name.clone();
        let name = name.unwrap_or_else(|| config.kubernetes.node_name(&Environment::read()));
        let labels = args.node_labels.clone().or_else(|| Some(Labels::new()));
        config.for_node(&NodeIdentity { name, labels, effective: None })
    } else {
        config
    };
    let (endpoint_set, exempt) = config.resolve(&dmi)?;
    Ok(summary(&config, &endpoint_set, &exempt, &pools))
}

fn show(args: &ShowArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let pins = PinDir::new(&args.pins.pin_dir)?;
    ensure_loaded(&pins, "no configuration is effective")?;
    let maps = Maps::open(&pins)?;
    let record = config_record::read(&maps).context("failed to read the effective configuration")?;
    let record = record.ok_or_else(|| anyhow!("the agent has recorded no configuration yet"))?;
    let policy = maps.policy.get(&0, 0).context("failed to read the map imds_policy")?;
    let hooks = Hooks::from_bits(policy.hooks);
    let mut table: Table = record.text.parse().context("failed to parse the effective configuration")?;
    // The programs read the policy map, which another program may have changed after the configuration was recorded.
    table.insert("mode".to_owned(), Mode::from_u32(policy.mode).name().into());
    table.insert("on_deny".to_owned(), DenyAction::from_u32(policy.on_deny).name().into());
    table.insert("on_deny_errno".to_owned(), DenyErrno::from_u32(policy.on_deny_errno).name().into());
    if let Some(Value::Table(switches)) = table.get_mut("hooks") {
        // The allow list is a key of its own.
        for hook in Hook::ALL.into_iter().filter(|&hook| hook != Hook::NodeAllow) {
            switches.insert(hook.name().to_owned(), hooks.contains(hook).into());
        }
    }
    match args.output {
        Output::Toml => {
            let file =
                record.path.map_or_else(|| "all defaults".to_owned(), |path| path.display().to_string());
            let (number, since) = (record.generation, record.loaded_at);
            let toml = toml::to_string(&table)?;
            write_stdout(format!("# {file}, generation {number}, active since {since:.0}\n{toml}"))?;
        }
        Output::Json => write_stdout(serde_json::to_string_pretty(&table)? + "\n")?,
    }
    Ok(ExitCode::SUCCESS)
}
