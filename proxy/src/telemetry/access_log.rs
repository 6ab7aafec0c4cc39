//! The canonical log line of each request: [`Facts`] as one line of JSON, on standard output or in a file.
//!
//! A request writes its line into a buffer and hands it over without waiting; a thread of its own takes what has gathered
//! and writes it at once. When the disk or the reader is slower than the traffic, the queue fills and lines are dropped
//! and counted: a log must never hold up what it logs. A write that fails loses its lines, is counted, and is told in the
//! process's own log at most once a minute.
//!
//! Invariants: every line is whole. After a write that broke off inside one, the next begins on a line of its own. Memory
//! is bounded by the queue. Standard output is used for nothing else by this process.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::{Builder, sleep},
    time::{Duration, Instant},
};

use penstock_config::proxy::TelemetryConfig;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{facts::Facts, metrics::Metrics};

/// Bytes written at once, about.
const BATCH_BYTES: usize = 64 << 10;

/// How long the writer lets lines gather: at most so many wake-ups a second, whatever the traffic.
const GATHER: Duration = Duration::from_millis(10);

/// How often an idle writer looks whether the file is to be opened again.
const IDLE: Duration = Duration::from_secs(1);

/// Least time between two complaints about the log.
const COMPLAIN: Duration = Duration::from_secs(60);

/// Where requests leave their lines. Off by default.
#[derive(Debug, Default, Clone)]
pub struct AccessLog {
    open: Option<Open>,
}

#[derive(Debug, Clone)]
struct Open {
    queue: SyncSender<Message>,
    reopen: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

enum Message {
    Line(Vec<u8>),
    /// Write what came before, then say so.
    Flush(SyncSender<()>),
}

/// The log that the settings ask for, with its writer running.
///
/// # Errors
/// A sentence that names the setting: the file cannot be opened, or there can be no thread.
pub fn open(config: &TelemetryConfig, metrics: &Arc<Metrics>) -> Result<AccessLog, String> {
    let path = match config.access_log.as_str() {
        "off" => return Ok(AccessLog::default()),
        "stdout" => None,
        path => Some(PathBuf::from(path)),
    };
    let sink: Box<dyn Write + Send> = match &path {
        // Past the library's buffer, which would keep what could not be written and send it later.
        None => Box::new(File::from(
            io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .map_err(|e| format!("telemetry.access_log: cannot use standard output: {e}"))?,
        )),
        Some(path) => Box::new(
            append(path).map_err(|e| format!("telemetry.access_log: cannot open {}: {e}", path.display()))?,
        ),
    };
    let (queue, lines) = sync_channel(config.access_log_queue);
    let reopen = Arc::<AtomicBool>::default();
    let writer = Writer {
        sink,
        path,
        reopen: Arc::clone(&reopen),
        metrics: Arc::clone(metrics),
        torn: false,
        complained: None,
    };
    // Ends with the process: a write that hangs could not be waited for.
    Builder::new()
        .name("access-log".into())
        .spawn(move || writer.run(&lines))
        .map_err(|e| format!("telemetry.access_log: cannot start its writer: {e}"))?;
    Ok(AccessLog { open: Some(Open { queue, reopen, metrics: Arc::clone(metrics) }) })
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

impl AccessLog {
    /// Hands over the line of a request that has ended. Never waits.
    pub fn write(&self, facts: &Facts) {
        let Some(open) = &self.open else { return };
        let mut line = Vec::with_capacity(1_024);
        if serde_json::to_writer(&mut line, facts).is_err() {
            return; // not to be had: plain data, and a buffer in memory
        }
        line.push(b'\n');
        match open.queue.try_send(Message::Line(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                open.metrics.access_log_dropped.with_label_values(&["queue_full"]).inc();
            }
        }
    }

    /// Has the file opened again before the next line: it may have been moved away.
    pub fn reopen(&self) {
        if let Some(open) = &self.open {
            open.reopen.store(true, Relaxed);
        }
    }

    /// Does so at each SIGHUP, until `stop`.
    pub async fn reopen_on_hangup(self, stop: CancellationToken) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(e) => return tracing::error!(error = %e, "SIGHUP will not open the access log again"),
        };
        while let Some(Some(())) = stop.run_until_cancelled(hangup.recv()).await {
            self.reopen();
        }
    }

    /// Waits until all that was handed over is written, at most `longest`; false if that was not enough. Blocks.
    pub fn flush(&self, longest: Duration) -> bool {
        let Some(open) = &self.open else { return true };
        let deadline = Instant::now() + longest;
        let (done, flushed) = sync_channel(1);
        while let Err(refused) = open.queue.try_send(Message::Flush(done.clone())) {
            if matches!(refused, TrySendError::Disconnected(_)) || Instant::now() >= deadline {
                return false;
            }
            sleep(GATHER);
        }
        flushed.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// Writes as much of `bytes` as can be, and says how much that was.
fn write_all<'a>(sink: &mut dyn Write, bytes: &'a [u8]) -> (&'a [u8], io::Result<()>) {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match sink.write(rest) {
            Ok(0) => return (&bytes[..written], Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (&bytes[..written], Err(error)),
        }
    }
    (bytes, Ok(()))
}

/// The thread that writes.
struct Writer {
    sink: Box<dyn Write + Send>,
    /// Of a file, to open it again.
    path: Option<PathBuf>,
    reopen: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    /// Whether the last write may have ended inside a line.
    torn: bool,
    complained: Option<Instant>,
}

