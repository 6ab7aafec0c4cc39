//! The document: what is in it, how it is written, and how one that cannot be trusted is refused.

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    access::StoredToken,
    leadership::number,
    model::{Deployment, NodePolicy, Placement, Route, desired::Drain, revisions::History, validate},
    store::{Entry, Listing, Revision, StoreError, keys, schema},
};

/// Version of the document's form.
pub const FORMAT: u64 = 1;

/// What a key in a backup stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// What an operator says of a node.
    NodePolicy,
    /// What is wanted of a model.
    Deployment,
    /// What was wanted of it.
    Revisions,
    /// Where its replicas belong.
    Placement,
    /// An operator's drain of one replica.
    Drain,
    /// Where a name leads.
    Route,
    /// A token's hash and role.
    Token,
}

/// Every kind with its prefix, in the order in which they are restored.
const KINDS: [(Kind, &str); 7] = [
    (Kind::NodePolicy, keys::NODE_POLICIES),
    (Kind::Deployment, keys::DEPLOYMENTS),
    (Kind::Revisions, keys::REVISIONS),
    (Kind::Placement, keys::PLACEMENTS),
    (Kind::Drain, keys::DRAINS),
    (Kind::Route, keys::ROUTES),
    (Kind::Token, keys::TOKENS),
];

impl Kind {
    /// What a key stands for; None: it is not part of a backup.
    pub fn of(key: &str) -> Option<Self> {
        KINDS.into_iter().find(|(_, prefix)| key.starts_with(prefix)).map(|(kind, _)| kind)
    }

    /// As in sentences.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NodePolicy => "node policy",
            Self::Deployment => "deployment",
            Self::Revisions => "revisions",
            Self::Placement => "placement",
            Self::Drain => "drain",
            Self::Route => "route",
            Self::Token => "token",
        }
    }
}

/// One key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// The key, without the site's prefix.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// Revision of its last write.
    pub mod_revision: Revision,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backup {
    /// [`FORMAT`].
    pub penstock_backup: u64,
    /// SHA-256 of this document, in hexadecimal, with this field empty and written without blanks.
    pub checksum: String,
    /// When it was made, in Unix seconds.
    pub made_unix_s: i64,
    /// The release that made it.
    pub made_by: String,
    /// The version of the store's layout.
    pub schema: u64,
    /// The term as peers knew it.
    pub term: u64,
    /// The store's revision at which everything was read.
    pub revision: Revision,
    /// The last generation given out.
    pub generation: u64,
    /// Where the audit chain stood: the value of its head; null without one.
    pub audit: Value,
    /// Every key, in order.
    pub entries: Vec<Kept>,
}

/// Why a document is not restored. Nothing was changed, and the document is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this backup is refused: {0}")]
pub struct Refused(pub String);

/// A counter of the store; 0 if it is not there.
pub(super) fn counter(listing: &Listing, key: &str) -> Result<u64, StoreError> {
    find(listing, key).map_or(Ok(0), |entry| number(&entry.value, key))
}

/// The term as peers know it.
pub(super) fn term(listing: &Listing) -> Result<u64, StoreError> {
    let own = find(listing, keys::TERM).map_or(0, |entry| entry.mod_revision);
    Ok(own + counter(listing, keys::TERM_BASE)?)
}

pub(super) fn find<'a>(listing: &'a Listing, key: &str) -> Option<&'a Entry> {
    listing.entries.iter().find(|entry| entry.key == key)
}

pub(super) fn json(entry: &Entry) -> Result<Value, StoreError> {
    serde_json::from_slice(&entry.value)
        .map_err(|e| StoreError::Open(format!("the store's key {} cannot be read: {e}", entry.key)))
}

