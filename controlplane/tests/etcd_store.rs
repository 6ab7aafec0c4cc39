//! What the store on etcd promises when etcd fails: members killed, quorum lost, data wiped, history compacted away.
#![allow(clippy::unwrap_used)]

mod etcd_support;

use std::time::Duration;

use etcd_support::{Cluster, gate::Gate};
use futures_util::StreamExt;
use penstock_config::controlplane::StoreConfig;
use penstock_controlplane::store::{
    Compare, EtcdStore, Event, Store, StoreError, Txn, TxnOutcome, Watch, WatchError,
};
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(30);

/// Writes the next number, as a caller does that reads before it tries again.
async fn append(store: &dyn Store, number: u64) {
    let deadline = Instant::now() + PATIENCE;
    let key = format!("/log/{number:04}");
    loop {
        let txn = Txn::new().when(Compare::Absent(key.clone())).put(key.clone(), number.to_string());
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { .. }) => return,
            Ok(TxnOutcome::Conflict { .. }) => return,
            Err(StoreError::Unavailable(_) | StoreError::NoQuorum(_)) if Instant::now() < deadline => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn next(watch: &mut Watch) -> Vec<Event> {
    let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("an event in time");
    batch.expect("open").expect("no error").events
}

#[tokio::test]
async fn each_of_three_members_may_die_in_turn_and_no_write_or_event_is_lost() {
    survive_the_death_of(1, 3).await;
}

#[tokio::test]
async fn two_of_five_members_may_die_at_once_and_no_write_or_event_is_lost() {
    survive_the_death_of(2, 5).await;
}

async fn survive_the_death_of(some: usize, of: usize) {
    let Some(mut cluster) = Cluster::start(of).await else { return };
    let store = EtcdStore::new(cluster.settings());
    let lease = store.lease_grant(Duration::from_secs(5)).await.unwrap();
    store.txn(Txn::new().put_leased("/leased", "", lease)).await.unwrap();
    let mut watch = store.watch("/log/", 1).await.unwrap();
    let mut number = 0;
    // The leader among them, by the time all have been.
    let first = cluster.leader().await;
    for turn in 0..of {
        let victims: Vec<usize> = (0..some).map(|n| (first + turn + n) % of).collect();
        victims.iter().for_each(|victim| cluster.kill(*victim));
        let began = Instant::now();
        for _ in 0..5 {
            append(&store, number).await;
            number += 1;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "writes stood still for {:?}", began.elapsed());
        store.lease_keep_alive(lease).await.unwrap();
        victims.iter().for_each(|victim| cluster.restart(*victim));
        cluster.wait_ready().await;
        store.lease_keep_alive(lease).await.unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < usize::try_from(number).unwrap() {
        seen.extend(next(&mut watch).await.iter().map(|event| event.key().to_owned()));
    }
    let expected: Vec<String> = (0..number).map(|n| format!("/log/{n:04}")).collect();
    assert_eq!(seen, expected, "each once, in order");
    assert!(store.get("/leased").await.unwrap().is_some(), "no lease was lost");
    store.close().await;
}

#[tokio::test]
async fn without_a_quorum_of_three_it_says_so_and_recovers_by_itself() {
    lose_the_quorum_of(3).await;
}

#[tokio::test]
async fn without_a_quorum_of_five_it_says_so_and_recovers_by_itself() {
    lose_the_quorum_of(5).await;
}

async fn lose_the_quorum_of(count: usize) {
    let Some(mut cluster) = Cluster::start(count).await else { return };
    let settings = StoreConfig { request_timeout_ms: 3_000, member_timeout_ms: 1_000, ..cluster.settings() };
    let store = EtcdStore::new(settings);
    let lease = store.lease_grant(Duration::from_secs(3)).await.unwrap();
    store.txn(Txn::new().put_leased("/leased", "", lease)).await.unwrap();
    let mut watch = store.watch("/log/", 1).await.unwrap();
    append(&store, 0).await;
    assert_eq!(next(&mut watch).await.len(), 1);
    let leader = cluster.leader().await;
    let majority = count / 2 + 1;
    (0..majority).for_each(|n| cluster.kill((leader + n) % count));
    // A survivor takes about a second to notice; from then on it says what is wrong.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let began = Instant::now();
        let error = store.txn(Txn::new().put("/x", "")).await.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5), "every call has a deadline");
        match error {
            StoreError::NoQuorum(why) => {
                assert!(why.contains("etcd has no leader"), "{why}");
                break;
            }
            StoreError::Unavailable(_) => assert!(Instant::now() < deadline, "{error}"),
            other => panic!("{other}"),
        }
    }
    assert!(store.get("/leased").await.is_err(), "a read that may be stale is no answer");
    // Longer than the lease: while nobody can agree on anything, no lease ends.
    tokio::time::sleep(Duration::from_secs(2)).await;
    (majority..count).for_each(|n| cluster.kill((leader + n) % count));
    let gone = store.get("/leased").await.unwrap_err();
    assert!(matches!(&gone, StoreError::Unavailable(why) if why.contains("cannot be reached")), "{gone}");
    (0..count).for_each(|index| cluster.restart(index));
    cluster.wait_ready().await;
    store.lease_keep_alive(lease).await.unwrap();
    append(&store, 1).await;
    assert_eq!(next(&mut watch).await[0].key(), "/log/0001", "the watch went on by itself");
    assert!(store.get("/leased").await.unwrap().is_some());
    store.close().await;
}

