//! Certificates that change on disk, taken into use without dropping a connection: handshakes from then on use the new ones.
//!
//! The files are read every few seconds and on SIGHUP, and compared with what was last looked at; times of modification
//! would miss what is replaced within a second, or by a link. A new pair that cannot be used, or has expired already, is
//! refused in the log and in a counter, once, and the old one stays. Between the writing of a certificate and of its key a
//! pair does not match: that is refused too, and put right by the next look.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use super::{
    Listener,
    tls::{self, Certificates, Contents},
};
use crate::telemetry::metrics::ListenerMetrics;

/// Between two looks at the files.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// A listener's certificates and what was last read of their files.
#[derive(Debug)]
pub struct Watched {
    listener: Arc<Listener>,
    in_use: Certificates,
    /// What was last judged; an error counts, so that it is told once.
    seen: Result<Contents, String>,
}

impl Watched {
    /// Watches the files of `listener`, which were found as `seen` and hold `in_use`.
    pub(super) fn new(listener: Arc<Listener>, seen: Contents, in_use: Certificates) -> Self {
        Self { listener, in_use, seen: Ok(seen) }
    }

    /// The listener's name, and what it shows.
    pub fn in_use(&self) -> (&str, &Certificates) {
        (&self.listener.name, &self.in_use)
    }

    /// Whether the chain in use has expired at `now_unix_s`.
    pub fn has_expired(&self, now_unix_s: i64) -> bool {
        self.in_use.expires_unix_s <= now_unix_s
    }

    /// Looks at the files and takes what is new. `Ok(None)`: nothing is.
    ///
    /// # Errors
    /// A sentence about new files that cannot be used; the old ones stay in use.
    pub fn look(&mut self, now_unix_s: i64) -> Result<Option<&Certificates>, String> {
        let Some(tls) = &self.listener.tls else { return Ok(None) };
        let read = tls.files.read();
        if self.seen == read {
            return Ok(None);
        }
        let judged = match &read {
            Ok(contents) => tls::load(contents, &tls.files, self.listener.config.http2),
            Err(e) => Err(e.clone()),
        };
        self.seen = read;
        let (config, certificates) = judged?;
        if certificates.expires_unix_s <= now_unix_s {
            return Err(format!("{}: it has expired", self.listener.config.certificate));
        }
        tls.config.store(config);
        self.in_use = certificates;
        Ok(Some(&self.in_use))
    }
}

/// Looks at the files of `watched` every [`INTERVAL`], and when `hangup` brings something, until `stop`.
pub async fn run(
    mut watched: Vec<Watched>,
    gateway: Arc<crate::gateway::Gateway>,
    mut hangup: Signal,
    stop: CancellationToken,
) {
    loop {
        let asked = tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL), if !watched.is_empty() => false,
            _ = hangup.recv() => true,
        };
        if asked {
            tracing::info!(listeners = watched.len(), "SIGHUP: looking at certificates");
        }
        // Reading files blocks.
        let look = tokio::task::spawn_blocking(move || {
            let now = now_unix_s();
            let looks: Vec<_> =
                watched.iter_mut().map(|one| one.look(now).map(Option::<&_>::cloned)).collect();
            (watched, looks)
        });
        let Ok((back, looks)) = look.await else {
            tracing::error!("certificates are not watched any more; restart to take new ones");
            return;
        };
        watched = back;
        for (one, result) in watched.iter().zip(looks) {
            tell(&gateway.metrics.listeners, &one.listener, result);
        }
    }
}

fn tell(metrics: &ListenerMetrics, listener: &Listener, result: Result<Option<Certificates>, String>) {
    let name = &*listener.name;
    match result {
        Ok(None) => {}
        Ok(Some(Certificates { expires_unix_s, subject })) => {
            metrics.certificate(name, expires_unix_s);
            metrics.reloaded(name, true);
            tracing::info!(listener = name, subject, expires_unix_s, "new certificates are in use");
        }
        Err(e) => {
            metrics.reloaded(name, false);
            tracing::error!(listener = name, "new certificates are refused, the former stay in use: {e}");
        }
    }
}

/// Seconds since 1970.
pub fn now_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
