//! The last accepted state on disk, so that a proxy can start and serve while no control plane is up.
//!
//! The file is one line of header (`penstock-xds-cache FORMAT SHA256 LENGTH`) and a protobuf body: a torn, cut or edited file
//! is told from a whole one before anything in it is believed, and a later format from this one. A file that is not
//! whole is set aside as `.corrupt` for whoever wants to know, and the proxy starts empty: waiting for a control
//! plane is right then, guessing is not. What is read is checked as if it came over the wire.
//!
//! Writing is atomic (temporary file, fsync, rename, fsync of the directory) and off the hot path: [`write_behind`]
//! writes the newest state at most once per interval, however many came.

#[cfg(test)]
mod tests;

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use penstock_proto::{
    Version,
    xds::{Any, ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE, Resource},
};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::xds::{state::XdsState, status::XdsStatus};

const MAGIC: &str = "penstock-xds-cache";
const FORMAT: u32 = 1;

/// Largest file read, in bytes: 10,000 endpoints are about 1 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// What came of reading the file. Already logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadOutcome {
    /// There is none: a first start.
    Absent,
    /// It was whole and its content was accepted.
    Loaded,
    /// It was not, and was set aside.
    Corrupt {
        /// What was wrong.
        reason: String,
        /// Where it is now; `None` if it could not be renamed.
        kept_as: Option<PathBuf>,
    },
    /// It could not be read; it was left in place.
    Unreadable {
        /// The operating system's word.
        reason: String,
    },
}

/// The state to start with.
#[derive(Debug)]
pub struct Loaded {
    /// Empty unless the outcome is [`LoadOutcome::Loaded`].
    pub state: XdsState,
    /// How that came about.
    pub outcome: LoadOutcome,
}

/// The state could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the last good state to {}: {source}", path.display())]
pub struct CacheError {
    /// The file.
    pub path: PathBuf,
    /// What failed.
    pub source: io::Error,
}

/// The body of the file.
#[derive(Clone, PartialEq, Message)]
struct Contents {
    #[prost(message, optional, tag = "1")]
    tables: Option<Stored>,
    #[prost(message, optional, tag = "2")]
    routes: Option<Stored>,
}

/// Resources of one type.
#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(uint64, tag = "1")]
    term: u64,
    #[prost(uint64, tag = "2")]
    revision: u64,
    #[prost(message, repeated, tag = "3")]
    resources: Vec<Resource>,
}

/// Reads the state that [`save`] wrote. Never fails: whatever is wrong is logged and named in the outcome.
#[must_use]
pub fn load(path: &Path) -> Loaded {
    let outcome = match read(path) {
        Ok(bytes) => match decode(&bytes) {
            Ok(state) => {
                tracing::info!(path = %path.display(), version = %state.version(), models = state.routes().len(),
                    "starting from the last good state on disk");
                return Loaded { state, outcome: LoadOutcome::Loaded };
            }
            Err(reason) => {
                let aside = with_suffix(path, ".corrupt");
                let kept_as = fs::rename(path, &aside).is_ok().then_some(aside);
                tracing::warn!(path = %path.display(), kept_as = ?kept_as, reason,
                    "the last good state on disk is unusable; starting empty");
                LoadOutcome::Corrupt { reason, kept_as }
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => LoadOutcome::Absent,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read the last good state; starting empty");
            LoadOutcome::Unreadable { reason: error.to_string() }
        }
    };
    Loaded { state: XdsState::default(), outcome }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let length = fs::metadata(path)?.len();
    if length > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it has {length} bytes; at most {MAX_FILE_BYTES} are read")));
    }
    fs::read(path)
}