impl Backup {
    /// What is to be kept of a store.
    ///
    /// # Errors
    /// [`StoreError::Open`] if a value cannot be read.
    pub fn of(listing: &Listing, made_unix_s: i64, made_by: &str) -> Result<Self, StoreError> {
        let mut entries = Vec::new();
        for entry in listing.entries.iter().filter(|entry| Kind::of(&entry.key).is_some()) {
            let (key, mod_revision) = (entry.key.clone(), entry.mod_revision);
            entries.push(Kept { key, value: json(entry)?, mod_revision });
        }
        let mut backup = Self {
            penstock_backup: FORMAT,
            checksum: String::new(),
            made_unix_s,
            made_by: made_by.to_owned(),
            schema: counter(listing, keys::SCHEMA)?,
            term: term(listing)?,
            revision: listing.revision,
            generation: counter(listing, keys::GENERATION)?,
            audit: find(listing, keys::AUDIT_HEAD).map_or(Ok(Value::Null), json)?,
            entries,
        };
        backup.checksum = backup.sum();
        Ok(backup)
    }

    fn sum(&self) -> String {
        let bare = Self { checksum: String::new(), ..self.clone() };
        let text = serde_json::to_vec(&bare).unwrap_or_default();
        Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// As it is kept: one key in a line, so that two backups can be compared with everyday tools.
    pub fn to_text(&self) -> String {
        let whole = serde_json::to_value(self).unwrap_or_default();
        let mut out = String::from("{\n");
        for (name, value) in whole.as_object().into_iter().flatten() {
            match value.as_array().filter(|_| name == "entries") {
                None => out.push_str(&format!("{}: {value},\n", Value::from(name.as_str()))),
                Some(entries) => {
                    let lines: Vec<String> = entries.iter().map(|entry| format!("  {entry}")).collect();
                    out.push_str(&format!("\"entries\": [\n{}\n]\n", lines.join(",\n")));
                }
            }
        }
        out + "}\n"
    }

    /// Reads a document, in any layout of its JSON.
    ///
    /// # Errors
    /// [`Refused`]: it is no backup, a newer one, damaged, or says what cannot be.
    pub fn read(text: &[u8]) -> Result<Self, Refused> {
        let value = validate::json(text).map_err(|error| {
            Refused(format!("it is not JSON ({error}); a copy that was cut off looks like this"))
        })?;
        let format = value.get("penstock_backup").ok_or_else(|| {
            Refused("it is JSON, but no backup: the field penstock_backup is missing".into())
        })?;
        match format.as_u64() {
            Some(FORMAT) => {}
            Some(newer) if newer > FORMAT => {
                return Err(Refused(format!(
                    "it has form {newer}, and this build reads {FORMAT}: use the release that made it, or a newer one"
                )));
            }
            _ => {
                return Err(Refused(format!(
                    "its penstock_backup is {format}, which is no form of a backup"
                )));
            }
        }
        let backup: Self =
            serde_json::from_value(value).map_err(|error| Refused(format!("it is not whole: {error}")))?;
        if backup.sum() != backup.checksum {
            return Err(Refused(
                "its checksum does not fit what it says: it was damaged or changed by hand; take another copy".into(),
            ));
        }
        if backup.schema > schema::CURRENT {
            return Err(Refused(format!(
                "its schema version is {}, and this build reads versions up to {}: use a release that is at least as \
                 new as {}, which made it",
                backup.schema,
                schema::CURRENT,
                backup.made_by
            )));
        }
        let backup = backup.brought_up()?;
        backup.entries.iter().try_for_each(check)?;
        Ok(backup)
    }

    /// The same with the present layout.
    fn brought_up(mut self) -> Result<Self, Refused> {
        if self.schema == schema::CURRENT {
            return Ok(self);
        }
        let entry = |kept: &Kept| Entry {
            key: kept.key.clone(),
            value: Bytes::from(kept.value.to_string()),
            create_revision: kept.mod_revision,
            mod_revision: kept.mod_revision,
            version: 1,
            lease: 0,
        };
        let before: Vec<Entry> = self.entries.iter().map(entry).collect();
        let after = schema::brought_up(self.schema, before).map_err(|error| Refused(error.to_string()))?;
        let kept = |entry: Entry| {
            let value = json(&entry).map_err(|error| Refused(error.to_string()))?;
            Ok(Kept { key: entry.key, value, mod_revision: entry.mod_revision })
        };
        self.entries = after.into_iter().map(kept).collect::<Result<_, Refused>>()?;
        Ok(self)
    }

    /// What a sentence calls it.
    pub fn title(&self) -> String {
        let made = chrono::DateTime::from_timestamp(self.made_unix_s, 0);
        let made = made.map(|at| at.format("%Y-%m-%d %H:%M:%S UTC").to_string()).unwrap_or_default();
        format!(
            "of {made}, revision {}, {} keys, made by {}",
            self.revision,
            self.entries.len(),
            self.made_by
        )
    }
}

/// Whether an entry says what its key says, in a form that can be read.
fn check(kept: &Kept) -> Result<(), Refused> {
    let Some(kind) = Kind::of(&kept.key) else {
        return Err(Refused(format!("its key {:?} is of no kind that backups hold", kept.key)));
    };
    let key = match kind {
        Kind::NodePolicy => keys::node_policy(&typed::<NodePolicy>(kept)?.node_id),
        Kind::Deployment => keys::deployment(&typed::<Deployment>(kept)?.model),
        Kind::Revisions => keys::revisions(&typed::<History>(kept)?.model),
        Kind::Placement => keys::placement(&typed::<Placement>(kept)?.model),
        Kind::Route => keys::route(&typed::<Route>(kept)?.name),
        Kind::Drain => {
            let drain: Drain = typed(kept)?;
            keys::drain(&drain.model, &drain.replica_id)
        }
        Kind::Token => keys::token(&typed::<StoredToken>(kept)?.name),
    };
    match key == kept.key {
        true => Ok(()),
        false => Err(Refused(format!("its key {:?} holds what belongs to {key:?}", kept.key))),
    }
}

/// The value of an entry.
pub(super) fn typed<T: DeserializeOwned>(kept: &Kept) -> Result<T, Refused> {
    serde_json::from_value(kept.value.clone())
        .map_err(|error| Refused(format!("what it says at {:?} cannot be read: {error}", kept.key)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::plan::tests::site, *};

    fn backup() -> Backup {
        let site = site(
            40,
            &[(
                "/deployments/m",
                7,
                json!({"model": "m", "replicas": 2, "engine": "sim",
            "model_path": "p", "gpus_per_replica": 1, "created_unix_s": 5}),
            )],
        );
        Backup::of(&site, 1_700_000_000, "0.1.0").expect("readable")
    }

    #[test]
    fn what_is_written_reads_back_in_any_layout() {
        let backup = backup();
        assert_eq!((backup.revision, backup.generation, backup.entries.len()), (40, 9, 1));
        assert_eq!(Backup::read(backup.to_text().as_bytes()), Ok(backup.clone()));
        let pretty = serde_json::to_string_pretty(&backup).expect("serializes");
        assert_eq!(Backup::read(pretty.as_bytes()), Ok(backup.clone()));
        assert!(backup.title().contains("2023-11-14"), "{}", backup.title());
    }

    #[test]
    fn what_is_cut_off_changed_newer_or_something_else_is_refused_in_words() {
        let text = backup().to_text();
        for end in 0..text.trim_end().len() {
            Backup::read(&text.as_bytes()[..end]).expect_err("cut off");
        }
        let other = |change: &dyn Fn(&mut Backup)| {
            let mut backup = backup();
            change(&mut backup);
            backup.checksum = backup.sum();
            Backup::read(backup.to_text().as_bytes()).expect_err("refused").to_string()
        };
        let changed = text.replace("\"replicas\":2", "\"replicas\":3");
        for (error, part) in [
            (Backup::read(changed.as_bytes()).expect_err("changed").to_string(), "checksum does not fit"),
            (Backup::read(b"{}").expect_err("other").to_string(), "no backup"),
            (Backup::read(b"PK\x03\x04").expect_err("other").to_string(), "not JSON"),
            (other(&|b| b.penstock_backup = 2), "it has form 2, and this build reads 1"),
            (other(&|b| b.schema = 99), "schema version is 99"),
            (other(&|b| b.entries[0].key = "/endpoints/m/0".into()), "of no kind"),
            (other(&|b| b.entries[0].key = "/deployments/x".into()), "belongs to \"/deployments/m\""),
            (other(&|b| b.entries[0].value = json!({"model": "m"})), "cannot be read: missing field"),
        ] {
            assert!(error.starts_with("this backup is refused: ") && error.contains(part), "{part}: {error}");
        }
    }
}
