//! What a restore would do to a site, decided before anything is written. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use super::{
    GAP,
    document::{self, Backup, Kept, Kind, Refused, typed},
};
use crate::{
    access::{StoredToken, keeps_an_admin},
    model::{Deployment, RegisteredEndpoint, revisions::History},
    store::{Compare, Entry, Listing, StoreError, Txn, Write, keys},
};

/// How far a restore may go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Also change and delete what is there.
    pub force: bool,
    /// Add what is missing, and leave what is there as it is.
    pub only_missing: bool,
    /// Every replica is placed anew: for a site with other machines.
    pub without_placements: bool,
    /// The control plane's settings name an admin's token.
    pub admin_in_settings: bool,
}

/// What becomes of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// It is missing, and comes back.
    Add,
    /// It is there as it was.
    Unchanged,
    /// It becomes what it was.
    Change,
    /// It was not there then, and goes.
    Delete,
    /// It differs, and stays as it is.
    Keep,
}

/// One thing that a backup or the site has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// What becomes of it.
    pub what: What,
    /// In words: what differs, and what it means for what serves; may be empty.
    pub detail: String,
}

/// What a restore would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Thing by thing, those of one kind together.
    pub changes: Vec<Change>,
    /// Why it must be forced; empty: it need not be.
    pub refusals: Vec<String>,
    /// To be committed in this order. Each compares what this plan was made from, and each leaves a site that makes sense.
    pub txns: Vec<Txn>,
    /// Nothing was wanted of the site yet.
    pub into_empty: bool,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The backup's fault.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The site's.
    #[error("{0}")]
    Site(#[from] StoreError),
}

/// Writes in one transaction: etcd takes 128.
const WRITES: usize = 90;
/// Bytes in one transaction: etcd takes 1.5 MiB.
const BYTES: usize = 1 << 20;

/// Decides what restoring `backup` into `site` does.
///
/// # Errors
/// [`PlanError`]: what is in the backup, or in the site, cannot be read.
pub fn plan(site: &Listing, backup: &Backup, options: Options, now_unix_s: i64) -> Result<Plan, PlanError> {
    let there: BTreeMap<&str, &Entry> = site.entries.iter().map(|e| (e.key.as_str(), e)).collect();
    let wanted = |key: &str| Kind::of(key).is_some_and(|kind| !matches!(kind, Kind::Token | Kind::Drain));
    let into_empty = !there.keys().any(|key| wanted(key));
    let mut planner = Planner {
        serving: serving(site)?,
        from_same: site.revision >= backup.revision && document::term(site)? >= backup.term,
        backup_revision: backup.revision,
        options,
        there,
        into_empty,
        now_unix_s,
        plan: Plan { into_empty, ..Plan::default() },
        groups: Vec::new(),
    };
    let kept: BTreeMap<&str, &Kept> = backup.entries.iter().map(|kept| (kept.key.as_str(), kept)).collect();
    planner.all(&kept)?;
    planner.keeps_an_admin(&kept)?;
    let counters = planner.counters(site, backup)?;
    let mut plan = planner.plan;
    plan.changes.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    plan.txns = packed(counters, planner.groups);
    Ok(plan)
}

/// Registered endpoints by model.
fn serving(site: &Listing) -> Result<BTreeMap<String, usize>, StoreError> {
    let mut serving = BTreeMap::new();
    for entry in site.entries.iter().filter(|entry| entry.key.starts_with(keys::ENDPOINTS)) {
        let endpoint: RegisteredEndpoint = serde_json::from_slice(&entry.value)
            .map_err(|e| StoreError::Open(format!("the store's key {} cannot be read: {e}", entry.key)))?;
        *serving.entry(endpoint.model).or_default() += 1;
    }
    Ok(serving)
}

struct Planner<'a> {
    there: BTreeMap<&'a str, &'a Entry>,
    serving: BTreeMap<String, usize>,
    /// The site goes on from where the backup was made, as far as can be told.
    from_same: bool,
    backup_revision: u64,
    options: Options,
    into_empty: bool,
    now_unix_s: i64,
    plan: Plan,
    /// What belongs into one transaction.
    groups: Vec<Txn>,
}