#[tokio::test]
async fn a_store_that_lost_its_data_is_refused_until_a_new_start() {
    let Some(mut cluster) = Cluster::start(1).await else { return };
    let store = EtcdStore::new(cluster.settings());
    for number in 0..20 {
        append(&store, number).await;
    }
    let mut watch = store.watch("/", store.list("/").await.unwrap().revision + 1).await.unwrap();
    cluster.wipe();
    cluster.wait_ready().await;
    let ended = tokio::time::timeout(PATIENCE, watch.next()).await.expect("in time").unwrap();
    assert!(matches!(&ended, Err(WatchError::Broken(why)) if why.contains("lost or replaced")), "{ended:?}");
    for _ in 0..2 {
        let refused = store.list("/").await.unwrap_err();
        assert!(matches!(&refused, StoreError::Rewound(why) if why.contains("revision")), "{refused}");
        assert!(matches!(store.txn(Txn::new().put("/x", "")).await, Err(StoreError::Rewound(_))));
        // Also when the new history has grown past the old one.
        let mut client = cluster.client(0).await;
        for number in 0..40 {
            client.put("/other", number.to_string(), None).await.unwrap();
        }
    }
    store.close().await;
    let anew = EtcdStore::new(cluster.settings());
    append(&anew, 0).await;
    anew.close().await;
}

#[tokio::test]
async fn a_watcher_that_was_cut_off_during_a_compaction_is_told() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let gate = Gate::before(cluster.members[0].client_port).await;
    let settings = StoreConfig { endpoints: vec![format!("http://{}", gate.address)], ..cluster.settings() };
    let (stalled, writer) = (EtcdStore::new(settings), EtcdStore::new(cluster.settings()));
    let mut watch = stalled.watch("/log/", 1).await.unwrap();
    append(&writer, 0).await;
    assert_eq!(next(&mut watch).await.len(), 1);
    gate.close();
    for number in 1..20 {
        append(&writer, number).await;
    }
    writer.txn(Txn::new().delete("/log/0000")).await.unwrap();
    cluster.compact().await;
    // What was on its way may still arrive; a connection that hangs is given up after two pings.
    let told = async {
        match watch.next().await.expect("it says why it ends") {
            Err(error) => error,
            Ok(batch) => panic!("the gate is closed: {batch:?}"),
        }
    };
    let opening = async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        gate.open();
        std::future::pending::<()>().await;
    };
    let error = tokio::select! {
        error = tokio::time::timeout(PATIENCE, told) => error.expect("in time"),
        () = opening => unreachable!("it never ends"),
    };
    assert!(matches!(error, WatchError::Compacted { .. }), "{error:?}");
    let listing = stalled.list("/log/").await.unwrap();
    assert_eq!(listing.entries.len(), 19, "no deletion is missed");
    let mut fresh = stalled.watch("/log/", listing.revision + 1).await.unwrap();
    append(&writer, 20).await;
    assert_eq!(next(&mut fresh).await[0].key(), "/log/0020", "list, then watch: no gap");
    stalled.close().await;
    writer.close().await;
}

