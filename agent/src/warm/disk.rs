//! Is there room for a model: asked before it is fetched, and before an engine starts that may fetch it itself.
//!
//! The judgement is pure; the figures come from the file system that holds `warm.models_dir`.

use std::{io, path::Path};

use nix::sys::statvfs::statvfs;
use penstock_config::warm::WarmConfig;

use crate::assignment::EngineSpec;

const GIB: u64 = 1 << 30;

/// The disk of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// The folder.
    pub(crate) folder: String,
    /// What this user may still write.
    pub(crate) free_bytes: u64,
    /// All of it.
    pub(crate) total_bytes: u64,
}

/// Looks at the disk of `folder`.
///
/// # Errors
/// What the system says.
pub(crate) fn look(folder: &str) -> io::Result<Disk> {
    let stat = statvfs(Path::new(folder))?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok(Disk {
        folder: folder.to_owned(),
        free_bytes: bytes(stat.blocks_available()),
        total_bytes: bytes(stat.blocks()),
    })
}

/// Room for a model that is about to be fetched.
///
/// # Errors
/// What is missing, in words.
pub(crate) async fn before_fetch(warm: &WarmConfig, spec: &EngineSpec) -> Result<(), String> {
    let size_gib = spec.warm.prefetch.as_ref().map_or(0, |prefetch| prefetch.size_gib);
    check(warm, &spec.model_path, u64::from(size_gib)).await
}

/// Room for an engine's start: for its model too, where that is not there yet and its size is known.
///
/// # Errors
/// What is missing, in words.
pub(crate) async fn before_start(warm: &WarmConfig, spec: &EngineSpec) -> Result<(), String> {
    if warm.models_dir.is_empty() {
        return Ok(());
    }
    match is_there(&warm.models_dir, &spec.model_path) {
        true => check(warm, &spec.model_path, 0).await,
        false => before_fetch(warm, spec).await,
    }
}

/// Whether the model is a folder of this machine, or in the hub's cache.
pub(crate) fn is_there(models_dir: &str, model_path: &str) -> bool {
    if model_path.starts_with('/') {
        return Path::new(model_path).is_dir();
    }
    let cached = format!("models--{}", model_path.replace('/', "--"));
    ["", "hub"].iter().any(|below| Path::new(models_dir).join(below).join(&cached).is_dir())
}

/// Room to spare, whatever is fetched.
///
/// # Errors
/// What is missing, in words.
pub(crate) async fn room(warm: &WarmConfig) -> Result<(), String> {
    check(warm, "", 0).await
}

async fn check(warm: &WarmConfig, model_path: &str, size_gib: u64) -> Result<(), String> {
    if warm.models_dir.is_empty() {
        return Ok(());
    }
    let folder = warm.models_dir.clone();
    // A mount that hangs must not hold up the others.
    let looked = tokio::task::spawn_blocking(move || look(&folder)).await;
    let disk = match looked {
        Ok(Ok(disk)) => disk,
        Ok(Err(error)) => {
            return Err(format!(
                "the folder {} (warm.models_dir) cannot be looked at: {error}",
                warm.models_dir
            ));
        }
        Err(broken) => {
            return Err(format!("looking at {} (warm.models_dir) broke: {broken}", warm.models_dir));
        }
    };
    judge(&disk, model_path, size_gib, warm.spare_gib)
}

fn judge(disk: &Disk, model_path: &str, size_gib: u64, spare_gib: u64) -> Result<(), String> {
    let needed = size_gib.saturating_add(spare_gib).saturating_mul(GIB);
    let Some(missing) = needed.checked_sub(disk.free_bytes).filter(|missing| *missing > 0) else {
        return Ok(());
    };
    let model = if size_gib == 0 { String::new() } else { format!("{size_gib} GiB for {model_path} and ") };
    Err(format!(
        "the disk of {} (warm.models_dir) has {} free: {model}{spare_gib} GiB to spare (warm.spare_gib) are needed, {} are \
         missing",
        disk.folder,
        gib(disk.free_bytes),
        gib(missing)
    ))
}

/// With one digit, up: 1 byte missing is not 0.0 GiB missing.
fn gib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10).div_ceil(GIB);
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_words() {
        let disk = Disk { folder: "/m".into(), free_bytes: 3 * GIB + GIB / 4, total_bytes: 100 * GIB };
        judge(&disk, "org/x", 2, 1).expect("there is room");
        judge(&disk, "org/x", 0, 3).expect("there is room");
        assert_eq!(
            judge(&disk, "org/x", 15, 1).expect_err("too small"),
            "the disk of /m (warm.models_dir) has 3.3 GiB free: 15 GiB for org/x and 1 GiB to spare (warm.spare_gib) are \
             needed, 12.8 GiB are missing"
        );
        assert!(judge(&disk, "org/x", 0, 4).expect_err("too small").contains("free: 4 GiB to spare"));
        assert!(judge(&disk, "org/x", u64::MAX, 4).is_err(), "no overflow");
    }

    #[tokio::test]
    async fn a_real_folder_is_looked_at_and_one_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap().to_owned();
        let disk = look(&folder).unwrap();
        assert!(disk.total_bytes >= disk.free_bytes && disk.total_bytes > 0);
        let warm = |models_dir: &str| WarmConfig {
            models_dir: models_dir.into(),
            spare_gib: 0,
            ..WarmConfig::default()
        };
        let spec = EngineSpec { model_path: "org/m".into(), ..EngineSpec::default() };
        before_start(&warm(&folder), &spec).await.unwrap();
        before_start(&warm(""), &spec).await.unwrap();
        let error = before_start(&warm("/no/such/folder"), &spec).await.unwrap_err();
        assert!(error.contains("/no/such/folder (warm.models_dir)"), "{error}");
        assert!(!is_there(&folder, "org/m"));
        std::fs::create_dir_all(dir.path().join("hub/models--org--m")).unwrap();
        assert!(is_there(&folder, "org/m") && is_there("", &folder));
    }
}