impl Planner<'_> {
    fn all(&mut self, kept: &BTreeMap<&str, &Kept>) -> Result<(), PlanError> {
        let there: Vec<&str> = self.there.keys().copied().collect();
        let keys: BTreeSet<&str> = kept.keys().copied().chain(there).collect();
        for kind in [Kind::NodePolicy, Kind::Deployment, Kind::Route, Kind::Token] {
            for key in keys.iter().filter(|key| Kind::of(key) == Some(kind)) {
                self.one(kind, key, kept)?;
            }
        }
        Ok(())
    }

    /// One thing that people decided; with a deployment goes what belongs to it.
    fn one(&mut self, kind: Kind, key: &str, kept: &BTreeMap<&str, &Kept>) -> Result<(), PlanError> {
        let now = self.there.get(key).map(|entry| document::json(entry)).transpose()?;
        let then = kept.get(key).map(|kept| &kept.value);
        let name = name(kind, key, then.or(now.as_ref()));
        // Tokens come back into an empty site alone: elsewhere one that is missing may have been revoked.
        let as_it_is = self.options.only_missing || (kind == Kind::Token && !self.options.force);
        let (what, detail) = match (&now, then) {
            (None, None) => return Ok(()),
            (Some(now), Some(then)) if now == then => (What::Unchanged, String::new()),
            (None, Some(_)) if kind == Kind::Token && !self.into_empty && !self.options.force => {
                (What::Keep, "it is not there; it may have been revoked since, so it takes --force".into())
            }
            (None, Some(_)) => (What::Add, String::new()),
            (Some(_), None) if kind == Kind::Token => (What::Keep, "it is newer than the backup".into()),
            (Some(now), Some(then)) => {
                let what = if as_it_is { What::Keep } else { What::Change };
                (what, self.meaning(kind, &name, key, now, Some(then)))
            }
            (Some(now), None) => {
                let what = if as_it_is { What::Keep } else { What::Delete };
                (what, self.meaning(kind, &name, key, now, None))
            }
        };
        if matches!(what, What::Change | What::Delete) && !self.options.force {
            self.plan.refusals.push(format!("{} {name:?}: {detail}", kind.as_str()));
        }
        let mut txn = self.write(Txn::new(), what, key, then);
        if kind == Kind::Deployment && !txn.writes.is_empty() {
            txn = self.with_its_own(txn, what, &name, kept)?;
        }
        if !txn.writes.is_empty() {
            self.groups.push(txn);
        }
        self.plan.changes.push(Change { kind, name, what, detail });
        Ok(())
    }

    fn write(&self, txn: Txn, what: What, key: &str, then: Option<&Value>) -> Txn {
        let at = self.there.get(key).map_or(0, |entry| entry.mod_revision);
        let txn = match (what, then) {
            (What::Add | What::Change, Some(then)) => txn.put(key, then.to_string()),
            (What::Delete, _) => txn.delete(key),
            _ => return txn,
        };
        txn.when(Compare::ModRevision(key.to_owned(), at))
    }

    /// A deployment's revisions always; where its replicas are, and their drains, only into an empty site: in any other
    /// their GPUs may have been given to others.
    fn with_its_own(
        &mut self,
        mut txn: Txn,
        what: What,
        model: &str,
        kept: &BTreeMap<&str, &Kept>,
    ) -> Result<Txn, PlanError> {
        let key = keys::revisions(model);
        let (now, then) = (self.there.get(key.as_str()), kept.get(key.as_str()));
        match (what, now, then) {
            (What::Delete, Some(_), _) => txn = self.write(txn, What::Delete, &key, None),
            (What::Add, None, Some(then)) => txn = self.write(txn, What::Add, &key, Some(&then.value)),
            // Going back is a change like any other: it is the newest revision.
            (What::Change, Some(entry), _) => {
                let history: History = serde_json::from_value(document::json(entry)?)
                    .map_err(|e| StoreError::Open(format!("the store's key {key} cannot be read: {e}")))?;
                let deployed = kept.get(keys::deployment(model).as_str()).copied();
                let deployed = deployed.map(typed::<Deployment>).transpose()?;
                let next = deployed.and_then(|d| history.with(&d, None, self.now_unix_s));
                let next = next.and_then(|next| serde_json::to_value(next).ok());
                txn = self.write(txn, What::Change, &key, next.as_ref());
            }
            _ => {}
        }
        if !self.into_empty || self.options.without_placements {
            return Ok(txn);
        }
        let key = keys::placement(model);
        let Some(placement) = kept.get(key.as_str()) else { return Ok(txn) };
        txn = self.write(txn, What::Add, &key, Some(&placement.value));
        let drains = format!("{}{}/", keys::DRAINS, keys::encode(model));
        for (key, drain) in kept.range(drains.as_str()..).take_while(|(key, _)| key.starts_with(&drains)) {
            txn = self.write(txn, What::Add, key, Some(&drain.value));
        }
        Ok(txn)
    }

    /// In words: what going back means.
    fn meaning(&self, kind: Kind, name: &str, key: &str, now: &Value, then: Option<&Value>) -> String {
        let at = self.there.get(key).map_or(0, |entry| entry.mod_revision);
        let newer = self.from_same && at > self.backup_revision;
        let mut text = match (newer, then) {
            (true, Some(_)) => format!(
                "it was changed at revision {at}, after this backup (revision {}), and would go back",
                self.backup_revision
            ),
            (true, None) => format!(
                "it was made after this backup (at revision {at}; the backup is of {}), and would go",
                self.backup_revision
            ),
            (false, Some(_)) => "it differs from the backup's, and would become that".to_owned(),
            (false, None) => "it is not in the backup, and would go".to_owned(),
        };
        let serving = self.serving.get(name).copied().unwrap_or(0);
        if kind != Kind::Deployment || serving == 0 {
            return text;
        }
        let replicas = |value: &Value| value.get("replicas").and_then(Value::as_u64).unwrap_or(0);
        let bare = |value: &Value| {
            let fields = value.as_object().into_iter().flatten();
            let others = ["replicas", "created_unix_s", "policy"];
            let engine = fields.filter(|(field, _)| !others.contains(&field.as_str()));
            engine.map(|(field, value)| (field.clone(), value.clone())).collect::<BTreeMap<_, _>>()
        };
        match then {
            None => text.push_str(&format!("; its {serving} serving endpoints would end")),
            Some(then) => {
                if bare(now) != bare(then) {
                    text.push_str(&format!("; its {serving} serving endpoints would be replaced"));
                }
                if replicas(then) < replicas(now) {
                    let fewer = format!("; replicas would fall from {} to {}", replicas(now), replicas(then));
                    text.push_str(&fewer);
                }
            }
        }
        text
    }

    /// Tokens close a site that was open, so an admin's must be among them.
    fn keeps_an_admin(&self, kept: &BTreeMap<&str, &Kept>) -> Result<(), PlanError> {
        let tokens = self.plan.changes.iter().filter(|change| change.kind == Kind::Token);
        if self.options.admin_in_settings
            || !tokens.clone().any(|token| matches!(token.what, What::Add | What::Change))
        {
            return Ok(());
        }
        let mut after: Vec<StoredToken> = Vec::new();
        for (key, entry) in self.there.iter().filter(|(key, _)| Kind::of(key) == Some(Kind::Token)) {
            let value = kept.get(key).filter(|_| self.options.force).map(|kept| kept.value.clone());
            let value = value.map_or_else(|| document::json(entry), Ok)?;
            after.extend(serde_json::from_value::<StoredToken>(value).ok());
        }
        for token in kept.values().filter(|kept| Kind::of(&kept.key) == Some(Kind::Token)) {
            after.push(typed(token)?);
        }
        match keeps_an_admin(&[], &after) {
            true => Ok(()),
            false => Err(Refused(
                "its tokens would close this site to everybody: none is an admin's that does not expire; name an admin's \
                 token in [auth] tokens of the control planes first"
                    .into(),
            )
            .into()),
        }
    }

    /// The counters, if they have to go on: past everything that may have been given out since the backup. Generations first,
    /// before anything is placed; the term last: until then peers that knew the old site refuse this one, half restored.
    fn counters(&self, site: &Listing, backup: &Backup) -> Result<[Txn; 2], StoreError> {
        let (mut first, mut last) = (Txn::new(), Txn::new());
        if self.from_same && (!self.into_empty || self.groups.is_empty()) {
            return Ok([first, last]);
        }
        let revision = |key: &str| document::find(site, key).map_or(0, |entry| entry.mod_revision);
        let generation = document::counter(site, keys::GENERATION)?;
        if generation < backup.generation.saturating_add(GAP) {
            first = first
                .when(Compare::ModRevision(keys::GENERATION.into(), revision(keys::GENERATION)))
                .put(keys::GENERATION, backup.generation.saturating_add(GAP).to_string());
        }
        let (term, base) = (document::term(site)?, document::counter(site, keys::TERM_BASE)?);
        let wanted = backup.term.saturating_add(GAP);
        if term < wanted {
            last = last
                .when(Compare::ModRevision(keys::TERM_BASE.into(), revision(keys::TERM_BASE)))
                .put(keys::TERM_BASE, (base + (wanted - term)).to_string());
        }
        Ok([first, last])
    }
}

