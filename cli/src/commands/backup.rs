//! `penstock backup` and `penstock restore`.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use penstock_controlplane::backup::{self, Backup, Options, Plan, schedule};
use reqwest::Method;
use serde_json::{Value, json};

use super::{connect, reach};
use crate::{
    api::{ApiError, Ask},
    args::{BackupArgs, RestoreArgs},
    output::{print, say, show, table},
};

pub(super) async fn backup(args: &BackupArgs) -> Result<(), ApiError> {
    let text = match &args.offline {
        Some(store) => {
            let taken = backup::offline::take(store, schedule::unix_now()).await;
            taken.map_err(|e| ApiError::Found(e.to_string()))?.to_text().into_bytes()
        }
        None => reach(&args.server)?.document(&["api", "v2", "backup"]).await?,
    };
    // What came over the network is read back as a restore would read it: a backup that cannot be restored is none.
    let made = Backup::read(&text).map_err(|refused| ApiError::Malformed {
        call: "GET /api/v2/backup".into(),
        message: refused.to_string(),
    })?;
    let file = args.file.clone().unwrap_or_else(|| schedule::file_name(&made).into());
    if file == Path::new("-") {
        return Ok(print(&String::from_utf8_lossy(&text))?);
    }
    write(&file, &text).map_err(|error| {
        ApiError::Output(io::Error::new(error.kind(), format!("{}: {error}", file.display())))
    })?;
    say(&format!("wrote {}: a backup {}", file.display(), made.title()));
    Ok(())
}

/// Whole or not at all, for its owner alone: it holds hashes of tokens and the environment of engines.
fn write(file: &Path, text: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = Path::new(&name);
    let mut options = fs::OpenOptions::new();
    let written =
        options.write(true).create(true).truncate(true).mode(0o600).open(temporary).and_then(|mut out| {
            out.write_all(text)?;
            out.sync_all()?;
            fs::rename(temporary, file)
        });
    if written.is_err() {
        drop(fs::remove_file(temporary));
    }
    written
}

pub(super) async fn restore(args: &RestoreArgs) -> Result<(), ApiError> {
    let text = fs::read(&args.file)
        .map_err(|error| ApiError::Usage(format!("cannot read {}: {error}", args.file.display())))?;
    // Refused here already, with the file's name; the control plane checks again.
    let from = Backup::read(&text).map_err(|refused| {
        ApiError::Usage(format!("{}: {refused}; nothing was changed", args.file.display()))
    })?;
    let done = match &args.offline {
        Some(store) => offline(args, store, &from).await?,
        None => online(args, &text).await?,
    };
    show(args.remote.output, &done, || story(&from, &done, args.dry_run))?;
    Ok(())
}

async fn online(args: &RestoreArgs, text: &[u8]) -> Result<Value, ApiError> {
    let body: Value = serde_json::from_slice(text).map_err(|e| ApiError::Usage(e.to_string()))?;
    let flags = [
        ("dry_run", args.dry_run),
        ("force", args.force),
        ("only_missing", args.only_missing),
        ("without_placements", args.without_placements),
    ];
    let set = flags.into_iter().filter(|(_, set)| *set);
    let query: Vec<(&str, String)> = set.map(|(flag, _)| (flag, "true".to_owned())).collect();
    let ask = Ask { query: &query, headers: &[], body: Some(&body) };
    connect(&args.remote)?.ask(Method::POST, &["api", "v2", "restore"], &ask).await
}

async fn offline(args: &RestoreArgs, store: &Path, from: &Backup) -> Result<Value, ApiError> {
    let options = Options {
        force: args.force,
        only_missing: args.only_missing,
        without_placements: args.without_placements,
        // Its settings are not at hand, and are there to be changed.
        admin_in_settings: true,
    };
    let done = backup::offline::restore(store, from, options, args.dry_run, schedule::unix_now()).await;
    let Plan { changes, refusals, into_empty, .. } = done.map_err(|e| ApiError::Found(e.to_string()))?;
    if !refusals.is_empty() && !args.dry_run {
        return Err(ApiError::Found(format!(
            "nothing was changed, because what is there would go back or end:\n  {}\n--only-missing adds what is missing \
             and leaves the rest; --force does all of it",
            refusals.join("\n  ")
        )));
    }
    Ok(json!({ "dry_run": args.dry_run, "into_empty": into_empty, "changes": changes, "refusals": refusals }))
}

fn story(from: &Backup, done: &Value, dry_run: bool) -> String {
    let list = |key: &str| done.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let changes = list("changes");
    let count = |what: &str| changes.iter().filter(|change| text(change, "what") == what).count();
    let mut out = format!(
        "{} {}\n{} to add, {} to change, {} to delete, {} kept as they are, {} unchanged\n",
        if dry_run { "would restore the backup" } else { "restored the backup" },
        from.title(),
        count("add"),
        count("change"),
        count("delete"),
        count("keep"),
        count("unchanged"),
    );
    let rows = changes.iter().filter(|change| text(change, "what") != "unchanged").map(|change| {
        [
            text(change, "kind").replace('_', " "),
            text(change, "name"),
            text(change, "what"),
            text(change, "detail"),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        out += &table(["KIND", "NAME", "WHAT", "DETAIL"], rows);
    }
    if !list("refusals").is_empty() {
        out += "this takes --force, or --only-missing to leave what is there\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use penstock_controlplane::backup::{
        document::Kind,
        plan::{Change, What},
    };

    use super::*;

    #[test]
    fn a_restore_is_told_thing_by_thing() {
        let change = Change {
            kind: Kind::NodePolicy,
            name: "n1".into(),
            what: What::Delete,
            detail: "it is not in the backup, and would go".into(),
        };
        let site = penstock_controlplane::store::Listing { entries: Vec::new(), revision: 3 };
        let from = Backup::of(&site, 0, "0.1.0").unwrap();
        let told = story(&from, &json!({"changes": [change], "refusals": ["x"]}), true);
        for part in
            ["would restore", "1 to delete", "node policy  n1    delete  it is not in the backup", "--force"]
        {
            assert!(told.contains(part), "{part} missing in\n{told}");
        }
    }

    #[test]
    fn a_backup_that_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("b.json");
        write(&file, b"{}").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"{}");
        write(&dir.path().join("none/b.json"), b"{}").unwrap_err();
        write(dir.path(), b"{}").unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
