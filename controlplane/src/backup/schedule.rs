//! Backups by the clock, in whichever control plane leads.
//!
//! Files are written beside their final name, made durable, and renamed: a name that ends in `.json` is a whole backup.
//! What is due, and what may go, is decided from the names in the folder, so that a restart or another leader with the
//! same folder goes on where the last one was. Files of other names are never touched.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, NaiveDateTime};
use penstock_config::controlplane::BackupConfig;

use super::Backup;
use crate::core::Core;

/// After a failure.
const RETRY: Duration = Duration::from_secs(60);
/// How often the clock is looked at.
const LOOK: Duration = Duration::from_secs(5);
const FORM: &str = "%Y%m%dT%H%M%SZ";

/// A file of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct File {
    made_unix_s: i64,
    name: String,
}

/// The name of a backup's file.
pub fn file_name(backup: &Backup) -> String {
    let made = DateTime::from_timestamp(backup.made_unix_s, 0).unwrap_or_default();
    format!("penstock-{}-r{}.json", made.format(FORM), backup.revision)
}

fn ours(name: &str) -> Option<File> {
    let (made, revision) = name.strip_prefix("penstock-")?.strip_suffix(".json")?.split_once("-r")?;
    let made = NaiveDateTime::parse_from_str(made, FORM).ok()?.and_utc().timestamp();
    revision.parse::<u64>().ok()?;
    Some(File { made_unix_s: made, name: name.to_owned() })
}

/// Which files go: all but the newest `keep`, and the last of each of the newest `keep_days` days that have any.
fn surplus(files: &BTreeSet<File>, keep: usize, keep_days: usize) -> Vec<&File> {
    let newest_first: Vec<&File> = files.iter().rev().collect();
    let mut kept: BTreeSet<&File> = newest_first.iter().take(keep.max(1)).copied().collect();
    let mut days: Vec<i64> = Vec::new();
    for file in &newest_first {
        let day = file.made_unix_s.div_euclid(86_400);
        if days.last() != Some(&day) {
            days.push(day);
            if days.len() <= keep_days {
                kept.insert(file);
            }
        }
    }
    files.iter().filter(|file| !kept.contains(file)).collect()
}

fn list(dir: &Path) -> io::Result<BTreeSet<File>> {
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(dir)? {
        files.extend(entry?.file_name().to_str().and_then(ours));
    }
    Ok(files)
}

/// Writes `backup` into `dir`, durably, and forgets what is not to be kept. Blocks. The size is that of the new file.
fn keep(settings: &BackupConfig, backup: &Backup) -> io::Result<usize> {
    let dir = PathBuf::from(&settings.dir);
    std::fs::create_dir_all(&dir)?;
    let (name, text) = (file_name(backup), backup.to_text());
    let temporary = dir.join(format!(".{name}.{}.new", std::process::id()));
    let written = write(&temporary, text.as_bytes())
        .and_then(|()| std::fs::rename(&temporary, dir.join(&name)))
        .and_then(|()| std::fs::File::open(&dir)?.sync_all());
    if let Err(error) = written {
        drop(std::fs::remove_file(&temporary));
        return Err(error);
    }
    for file in surplus(&list(&dir)?, settings.keep, settings.keep_days) {
        std::fs::remove_file(dir.join(&file.name))?;
    }
    Ok(text.len())
}

/// Readable by its owner alone: it holds hashes of tokens and the environment of engines.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes backups for ever, whenever this control plane leads and one is due.
pub async fn run(core: Arc<Core>) {
    let settings = core.config.backup.clone();
    if settings.dir.is_empty() {
        // Off: this part of the process has nothing to do until its end.
        return std::future::pending().await;
    }
    core.metrics.backup_interval_seconds.set(i64::try_from(settings.every_s).unwrap_or(i64::MAX));
    let mut failed: Option<tokio::time::Instant> = None;
    loop {
        let leads = core.leadership.term().is_some_and(|term| term == core.view().term);
        let pausing = failed.is_some_and(|at| at.elapsed() < RETRY);
        if leads && !pausing && is_due(&core, &settings).await {
            failed = match once(&core, &settings).await {
                Ok(()) => None,
                Err(error) => {
                    core.metrics.backups.with_label_values(&["failed"]).inc();
                    tracing::error!(
                        error,
                        dir = settings.dir,
                        "a backup could not be made; trying again in a minute"
                    );
                    Some(tokio::time::Instant::now())
                }
            };
        }
        tokio::time::sleep(LOOK.min(Duration::from_secs(settings.every_s))).await;
    }
}

