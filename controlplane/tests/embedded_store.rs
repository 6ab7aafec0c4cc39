//! What only the embedded store promises: one file that survives a crash, one process at a time, refusals in words.
#![allow(clippy::unwrap_used)]

use std::{path::Path, time::Duration};

use penstock_controlplane::store::{EmbeddedStore, Store, StoreError, Txn, TxnOutcome};

async fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, 1_000).await.unwrap()
}

async fn refusal(path: &Path) -> String {
    match EmbeddedStore::open(path, 1_000).await {
        Ok(_) => panic!("it was opened"),
        Err(StoreError::Open(reason)) => reason,
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn everything_is_there_after_a_restart_and_leases_have_their_full_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er/store.redb");
    let store = open(&path).await;
    let lease = store.lease_grant(Duration::from_millis(700)).await.unwrap();
    let txn = Txn::new().put("/a", "1").put_leased("/leased", "2", lease);
    let TxnOutcome::Committed { revision } = store.txn(txn).await.unwrap() else { panic!("conflict") };
    let before = store.list("/").await.unwrap();
    tokio::time::sleep(Duration::from_millis(350)).await;
    store.close().await;
    tokio::time::sleep(Duration::from_millis(400)).await;

    let store = open(&path).await;
    assert_eq!(store.list("/").await.unwrap(), before, "the lease slept with the store");
    store.lease_keep_alive(lease).await.unwrap();
    let other = store.lease_grant(Duration::from_secs(9)).await.unwrap();
    assert!(other > lease, "ids are not used again");
    let TxnOutcome::Committed { revision: next } = store.txn(Txn::new().put("/b", "")).await.unwrap() else {
        panic!("conflict")
    };
    assert_eq!(next, revision + 1);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while store.get("/leased").await.unwrap().is_some() {
        assert!(tokio::time::Instant::now() < deadline, "the lease never ran out");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    store.close().await;
}

#[tokio::test]
async fn a_second_process_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = open(&path).await;
    let reason = refusal(&path).await;
    assert!(reason.contains("another process has it open") && reason.contains("store.redb"), "{reason}");
    store.close().await;
    open(&path).await.close().await;
}

#[tokio::test]
async fn a_file_that_is_foreign_or_damaged_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = open(&path).await;
    for n in 0..200 {
        store.txn(Txn::new().put(format!("/k{n}"), vec![b'x'; 400])).await.unwrap();
    }
    store.close().await;
    let good = std::fs::read(&path).unwrap();
    let mut cut = good.clone();
    cut.truncate(3_000);
    let mut zeroed = good.clone();
    zeroed[64..4_096].fill(0);
    let mut smeared = good.clone();
    smeared[4_096..].fill(0xA5);
    for (name, bytes) in [
        ("text", b"some notes of mine".to_vec()),
        ("empty", Vec::new()),
        ("cut", cut),
        ("zeroed", zeroed),
        ("smeared", smeared),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let reason = refusal(&path).await;
        assert!(reason.contains("store.redb") && reason.contains("left as it is"), "{name}: {reason}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{name}: the file was changed");
    }
    let other = dir.path().join("other.redb");
    drop(redb::Database::create(&other).unwrap());
    assert!(refusal(&other).await.contains("another program's"));
    std::fs::write(&path, &good).unwrap();
    let store = open(&path).await;
    assert_eq!(store.list("/k").await.unwrap().entries.len(), 200);
    store.close().await;
}

#[tokio::test]
async fn what_was_answered_survives_a_copy_taken_without_closing() {
    // The file as it is on disk at some moment is what a power cut leaves.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = open(&path).await;
    for n in 0..50 {
        store.txn(Txn::new().put(format!("/k{n}"), n.to_string())).await.unwrap();
        if n % 10 == 9 {
            let copy = dir.path().join(format!("copy-{n}.redb"));
            std::fs::copy(&path, &copy).unwrap();
            let crashed = open(&copy).await;
            assert_eq!(crashed.list("/k").await.unwrap().entries.len(), n + 1);
            crashed.close().await;
        }
    }
    store.close().await;
}
