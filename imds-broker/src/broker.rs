//! Opens and closes listeners at the agent's request.

use std::{collections::HashMap, net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use anyhow::{Context as _, Result};
use imds_broker::{
    allow::Rule,
    protocol::{FromBroker, ToBroker},
    provider::Provider,
};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot},
    task::JoinSet,
};

use crate::{
    control::{Control, Received, set_nonblocking},
    limits::{MAX_ALL_CONNECTIONS, MAX_ALL_EXPLAINED_CONNECTIONS, MAX_LISTENERS},
    listener::{Listener, serve},
};

/// State of the program.
struct Broker {
    control: Arc<Control>,
    /// Connections of all listeners that may still be accepted, and of those that only explain.
    free_connections: Arc<Semaphore>,
    free_explained: Arc<Semaphore>,
    /// Open listeners. Each sender closes its listener when it is dropped; `None` if that has happened.
    open: HashMap<u32, Option<oneshot::Sender<()>>>,
    tasks: JoinSet<u32>,
}

/// Serves until the agent closes the socket.
pub(crate) async fn run(control: Control) -> Result<()> {
    control.send(&FromBroker::Ready {}).await.context("failed to write to the agent")?;
    let control = Arc::new(control);
    let mut broker = Broker {
        control: Arc::clone(&control),
        free_connections: Arc::new(Semaphore::new(MAX_ALL_CONNECTIONS)),
        free_explained: Arc::new(Semaphore::new(MAX_ALL_EXPLAINED_CONNECTIONS)),
        open: HashMap::new(),
        tasks: JoinSet::new(),
    };
    loop {
        tokio::select! {
            received = control.receive() => {
                let Some(received) = received.context("failed to read from the agent")? else { return Ok(()) };
                broker.handle(received).await?;
            }
            Some(id) = broker.tasks.join_next() => {
                let id = id.context("a listener failed")?;
                broker.open.remove(&id);
                broker.reply(&FromBroker::Closed { id, error: None }).await?;
            }
        }
    }
}

impl Broker {
    async fn handle(&mut self, received: Received) -> Result<()> {
        match received.message {
            Ok(ToBroker::Listen { id, endpoint, provider, allow }) => {
                let opened = self.listen(id, endpoint, &provider, &allow, received.descriptors);
                let reply = match opened {
                    Ok(()) => FromBroker::Listening { id },
                    Err(error) => FromBroker::Closed { id, error: Some(format!("{error:#}")) },
                };
                self.reply(&reply).await
            }
            Ok(ToBroker::Close { id }) => {
                // An unknown listener has been closed with an error before.
                drop(self.open.get_mut(&id).and_then(Option::take));
                Ok(())
            }
            Ok(ToBroker::Ping {}) => self.reply(&FromBroker::Pong {}).await,
            Err(error) => {
                eprintln!("imds-broker: discarded a message of the agent: {error}");
                Ok(())
            }
        }
    }

    async fn reply(&self, message: &FromBroker) -> Result<()> {
        self.control.send(message).await.context("failed to write to the agent")
    }

    fn listen(
        &mut self,
        id: u32,
        endpoint: SocketAddr,
        provider: &str,
        allow: &[String],
        descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        anyhow::ensure!(self.open.len() < MAX_LISTENERS, "there are {MAX_LISTENERS} listeners");
        anyhow::ensure!(!self.open.contains_key(&id), "listener {id} is open");
        let rules = allow.iter().map(|rule| Rule::parse(rule)).collect::<Result<Vec<_>, _>>()?;
        let socket = listening_socket(descriptors)?;
        let (close, closed) = oneshot::channel();
        let of_all = if rules.is_empty() { &self.free_explained } else { &self.free_connections };
        let (provider, free_connections) = (Provider::named(provider), Arc::clone(of_all));
        let listener = Listener::new(id, endpoint, provider, rules, &self.control, free_connections);
        self.open.insert(id, Some(close));
        self.tasks.spawn(async move {
            serve(socket, Arc::new(listener), closed).await;
            id
        });
        Ok(())
    }
}

/// Returns the only descriptor of a message as a socket. Checks that it is one that listens for TCP connections.
fn listening_socket(descriptors: Vec<OwnedFd>) -> Result<TcpListener> {
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|descriptors| anyhow::anyhow!("{} descriptors instead of 1", descriptors.len()))?;
    let is_tcp = getsockopt(&descriptor, sockopt::SockType) == Ok(SockType::Stream)
        && getsockopt(&descriptor, sockopt::AcceptConn) == Ok(true);
    anyhow::ensure!(is_tcp, "the descriptor is not a listening TCP socket");
    set_nonblocking(&descriptor)?;
    TcpListener::from_std(descriptor.into()).context("failed to watch the socket")
}
