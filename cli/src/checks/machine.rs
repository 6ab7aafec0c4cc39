//! Facts of this machine, read from the kernel; nothing here judges.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

/// Free and total bytes of the file system that holds `path`, or that would once it is made.
pub(super) fn disk(path: &Path) -> Option<(u64, u64)> {
    let there = existing(path)?;
    let stat = nix::sys::statvfs::statvfs(&there).ok()?;
    let unit = stat.fragment_size();
    Some((stat.blocks_available() * unit, stat.blocks() * unit))
}

/// The nearest folder above `path` that is there.
pub(super) fn existing(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find(|folder| folder.exists()).map(Path::to_path_buf)
}

/// A number out of a file of the kernel.
pub(super) fn number(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.split_whitespace().next()?.parse().ok()
}

/// Total and available memory, in bytes.
pub(super) fn memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |field: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((kib("MemTotal")? * 1_024, kib("MemAvailable")? * 1_024))
}

/// The kernel's release: "6.1.0-18-amd64".
pub(super) fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The distribution as it calls itself.
pub(super) fn distribution() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("an unnamed system").trim_matches('"').to_owned()
}

/// Soft and hard limit of open files.
pub(super) fn open_files() -> Option<(u64, u64)> {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()
}

/// Why a port cannot be had on all addresses; None: it is free.
pub(super) fn taken(port: u16) -> Option<String> {
    TcpListener::bind(("0.0.0.0", port)).err().map(|error| error.to_string())
}

/// Whether this user can make files in `path`, or where it would be made.
pub(super) fn writable(path: &Path) -> bool {
    existing(path).is_some_and(|folder| {
        nix::unistd::access(&folder, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK).is_ok()
    })
}

/// Where a command is found, as a shell would.
pub(super) fn command(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|file| file.is_file());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}