/// Also notes when the last one was made, be it by another control plane.
async fn is_due(core: &Core, settings: &BackupConfig) -> bool {
    let dir = PathBuf::from(&settings.dir);
    let listed = tokio::task::spawn_blocking(move || list(&dir)).await;
    // A folder that cannot be listed is told of by the attempt to write into it.
    let newest = listed.ok().and_then(Result::ok).and_then(|files| files.last().map(|file| file.made_unix_s));
    let Some(newest) = newest else { return true };
    core.metrics.backup_last_success.set(newest);
    // A clock that was set back must not put backups off for as long as it was ahead.
    unix_now().abs_diff(newest) >= settings.every_s
}

async fn once(core: &Core, settings: &BackupConfig) -> Result<(), String> {
    let backup = super::take(&*core.store, unix_now()).await.map_err(|e| e.to_string())?;
    let (title, made) = (backup.title(), backup.made_unix_s);
    let kept = settings.clone();
    let written = tokio::task::spawn_blocking(move || keep(&kept, &backup)).await;
    let bytes = written.map_err(|e| e.to_string())?.map_err(|e| format!("{}: {e}", settings.dir))?;
    core.metrics.backups.with_label_values(&["ok"]).inc();
    core.metrics.backup_last_success.set(made);
    core.metrics.backup_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    tracing::info!(bytes, dir = settings.dir, "a backup {title}");
    Ok(())
}

/// Seconds since 1970.
pub fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(now).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(made_unix_s: i64) -> File {
        File { made_unix_s, name: format!("{made_unix_s}") }
    }

    #[test]
    fn names_say_when_and_other_files_are_not_ours() {
        let file = ours("penstock-20231114T221320Z-r40.json").expect("ours");
        assert_eq!(file.made_unix_s, 1_700_000_000);
        for other in [
            "penstock.json",
            "penstock-20231114T221320Z-r40.json.new",
            "penstock-x-r1.json",
            "notes.txt",
            ".penstock-20231114T221320Z-r40.json.7.new",
            "penstock-20231114T221320Z-rx.json",
        ] {
            assert_eq!(ours(other), None, "{other}");
        }
    }

    proptest! {
        /// The newest always stays; of each of the newest days one stays, and it is that day's last.
        #[test]
        fn what_goes_is_never_the_newest_nor_a_days_last(
            times in prop::collection::btree_set(0..2_000_000_i64, 1..60), keep in 0..30_usize, days in 0..20_usize,
        ) {
            let files: BTreeSet<File> = times.iter().copied().map(file).collect();
            let gone: BTreeSet<i64> = surplus(&files, keep, days).iter().map(|f| f.made_unix_s).collect();
            let left: Vec<i64> = times.iter().copied().filter(|at| !gone.contains(at)).collect();
            prop_assert_eq!(left.last(), times.last());
            prop_assert!(left.len() <= keep.max(1) + days);
            let newest: Vec<i64> = times.iter().rev().take(keep.max(1)).copied().collect();
            prop_assert!(newest.iter().all(|at| left.contains(at)));
            let all_days: BTreeSet<i64> = times.iter().map(|at| at / 86_400).collect();
            for day in all_days.iter().rev().take(days) {
                let last = times.iter().rev().find(|at| *at / 86_400 == *day).expect("has one");
                prop_assert!(left.contains(last));
            }
        }
    }

    #[test]
    fn a_backup_is_whole_private_and_replaces_nothing_but_what_is_surplus() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a folder");
        let settings = BackupConfig {
            dir: dir.path().join("made").to_str().expect("UTF-8").into(),
            keep: 2,
            keep_days: 0,
            ..BackupConfig::default()
        };
        let site = super::super::plan::tests::site(40, &[]);
        for at in 0..5 {
            let backup = Backup::of(&site, 1_700_000_000 + at, "test").expect("readable");
            keep(&settings, &backup).expect("kept");
        }
        std::fs::write(Path::new(&settings.dir).join("notes.txt"), "mine").expect("written");
        let names: Vec<_> =
            list(Path::new(&settings.dir)).expect("listed").into_iter().map(|f| f.name).collect();
        assert_eq!(names, ["penstock-20231114T221323Z-r40.json", "penstock-20231114T221324Z-r40.json"]);
        let path = Path::new(&settings.dir).join(&names[1]);
        Backup::read(&std::fs::read(&path).expect("there")).expect("whole");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(Path::new(&settings.dir).join("notes.txt").exists());
        let refused = BackupConfig { dir: path.to_str().expect("UTF-8").into(), ..settings };
        keep(&refused, &Backup::of(&site, 1, "test").expect("readable")).expect_err("a file is no folder");
    }
}
