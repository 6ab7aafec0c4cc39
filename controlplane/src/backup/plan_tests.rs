use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::store::Revision;

/// A site: generation 9, term 3; and these keys with their revisions.
pub(in crate::backup) fn site(revision: Revision, keys: &[(&str, Revision, Value)]) -> Listing {
    let entry = |key: &str, mod_revision, value: String| Entry {
        key: key.into(),
        value: value.into(),
        create_revision: mod_revision,
        mod_revision,
        version: 1,
        lease: 0,
    };
    let mut entries: Vec<Entry> =
        keys.iter().map(|(key, at, value)| entry(key, *at, value.to_string())).collect();
    entries.push(entry(keys::TERM, 3, "me".into()));
    entries.push(entry(keys::SCHEMA, 3, "2".into()));
    entries.push(entry(keys::GENERATION, 6, "9".into()));
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    Listing { entries, revision }
}

fn empty() -> Listing {
    Listing { entries: Vec::new(), revision: 1 }
}

fn deployment(model: &str, replicas: u32, engine: &str) -> Value {
    json!({"model": model, "replicas": replicas, "engine": engine, "model_path": "p", "gpus_per_replica": 1,
        "created_unix_s": 5})
}

fn endpoint(model: &str, id: &str) -> Value {
    json!({"model": model, "replica_id": id, "generation": 1, "address": "h:1", "pid": 1, "node_id": "n"})
}

fn placement(model: &str) -> Value {
    json!({"model": model, "slug": model, "next_ordinal": 1, "assignments": [{"replica_id": format!("{model}-0"),
        "generation": 4, "node_id": "n", "gpu_uuids": ["g"], "phase": "active",
        "spec": {"engine": "sim", "model_path": "p", "gpus_per_replica": 1}}]})
}

fn token(name: &str, role: &str) -> Value {
    let hash = crate::access::hash(name.as_bytes());
    json!({"name": name, "role": role, "sha256": hash, "created_unix_s": 1, "created_by": "me", "expires_unix_s": null})
}

fn backup(site: &Listing) -> Backup {
    Backup::of(site, 100, "test").expect("readable")
}

fn decide(site: &Listing, from: &Backup, options: Options) -> Plan {
    plan(site, from, options, 200).expect("readable")
}

fn what(plan: &Plan) -> Vec<(&str, What)> {
    plan.changes.iter().map(|change| (change.name.as_str(), change.what)).collect()
}

/// What a site is after the plan's transactions.
fn after(site: &Listing, plan: &Plan) -> Listing {
    let mut entries: BTreeMap<String, Entry> =
        site.entries.iter().map(|e| (e.key.clone(), e.clone())).collect();
    let mut revision = site.revision;
    for txn in &plan.txns {
        assert!(txn.compares.iter().all(|compare| compare.holds(entries.get(compare.key()))), "{txn:?}");
        revision += 1;
        for write in &txn.writes {
            match write {
                Write::Delete { key } => drop(entries.remove(key)),
                Write::Put { key, value, lease } => {
                    let entry = Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: revision,
                        mod_revision: revision,
                        version: 1,
                        lease: *lease,
                    };
                    entries.insert(key.clone(), entry);
                }
            }
        }
    }
    Listing { entries: entries.into_values().collect(), revision }
}

fn full() -> Listing {
    site(
        40,
        &[
            ("/deployments/m", 7, deployment("m", 1, "sim")),
            ("/placements/m", 8, placement("m")),
            ("/drains/m/m-0", 9, json!({"model": "m", "replica_id": "m-0"})),
            ("/routes/chat", 10, json!({"name": "chat", "targets": [], "created_unix_s": 1})),
            ("/node-policies/n", 11, json!({"node_id": "n", "cordoned": true})),
            ("/tokens/ci", 12, token("ci", "admin")),
            ("/endpoints/m/m-0", 13, endpoint("m", "m-0")),
            ("/nodes/n", 14, json!({"node_id": "n"})),
        ],
    )
}