impl Writer {
    /// Until everybody who could write a line is gone.
    fn run(mut self, lines: &Receiver<Message>) {
        let mut batch = Vec::with_capacity(BATCH_BYTES * 2);
        loop {
            self.reopen_if_asked();
            let mut next = match lines.recv_timeout(IDLE) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if matches!(next, Some(Message::Line(_))) {
                sleep(GATHER);
            }
            self.reopen_if_asked();
            let mut count = 0;
            while let Some(message) = next {
                match message {
                    Message::Line(line) => {
                        batch.extend_from_slice(&line);
                        count += 1;
                    }
                    Message::Flush(done) => {
                        self.write(&mut batch, &mut count);
                        // Whoever asked may have stopped waiting.
                        done.try_send(()).ok();
                    }
                }
                if batch.len() >= BATCH_BYTES {
                    self.write(&mut batch, &mut count);
                }
                next = lines.try_recv().ok();
            }
            self.write(&mut batch, &mut count);
        }
    }

    /// Writes `count` lines and forgets them.
    fn write(&mut self, batch: &mut Vec<u8>, count: &mut u64) {
        if *count > 0 {
            if self.torn && self.sink.write_all(b"\n").is_ok() {
                self.torn = false;
            }
            let (written, result) = write_all(&mut *self.sink, batch);
            let whole = memchr::memchr_iter(b'\n', written).count() as u64;
            self.metrics.access_log_lines.inc_by(whole);
            if let Some(last) = written.last() {
                self.torn = *last != b'\n';
            }
            if let Err(error) = result {
                self.metrics.access_log_dropped.with_label_values(&["write_error"]).inc_by(*count - whole);
                self.complain("lines of the access log are lost: it cannot be written", &error);
            }
        }
        batch.clear();
        *count = 0;
    }

    fn reopen_if_asked(&mut self) {
        let Some(path) = &self.path else { return };
        if !self.reopen.swap(false, Relaxed) {
            return;
        }
        match append(path) {
            Ok(file) => {
                self.sink = Box::new(file);
                self.torn = false;
            }
            Err(error) => {
                self.complain(
                    "the access log cannot be opened again; the file opened before is used",
                    &error,
                );
            }
        }
    }

    fn complain(&mut self, what: &str, error: &io::Error) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            self.complained = Some(Instant::now());
            tracing::error!(error = %error, "{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn facts(id: &str) -> Facts {
        Facts::new(id.into())
    }

    fn config(log: &str) -> TelemetryConfig {
        TelemetryConfig { access_log: log.into(), ..TelemetryConfig::default() }
    }

    fn ids(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).expect("a log");
        let id =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["request_id"].clone();
        text.lines().map(|line| id(line).as_str().expect("a name").to_owned()).collect()
    }

    #[test]
    fn lines_are_written_in_order_and_a_moved_file_is_opened_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, moved) = (folder.path().join("log"), folder.path().join("log.1"));
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let log = open(&config(&path.display().to_string()), &metrics).expect("opened");
        for n in 0..500 {
            log.write(&facts(&n.to_string()));
        }
        assert!(log.flush(Duration::from_secs(10)));
        assert_eq!(ids(&path), (0..500).map(|n| n.to_string()).collect::<Vec<_>>());
        assert_eq!(metrics.access_log_lines.get(), 500);
        std::fs::rename(&path, &moved).expect("moved");
        log.reopen();
        log.write(&facts("after"));
        assert!(log.flush(Duration::from_secs(10)));
        assert_eq!((ids(&path), ids(&moved).len()), (vec!["after".to_owned()], 500));
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_told_with_its_setting() {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let error = open(&config("/no/such/folder/log"), &metrics).expect_err("refused");
        assert!(error.contains("telemetry.access_log") && error.contains("/no/such/folder/log"), "{error}");
    }

    #[test]
    fn a_full_device_costs_lines_and_nothing_else() {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let log = open(&config("/dev/full"), &metrics).expect("opened");
        log.write(&facts("a"));
        assert!(log.flush(Duration::from_secs(10)));
        assert_eq!(metrics.access_log_dropped.with_label_values(&["write_error"]).get(), 1);
        assert_eq!(metrics.access_log_lines.get(), 0);
    }

    /// Takes `room` bytes, then fails once, then takes everything.
    struct Short {
        room: usize,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Short {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                self.room = usize::MAX;
                return Err(io::ErrorKind::StorageFull.into());
            }
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            self.written.lock().expect("held by nobody else").extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn after_a_torn_line_the_next_one_is_whole() {
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let mut writer = Writer {
            sink: Box::new(Short { room: 5, written: Arc::clone(&written) }),
            path: None,
            reopen: Arc::default(),
            metrics: Arc::new(Metrics::new().expect("metrics")),
            torn: false,
            complained: None,
        };
        writer.write(&mut b"first line\n".to_vec(), &mut 1);
        writer.write(&mut b"second line\n".to_vec(), &mut 1);
        assert_eq!(&**written.lock().expect("held by nobody else"), b"first\nsecond line\n");
    }

    #[test]
    fn a_writer_that_hangs_holds_nobody_up() {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let (queue, _nobody_reads) = sync_channel(2);
        let open = Open { queue, reopen: Arc::default(), metrics: Arc::clone(&metrics) };
        let log = AccessLog { open: Some(open) };
        for _ in 0..5 {
            log.write(&facts("a"));
        }
        assert_eq!(metrics.access_log_dropped.with_label_values(&["queue_full"]).get(), 3);
        assert!(!log.flush(Duration::from_millis(30)));
    }
}
