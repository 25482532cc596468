//! `imds-agent top`: refreshes the view and handles keys and signals.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::Args;
use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use futures_util::StreamExt as _;
use ratatui::DefaultTerminal;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{Failure, PinDirArg};
use crate::{
    datapath::{maps::pod_names::Names, pin::dir::PinDir},
    escape::escape,
    node::{link, netlink::Netlink},
    telemetry::{
        event_record::{self, EventRecord, boot_time},
        status,
        subscriber::EventSubscriber,
        top::{Command, Model, draw},
    },
};

const PAGE: isize = 10;
/// Number of recorded events that are shown at the start.
const EARLIER: u64 = 50;

#[derive(Args, Debug)]
pub(super) struct TopArgs {
    /// Refresh interval in seconds, from 0.1 to 60
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    #[command(flatten)]
    pins: PinDirArg,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.1..=60.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must be from 0.1 to 60 seconds".to_owned())
    }
}

pub(super) async fn top(args: TopArgs) -> Result<ExitCode, Failure> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "top needs a terminal; in scripts use `imds-agent status` and `imds-agent events`";
        return Err(Failure::Usage(anyhow!(message)));
    }
    let pins = args.pins.loaded("there is nothing to show")?;
    let mut watched = Watched {
        netlink: Netlink::connect()?,
        names: Names::open(&pins)?,
        subscriber: EventSubscriber::open_last(pins.clone(), EARLIER)?,
        pins,
        model: Model::default(),
        last: None,
    };
    watched.refresh().await?;
    let mut terminal = ratatui::try_init().context("failed to initialize the terminal")?;
    let outcome = watched.run(&mut terminal, args.interval).await;
    ratatui::restore();
    outcome.map(|()| ExitCode::SUCCESS).map_err(Failure::Failed)
}

struct Watched {
    pins: PinDir,
    netlink: Netlink,
    names: Names,
    subscriber: EventSubscriber,
    model: Model,
    last: Option<Instant>,
}

impl Watched {
    /// Refreshes the view until the user quits or a signal ends the command.
    async fn run(&mut self, terminal: &mut DefaultTerminal, period: Duration) -> anyhow::Result<()> {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        let mut keys = EventStream::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        loop {
            terminal.draw(|frame| draw(frame, &self.model)).context("failed to draw")?;
            tokio::select! {
                _ = ticks.tick() => if !self.model.is_paused { self.refresh().await? },
                event = keys.next() => match event {
                    Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => match parse_key(key) {
                        Some(KeyAction::Quit) => return Ok(()),
                        Some(KeyAction::Command(command)) => self.model.apply(command),
                        None => {}
                    },
                    // After a resize the next iteration draws the new size.
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error).context("failed to read from the terminal"),
                    None => return Ok(()),
                },
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = hangup.recv() => return Ok(()),
            }
        }
    }

    async fn refresh(&mut self) -> anyhow::Result<()> {
        let report = status::gather(&self.pins, &self.netlink).await?;
        let now = Instant::now();
        self.model.take(&report, self.last.replace(now).map(|last| now - last));
        let booted = boot_time();
        let names = &self.names;
        let lines = self.subscriber.read()?.into_iter().map(|event| {
            let pod = event_record::senders(&event).find_map(|sender| names.get(sender));
            let line = EventRecord::new(&event, booted, link::name_of, pod).to_string();
            let line = escape(&line).into_owned();
            // The view omits the date.
            line.split_once('T').map_or(line.clone(), |(_, line)| line.to_owned())
        });
        self.model.add_events(lines);
        Ok(())
    }
}

enum KeyAction {
    Quit,
    Command(Command),
}

fn parse_key(key: KeyEvent) -> Option<KeyAction> {
    let command = match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Some(KeyAction::Quit),
        KeyCode::Char('q') | KeyCode::Esc => return Some(KeyAction::Quit),
        KeyCode::Char('s') => Command::Sort,
        KeyCode::Char('p' | ' ') => Command::Pause,
        KeyCode::Char('?' | 'h') => Command::Keys,
        KeyCode::Up => Command::Scroll(-1),
        KeyCode::Down => Command::Scroll(1),
        KeyCode::PageUp => Command::Scroll(-PAGE),
        KeyCode::PageDown => Command::Scroll(PAGE),
        KeyCode::Home => Command::First,
        KeyCode::End => Command::Last,
        _ => return None,
    };
    Some(KeyAction::Command(command))
}
