use std::time::Instant;

use penstock_proto::v1;

use super::*;

/// A complete state with `endpoints` in one pool, its tables a term ahead of its routes.
fn state(endpoints: usize, revision: u64) -> XdsState {
    let any = |type_url: &str, value: Vec<u8>| Some(Any { type_url: type_url.to_owned(), value });
    let endpoint = |index| v1::Endpoint {
        id: format!("m-{index}"),
        address: "127.0.0.1:10814".to_owned(),
        state: v1::EndpointState::Ready as i32,
        ..Default::default()
    };
    let table = v1::EndpointTable {
        pool: "m".to_owned(),
        endpoints: (0..endpoints).map(endpoint).collect(),
        ..Default::default()
    };
    let route = v1::ModelRoute {
        model: "m".to_owned(),
        pool: "m".to_owned(),
        served_model: "served".to_owned(),
        created_unix_s: 7,
        ..Default::default()
    };
    let resource = |type_url, value: Vec<u8>| Resource {
        name: "m".to_owned(),
        version: "v".to_owned(),
        resource: any(type_url, value),
        ..Default::default()
    };
    let tables = vec![resource(ENDPOINT_TABLE_TYPE, table.encode_to_vec())];
    let routes = vec![resource(MODEL_ROUTE_TYPE, route.encode_to_vec())];
    let version = |term| Some(Version { term, revision });
    XdsState::restore((version(3), tables), (version(2), routes)).expect("fine")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn what_is_saved_is_loaded() {
    let folder = folder();
    let path = folder.path().join("deep/er/xds.cache");
    assert_eq!(load(&path).outcome, LoadOutcome::Absent);
    let state = state(1000, 9);
    save(&path, &state).expect("saved");
    save(&path, &state).expect("saved over");
    let loaded = load(&path);
    assert_eq!(loaded.outcome, LoadOutcome::Loaded);
    assert_eq!(loaded.state, state);
    assert_eq!(loaded.state.version(), Version { term: 3, revision: 9 });
    assert!(loaded.state.is_complete());
    let left: Vec<_> = fs::read_dir(path.parent().expect("folder")).expect("readable").collect();
    assert_eq!(left.len(), 1, "no temporary file is left");
}

#[test]
fn every_cut_and_every_flipped_byte_is_noticed() {
    let whole = encode(&state(1, 9));
    for length in 0..whole.len() {
        assert!(decode(&whole[..length]).is_err(), "cut to {length}");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x20;
        // The checksum is in hexadecimal, so a flipped case is the one change that says the same.
        assert!(decode(&damaged).is_err(), "byte {at}");
    }
    assert!(decode(&whole).is_ok());
}

#[test]
fn a_damaged_file_is_set_aside_and_the_proxy_starts_empty() {
    let folder = folder();
    let path = folder.path().join("xds.cache");
    for (content, says) in [
        (&b""[..], "no header"),
        (b"hello\n", "its header is not"),
        (b"\xff\n", "not text"),
        (b"penstock-xds-cache 2 00 0\n", "its format is 2; this version reads 1"),
        (b"penstock-xds-cache 1 00 7\nabc", "should hold 7 bytes behind its header and holds 3"),
        (b"penstock-xds-cache 1 00 3\nabc", "checksum"),
    ] {
        fs::write(&path, content).expect("written");
        let loaded = load(&path);
        let LoadOutcome::Corrupt { reason, kept_as } = loaded.outcome else { panic!("{:?}", loaded.outcome) };
        assert!(reason.contains(says), "{reason}");
        assert_eq!(fs::read(kept_as.expect("kept")).expect("readable"), content);
        assert!(!path.exists());
        assert_eq!(loaded.state, XdsState::default());
    }
}

#[test]
fn content_that_would_be_refused_from_the_wire_is_refused_from_disk() {
    let route_without_table = {
        let stored = Stored { term: 1, revision: 1, resources: vec![] };
        let mut with_route = Contents::decode(contents_of(&encode(&state(1, 1)))).expect("ours");
        with_route.tables = Some(stored);
        with_route.encode_to_vec()
    };
    for (body, says) in [(route_without_table, "no endpoint table"), (vec![0xff; 4], "cannot be decoded")] {
        let mut file = format!("{MAGIC} 1 {:x} {}\n", Sha256::digest(&body), body.len()).into_bytes();
        file.extend(body);
        let reason = decode(&file).expect_err("refused");
        assert!(reason.contains(says), "{reason}");
    }
}

fn contents_of(file: &[u8]) -> &[u8] {
    let header = file.iter().position(|&byte| byte == b'\n').expect("a header");
    &file[header + 1..]
}

#[test]
fn what_cannot_be_read_or_written_says_so() {
    let folder = folder();
    assert!(matches!(load(folder.path()).outcome, LoadOutcome::Unreadable { .. }), "a folder is no file");
    let path = folder.path().join("file/cache");
    fs::write(folder.path().join("file"), "in the way").expect("written");
    let error = save(&path, &state(1, 1)).expect_err("a file is no folder");
    assert!(error.to_string().contains("file/cache"), "{error}");
}

#[tokio::test]
async fn write_behind_coalesces_and_writes_the_rest_at_shutdown() {
    let folder = folder();
    let path = folder.path().join("xds.cache");
    let (sender, receiver) = watch::channel(Arc::new(XdsState::default()));
    let (status, shutdown) = (Arc::new(XdsStatus::default()), CancellationToken::new());
    let hour = Duration::from_secs(3600);
    let writer = write_behind(path.clone(), receiver, hour, Arc::clone(&status), shutdown.clone());
    let writer = tokio::spawn(writer);
    sender.send_replace(Arc::new(state(1, 1)));
    until(|| status.view().cache_writes == 1).await;
    for revision in 2..50 {
        sender.send_replace(Arc::new(state(1, revision)));
    }
    shutdown.cancel();
    writer.await.expect("ended");
    assert_eq!(load(&path).state.version().revision, 49);
    assert_eq!(status.view().cache_writes, 2, "48 states, one write");
}

#[tokio::test]
async fn an_incomplete_state_is_not_written_and_a_failure_is_tried_again() {
    let folder = folder();
    let path = folder.path().join("later/xds.cache");
    fs::write(folder.path().join("later"), "in the way").expect("written");
    let (sender, receiver) = watch::channel(Arc::new(XdsState::default()));
    let (status, shutdown) = (Arc::new(XdsStatus::default()), CancellationToken::new());
    let often = Duration::from_millis(5);
    let writer = write_behind(path.clone(), receiver, often, Arc::clone(&status), shutdown.clone());
    let writer = tokio::spawn(writer);
    sender.send_replace(Arc::new(XdsState::default()));
    sender.send_replace(Arc::new(state(1, 5)));
    until(|| status.view().cache_write_failures >= 2).await;
    fs::remove_file(folder.path().join("later")).expect("removed");
    until(|| status.view().cache_writes == 1).await;
    assert_eq!(load(&path).state.version().revision, 5);
    drop(sender);
    tokio::time::timeout(Duration::from_secs(10), writer)
        .await
        .expect("ends with its sender")
        .expect("ended");
}

async fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "the condition did not come true");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
