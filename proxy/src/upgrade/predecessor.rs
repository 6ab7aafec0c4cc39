//! The new process's side: taking sockets over, and telling when it serves.

use std::{
    fs::File,
    io::Write,
    net::TcpListener,
    os::{fd::AsFd, unix::net::UnixStream},
    time::Duration,
};

use super::{Place, Ready, Socket, VARIABLE, VERSION, channel, choose};
use crate::listener;

/// For the offer, which is sent right after the start.
const OFFER: Duration = Duration::from_secs(10);

/// The process that gives way to this one.
#[derive(Debug)]
pub struct Predecessor {
    channel: UnixStream,
    sockets: Vec<Socket>,
    /// Its process id.
    pub pid: u32,
    /// Whether it has tables.
    pub has_tables: bool,
}

impl Predecessor {
    /// The predecessor, if a process started this one as its successor. Standard input is `/dev/null` afterwards.
    ///
    /// # Errors
    /// [`VARIABLE`] is set, and standard input is not what a predecessor makes it.
    pub fn find() -> Result<Option<Self>, String> {
        if std::env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let failed = |e: std::io::Error| {
            format!("{VARIABLE} is set, but no predecessor hands over its sockets on standard input: {e}")
        };
        let channel = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
        let nothing = File::open("/dev/null").map_err(failed)?;
        nix::unistd::dup2_stdin(nothing).map_err(|e| failed(e.into()))?;
        channel.set_read_timeout(Some(OFFER)).map_err(failed)?;
        let (offer, sockets) = channel::receive(&channel).map_err(failed)?;
        Ok(Some(Self { channel, sockets, pid: offer.pid, has_tables: offer.has_tables }))
    }

    /// Whether it still runs: it is this process's parent.
    pub fn lives(&self) -> bool {
        u32::try_from(nix::unistd::getppid().as_raw()) == Ok(self.pid)
    }

    /// The socket of the listener `name` at `listen`, if it had one.
    fn take(&mut self, name: &str, listen: &str) -> Option<TcpListener> {
        let offered: Vec<Place> = self.sockets.iter().map(|socket| socket.place.clone()).collect();
        choose(&offered, name, listen).map(|at| self.sockets.swap_remove(at).socket)
    }

    /// Says that this process serves. What nobody took is closed.
    ///
    /// # Errors
    /// The predecessor is gone. One that has given up ends this process itself.
    pub fn tell_ready(mut self) -> std::io::Result<()> {
        let ready = Ready { pid: std::process::id(), version: VERSION.into() };
        let mut line = serde_json::to_vec(&ready)?;
        line.push(b'\n');
        self.channel.write_all(&line)
    }
}

/// The socket for `listen`, which the setting `setting` asks for: the predecessor's, or a new one.
///
/// # Errors
/// A line for the operator that names the address and the setting.
pub fn socket(
    predecessor: &mut Option<Predecessor>,
    name: &str,
    setting: &str,
    listen: &str,
) -> Result<Socket, String> {
    let taken = predecessor.as_mut().and_then(|predecessor| predecessor.take(name, listen));
    let socket = match taken {
        Some(socket) => socket,
        None => listener::bind(setting, listen)?,
    };
    let address = socket.local_addr().map_err(|e| e.to_string())?;
    Ok(Socket { place: Place { name: name.into(), listen: listen.into(), address }, socket })
}