#[test]
fn an_empty_site_gets_everything_but_what_processes_say_anew() {
    let from = backup(&full());
    let plan = decide(&empty(), &from, Options::default());
    assert!(plan.into_empty && plan.refusals.is_empty());
    let restored = after(&empty(), &plan);
    let keys: Vec<&str> = restored.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "/deployments/m",
            "/drains/m/m-0",
            "/meta/generation",
            "/meta/term-base",
            "/node-policies/n",
            "/placements/m",
            "/routes/chat",
            "/tokens/ci"
        ]
    );
    assert_eq!(document::counter(&restored, keys::GENERATION), Ok(9 + GAP));
    assert!(document::term(&restored).expect("a number") >= from.term + GAP);
    let without = decide(&empty(), &from, Options { without_placements: true, ..Options::default() });
    assert!(
        !after(&empty(), &without)
            .entries
            .iter()
            .any(|e| e.key.contains("placements") || e.key.contains("drains"))
    );
}

#[test]
fn the_same_site_is_left_as_it_is() {
    let plan = decide(&full(), &backup(&full()), Options::default());
    assert!(plan.txns.is_empty() && plan.refusals.is_empty(), "{plan:?}");
    assert!(plan.changes.iter().all(|change| change.what == What::Unchanged));
}

#[test]
fn going_back_is_refused_in_words_unless_it_is_forced_and_never_moves_what_runs() {
    let from = backup(&full());
    let mut now = full();
    now.revision = 90;
    let mut set = |key: &str, value: Value| {
        now.entries.retain(|entry| entry.key != key);
        let new = site(90, &[(key, 80, value)]).entries.into_iter().find(|entry| entry.key == key);
        now.entries.push(new.expect("made"));
    };
    set("/deployments/m", deployment("m", 3, "vllm"));
    set("/deployments/new", deployment("new", 1, "sim"));
    set("/endpoints/new/new-0", endpoint("new", "new-0"));
    set("/placements/m", json!({"model": "m", "slug": "m", "next_ordinal": 9, "assignments": []}));
    set("/tokens/later", token("later", "admin"));
    let refused = decide(&now, &from, Options::default());
    let all = refused.refusals.join("\n");
    for part in [
        "deployment \"m\": it was changed at revision 80, after this backup (revision 40), and would go back; its 1 \
         serving endpoints would be replaced; replicas would fall from 3 to 1",
        "deployment \"new\": it was made after this backup (at revision 80; the backup is of 40), and would go; its 1 \
         serving endpoints would end",
    ] {
        assert!(all.contains(part), "{part}\nin\n{all}");
    }
    assert_eq!(refused.refusals.len(), 2, "{all}");
    let forced = decide(&now, &from, Options { force: true, ..Options::default() });
    let restored = after(&now, &forced);
    assert_eq!(document::find(&restored, "/deployments/new"), None);
    assert_eq!(document::find(&restored, "/placements/m"), document::find(&now, "/placements/m"));
    assert!(document::find(&restored, "/tokens/later").is_some(), "whoever restores keeps his token");
    let missing = decide(&now, &from, Options { only_missing: true, ..Options::default() });
    assert!(missing.txns.is_empty() && missing.refusals.is_empty(), "{missing:?}");
    assert!(what(&missing).contains(&("m", What::Keep)));
}

#[test]
fn what_was_deleted_comes_back_placed_anew_and_a_revoked_token_does_not() {
    let mut now = full();
    now.revision = 60;
    now.entries
        .retain(|entry| !["/deployments/m", "/placements/m", "/tokens/ci"].contains(&entry.key.as_str()));
    let plan = decide(&now, &backup(&full()), Options::default());
    assert!(plan.refusals.is_empty(), "{:?}", plan.refusals);
    let restored = after(&now, &plan);
    assert!(document::find(&restored, "/deployments/m").is_some());
    assert_eq!(document::find(&restored, "/placements/m"), None, "its GPUs may be others' now");
    assert_eq!(document::find(&restored, "/tokens/ci"), None);
    assert_eq!(document::counter(&restored, keys::GENERATION), Ok(9), "nothing was lost");
}