#[tokio::test]
async fn who_may_not_is_told_so() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let mut client = cluster.client(0).await;
    let mut auth = client.auth_client();
    auth.role_add("root").await.unwrap();
    auth.user_add("root", "secret", None).await.unwrap();
    auth.user_grant_role("root", "root").await.unwrap();
    auth.role_add("penstock").await.unwrap();
    let own = etcd_client::Permission::read_write("/penstock/").with_prefix();
    auth.role_grant_permission("penstock", own).await.unwrap();
    auth.user_add("penstock", "pass", None).await.unwrap();
    auth.user_grant_role("penstock", "penstock").await.unwrap();
    client.auth_enable().await.unwrap();
    let with = |username: &str, password: &str, prefix: &str| {
        EtcdStore::new(StoreConfig {
            username: username.into(),
            password: password.into(),
            prefix: prefix.into(),
            ..cluster.settings()
        })
    };
    let denied = |outcome: Result<_, StoreError>| match outcome {
        Err(StoreError::Denied(why)) => why,
        other => panic!("{other:?}"),
    };
    let good = with("penstock", "pass", "/penstock");
    append(&good, 0).await;
    let mut watch = good.watch("/log/", 1).await.unwrap();
    assert_eq!(next(&mut watch).await[0].key(), "/log/0000");
    assert!(denied(with("penstock", "wrong", "/penstock").get("/x").await).contains("store.password"));
    assert!(denied(with("", "", "/penstock").get("/x").await).contains("store.username"));
    assert!(denied(with("penstock", "pass", "/other").get("/x").await).contains("store.prefix"));
    good.close().await;
}

#[tokio::test]
async fn over_tls_both_sides_show_who_they_are() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "authority of a test");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let pair = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.signed_by(&key, &authority).unwrap().pem(), key.serialize_pem())
    };
    let write = |dir: &std::path::Path, name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let made = Cluster::start_with(1, "https", |dir| {
        let (certificate, key) = pair("etcd");
        let ca = write(dir, "ca.pem", &authority.pem());
        let (certificate, key) = (write(dir, "etcd.pem", &certificate), write(dir, "etcd.key", &key));
        let flags =
            ["--client-cert-auth", "--trusted-ca-file", &ca, "--cert-file", &certificate, "--key-file", &key];
        flags.map(str::to_owned).to_vec()
    });
    let Some(cluster) = made else { return };
    let (certificate, key) = pair("penstock");
    let dir = cluster.dir.path();
    let settings = StoreConfig {
        ca_file: dir.join("ca.pem").to_str().unwrap().into(),
        cert_file: write(dir, "own.pem", &certificate),
        key_file: write(dir, "own.key", &key),
        request_timeout_ms: 20_000,
        member_timeout_ms: 5_000,
        ..cluster.settings()
    };
    let store = EtcdStore::new(settings.clone());
    append(&store, 0).await;
    let mut watch = store.watch("/log/", 1).await.unwrap();
    assert_eq!(next(&mut watch).await.len(), 1);
    store.close().await;

    let short = StoreConfig { request_timeout_ms: 1_500, member_timeout_ms: 1_000, ..settings };
    let nameless = StoreConfig { cert_file: String::new(), key_file: String::new(), ..short.clone() };
    let error = EtcdStore::new(nameless).get("/x").await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_) | StoreError::Unavailable(_)), "{error}");
    let missing = StoreConfig { ca_file: "/nonexistent.pem".into(), ..short };
    let error = EtcdStore::new(missing).get("/x").await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent.pem") && error.contains("store.ca_file"), "{error}");
}