/// Writes `state` so that a reader finds either the old file or the new one, whole. Makes the folder if needed.
///
/// # Errors
/// The first step that failed; the old file is then still there.
pub fn save(path: &Path, state: &XdsState) -> Result<(), CacheError> {
    let failed = |source| CacheError { path: path.to_owned(), source };
    replace(path, &encode(state)).map_err(failed)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = with_suffix(path, ".tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()
}

/// Keeps the file up to date with `states` until `shutdown`, and writes what is unwritten then. The value that was
/// there when `states` was subscribed is not written: it came from the file. Incomplete states are not written.
/// A failure is logged once per spell and tried again every `min_interval`.
pub async fn write_behind(
    path: PathBuf,
    mut states: watch::Receiver<Arc<XdsState>>,
    min_interval: Duration,
    status: Arc<XdsStatus>,
    shutdown: CancellationToken,
) {
    let (mut failing, mut unwritten) = (false, false);
    loop {
        if !unwritten {
            tokio::select! {
                biased; // What is unwritten when the shutdown comes is written first.
                changed = states.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
        }
        let state = Arc::clone(&states.borrow_and_update());
        unwritten = state.is_complete() && !write(path.clone(), state, &status, &mut failing).await;
        if unwritten && shutdown.is_cancelled() {
            return;
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(min_interval) => {}
        }
    }
}

/// Whether it was written; logs when that changes.
async fn write(path: PathBuf, state: Arc<XdsState>, status: &XdsStatus, failing: &mut bool) -> bool {
    let result = match tokio::task::spawn_blocking(move || save(&path, &state)).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(format!("the task that writes the last good state failed: {error}")),
    };
    status.cached(result.is_ok());
    match &result {
        Err(error) if !*failing => {
            tracing::warn!(error, "a restart without control plane would not know this state")
        }
        Ok(()) if *failing => tracing::info!("the last good state is on disk again"),
        _ => {}
    }
    *failing = result.is_err();
    result.is_ok()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn encode(state: &XdsState) -> Vec<u8> {
    fn resource(name: &str, version: &str, type_url: &str, value: Vec<u8>) -> Resource {
        Resource {
            name: name.to_owned(),
            version: version.to_owned(),
            resource: Some(Any { type_url: type_url.to_owned(), value }),
            ..Default::default()
        }
    }
    let stored = |version: Option<Version>, resources| {
        version.map(|Version { term, revision }| Stored { term, revision, resources })
    };
    let tables = state
        .tables()
        .iter()
        .map(|(name, table)| resource(name, &table.version, ENDPOINT_TABLE_TYPE, table.value.encode()));
    let routes = state
        .routes()
        .iter()
        .map(|(name, route)| resource(name, &route.version, MODEL_ROUTE_TYPE, route.value.encode_to_vec()));
    let contents = Contents {
        tables: stored(state.tables_version(), tables.collect()),
        routes: stored(state.routes_version(), routes.collect()),
    };
    let body = contents.encode_to_vec();
    let mut file = format!("{MAGIC} {FORMAT} {:x} {}\n", Sha256::digest(&body), body.len()).into_bytes();
    file.extend_from_slice(&body);
    file
}

fn decode(file: &[u8]) -> Result<XdsState, String> {
    let end = memchr::memchr(b'\n', file).ok_or("it has no header line")?;
    let (header, body) = file.split_at(end);
    let body = body.get(1..).unwrap_or_default();
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    let fields: Vec<&str> = header.split(' ').collect();
    let [MAGIC, format, checksum, length] = fields[..] else {
        return Err(format!("its header is not \"{MAGIC} FORMAT SHA256 LENGTH\""));
    };
    if format != FORMAT.to_string() {
        return Err(format!("its format is {format}; this version reads {FORMAT}"));
    }
    if length != body.len().to_string() {
        return Err(format!("it should hold {length} bytes behind its header and holds {}", body.len()));
    }
    if checksum != format!("{:x}", Sha256::digest(body)) {
        return Err("its checksum does not match its content".to_owned());
    }
    let contents =
        Contents::decode(body).map_err(|error| format!("its content cannot be decoded: {error}"))?;
    let family = |stored: Option<Stored>| match stored {
        Some(Stored { term, revision, resources }) => (Some(Version { term, revision }), resources),
        None => (None, Vec::new()),
    };
    XdsState::restore(family(contents.tables), family(contents.routes)).map_err(|reasons| reasons.join("; "))
}