#[test]
fn tokens_never_close_a_site_to_everybody() {
    let from = site(40, &[("/tokens/ci", 12, token("ci", "viewer"))]);
    let from = backup(&from);
    assert!(from.entries.iter().any(|kept| kept.key == "/tokens/ci"));
    let refused = plan(&empty(), &from, Options::default(), 200).expect_err("nobody could make a token");
    assert!(refused.to_string().contains("close this site to everybody"), "{refused}");
    let options = Options { admin_in_settings: true, ..Options::default() };
    assert!(decide(&empty(), &from, options).refusals.is_empty());
}

#[test]
fn many_keys_make_transactions_that_etcd_takes_and_keep_together_what_belongs_together() {
    let models: Vec<String> = (0..300).map(|n| format!("m{n}")).collect();
    let mut keys = Vec::new();
    for model in &models {
        keys.push((keys::deployment(model), 7, deployment(model, 1, "sim")));
        keys.push((keys::placement(model), 8, placement(model)));
    }
    let keys: Vec<_> = keys.iter().map(|(key, at, value)| (key.as_str(), *at, value.clone())).collect();
    let plan = decide(&empty(), &backup(&site(40, &keys)), Options::default());
    assert!(plan.txns.len() > 5);
    for txn in &plan.txns {
        assert!(txn.writes.len() <= 128 && txn.compares.len() <= 128);
        let has = |key: &str| txn.writes.iter().any(|write| write.key() == key);
        for model in &models {
            assert_eq!(has(&keys::deployment(model)), has(&keys::placement(model)), "{model}");
        }
    }
    // Cut short anywhere, the rest goes in without force.
    let half = Plan { txns: plan.txns[..3].to_vec(), ..plan };
    let restored = after(&empty(), &half);
    assert_eq!(document::term(&restored), Ok(0), "peers of the old site are not to follow half of it");
    assert_eq!(document::counter(&restored, keys::GENERATION), Ok(9 + GAP));
    let later = decide(&restored, &backup(&site(40, &keys)), Options::default());
    assert!(later.refusals.is_empty() && !later.txns.is_empty());
    assert!(document::term(&after(&restored, &later)).expect("a number") > GAP);
}

proptest! {
    /// Whatever the site and the backup: counters never fall, an unforced plan changes and deletes nothing, a forced one
    /// ends at what the backup wants, and doing it twice does nothing more.
    #[test]
    fn restores_are_safe_and_repeatable(
        then in prop::collection::btree_map("[a-d]", 0..3_u32, 0..4),
        now in prop::collection::btree_map("[a-d]", 0..3_u32, 0..4),
        revisions in (10..50_u64, 10..50_u64),
        force in any::<bool>(),
    ) {
        let made = |models: &BTreeMap<String, u32>, revision| {
            let keys: Vec<(String, Value)> =
                models.iter().map(|(m, n)| (keys::deployment(m), deployment(m, *n, "sim"))).collect();
            let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), 9, value.clone())).collect();
            site(revision, &keys)
        };
        let (before, from) = (made(&now, revisions.0), backup(&made(&then, revisions.1)));
        let first = decide(&before, &from, Options { force, ..Options::default() });
        if !force && !first.refusals.is_empty() {
            prop_assert!(first.changes.iter().any(|c| matches!(c.what, What::Change | What::Delete)));
            return Ok(());
        }
        let restored = after(&before, &first);
        let term = |site: &Listing| document::term(site).expect("a number");
        prop_assert!(term(&restored) >= term(&before));
        let counter = |site: &Listing| document::counter(site, keys::GENERATION).expect("a number");
        prop_assert!(counter(&restored) >= counter(&before));
        for model in then.keys() {
            prop_assert!(document::find(&restored, &keys::deployment(model)).is_some());
        }
        for model in now.keys().filter(|model| !then.contains_key(*model)) {
            prop_assert_eq!(document::find(&restored, &keys::deployment(model)).is_none(), force);
        }
        let again = decide(&restored, &from, Options { force, ..Options::default() });
        prop_assert!(again.txns.is_empty(), "{:?}", again);
    }
}