fn name(kind: Kind, key: &str, value: Option<&Value>) -> String {
    let field = match kind {
        Kind::NodePolicy => "node_id",
        Kind::Route | Kind::Token => "name",
        _ => "model",
    };
    let named = value.and_then(|value| value.get(field)).and_then(Value::as_str);
    let last = || key.rsplit('/').next().unwrap_or(key);
    named.unwrap_or_else(|| last()).to_owned()
}

/// As few transactions as take everything, beginning with `first` and ending with `last`.
fn packed([first, last]: [Txn; 2], groups: Vec<Txn>) -> Vec<Txn> {
    let bytes = |txn: &Txn| -> usize {
        let one = |write: &Write| match write {
            Write::Put { key, value, .. } => key.len() + value.len(),
            Write::Delete { key } => key.len(),
        };
        txn.writes.iter().map(one).sum()
    };
    let mut out = vec![first];
    for group in groups.into_iter().chain([last]) {
        let fits = out.last().is_some_and(|last| {
            last.writes.len() + group.writes.len() <= WRITES && bytes(last) + bytes(&group) <= BYTES
        });
        match out.last_mut().filter(|_| fits) {
            Some(last) => {
                last.compares.extend(group.compares);
                last.writes.extend(group.writes);
            }
            None => out.push(group),
        }
    }
    out.retain(|txn| !txn.writes.is_empty());
    out
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
