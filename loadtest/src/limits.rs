//! Open files: thousands of streams need more than a shell allows.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What is asked for: enough for tens of thousands of streams, with a connection on either side of each.
const WANTED: u64 = 1 << 17;

/// Allows this process, and those that it starts, as many open files as may be had: [`WANTED`] for root, else the hard
/// limit. Gives the limit that holds now.
pub(crate) fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    if soft >= WANTED {
        return soft;
    }
    let raised = WANTED.max(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, raised, raised).is_ok() {
        raised
    } else if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        hard
    } else {
        soft
    }
}
