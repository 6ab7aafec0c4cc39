//! A raw TCP relay: the floor of what a proxy in user space can cost.
//!
//! It accepts, connects to the engine with the fewest connections, and copies bytes both ways with one buffer for each
//! direction. It reads no HTTP: no routing, no retries, no health, no metrics; whatever a gateway costs beyond it is the
//! price of what the gateway does. Not a product: the benchmark's yardstick ([`crate::bench`]).
//!
//! Each thread has a runtime and a listener of its own on the same port (`SO_REUSEPORT`): a connection stays on the
//! thread that took it, as with nginx and Envoy, so nothing is locked and nothing moves. The counts of connections are
//! shared. *Cost*: for each piece that arrives one read, one write and a share of a wait.

mod options;

use std::{
    ffi::OsString,
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Parser;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
};

pub use self::options::Options;
use crate::limits::raise_open_files;

/// Connections that may wait to be accepted, on each thread.
const BACKLOG: u32 = 4_096;

/// After a failed accept, which is most often the limit on open files: others may end meanwhile.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs the command line `argv`, program name first, until it is killed: 1 something broke, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    raise_open_files();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&e);
            ExitCode::FAILURE
        }
    }
}

/// Listens with every thread, says where on standard output, and serves.
fn run(options: &Options) -> Result<(), String> {
    let engines = Arc::new(Engines::new(&options.engines));
    let mut threads = Vec::new();
    let mut address = options.listen;
    for _ in 0..options.threads {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start a runtime: {e}"))?;
        let listener = {
            let _inside = runtime.enter();
            listen(address).map_err(|e| format!("cannot listen on {address}: {e}"))?
        };
        // The first one finds a port if none was named; the others share it.
        address = listener.local_addr().map_err(|e| e.to_string())?;
        threads.push((runtime, listener));
    }
    let said = writeln!(io::stdout(), "listening on {address}");
    said.and_then(|()| io::stdout().flush()).map_err(|e| format!("standard output: {e}"))?;
    let bytes = options.buffer_kib * 1_024;
    let running: Vec<_> = threads
        .into_iter()
        .map(|(runtime, listener)| {
            let engines = Arc::clone(&engines);
            std::thread::spawn(move || runtime.block_on(serve(&listener, &engines, bytes)))
        })
        .collect();
    for thread in running {
        thread.join().map_err(|_| "a thread panicked".to_owned())?;
    }
    Ok(())
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts for as long as the process lives; the connections end with it.
async fn serve(listener: &TcpListener, engines: &Arc<Engines>, buffer_bytes: usize) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    let engines = Arc::clone(engines);
                    open.spawn(async move { relay(client, &engines, buffer_bytes).await });
                }
                Err(e) => {
                    say(&format!("cannot accept: {e}"));
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = open.join_next() => {}
        }
    }
}

/// One connection, until either side ends it. What breaks it is seen by both sides: their connections break too.
async fn relay(mut client: TcpStream, engines: &Engines, buffer_bytes: usize) {
    let taken = engines.take();
    let relayed = async {
        let mut engine = TcpStream::connect(taken.address()).await?;
        client.set_nodelay(true)?;
        engine.set_nodelay(true)?;
        copy_bidirectional_with_sizes(&mut client, &mut engine, buffer_bytes, buffer_bytes).await
    };
    match relayed.await {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            say(&format!("cannot connect to {}: {e}", taken.address()));
        }
        Ok(_) | Err(_) => {}
    }
}

fn say(line: &str) {
    writeln!(io::stderr(), "penstock-relay: {line}").unwrap_or_default();
}

/// Where connections lead, with how many each has.
struct Engines {
    all: Vec<(SocketAddr, AtomicUsize)>,
    /// Whose turn it is where several have as few.
    turn: AtomicUsize,
}

impl Engines {
    fn new(addresses: &[SocketAddr]) -> Self {
        let all = addresses.iter().map(|address| (*address, AtomicUsize::new(0))).collect();
        Self { all, turn: AtomicUsize::new(0) }
    }

    /// Counts a connection for the engine with the fewest. Two threads at once may take the same one: the next evens it out.
    fn take(&self) -> Taken<'_> {
        let open: Vec<usize> = self.all.iter().map(|(_, open)| open.load(Relaxed)).collect();
        let index = fewest(&open, self.turn.fetch_add(1, Relaxed));
        if let Some((_, open)) = self.all.get(index) {
            open.fetch_add(1, Relaxed);
        }
        Taken { engines: self, index }
    }
}

/// A connection that is counted as long as this lives.
struct Taken<'a> {
    engines: &'a Engines,
    index: usize,
}

impl Taken<'_> {
    fn address(&self) -> SocketAddr {
        // The command line names at least one.
        self.engines
            .all
            .get(self.index)
            .map_or_else(|| SocketAddr::from(([0; 4], 0)), |(address, _)| *address)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some((_, open)) = self.engines.all.get(self.index) {
            open.fetch_sub(1, Relaxed);
        }
    }
}

/// The smallest of `open`; of several the first at or behind `turn`, around the end.
fn fewest(open: &[usize], turn: usize) -> usize {
    let count = open.len().max(1);
    let distance = |index: usize| (index + count - turn % count) % count;
    open.iter()
        .enumerate()
        .min_by_key(|(index, open)| (**open, distance(*index)))
        .map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_with_the_fewest_connections_is_taken_and_ties_take_turns() {
        assert_eq!(fewest(&[3, 1, 2], 0), 1);
        assert_eq!([0, 1, 2, 3].map(|turn| fewest(&[0, 0, 0], turn)), [0, 1, 2, 0]);
        assert_eq!([0, 1, 2].map(|turn| fewest(&[1, 0, 0], turn)), [1, 1, 2]);
        assert_eq!(fewest(&[], 5), 0);
    }

    #[test]
    fn a_connection_counts_as_long_as_it_lives() {
        let engines = Engines::new(&["127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap()]);
        let open = || engines.all.iter().map(|(_, open)| open.load(Relaxed)).collect::<Vec<_>>();
        let taken: Vec<_> = (0..5).map(|_| engines.take()).collect();
        assert!(open() == [3, 2] || open() == [2, 3]);
        drop(taken);
        assert_eq!(open(), [0, 0]);
    }
}
