use penstock_controlplane::store::members::MemberSays;
use serde_json::json;

use super::{super::findings::Level, *};

/// A site where all is well.
fn fine() -> Facts {
    let node = |name: &str, zone: &str| {
        json!({"node_id": name, "state": "ready", "zone": zone, "role": "worker", "agent_version": "1", "engines": 1,
            "gpus": [{"uuid": "g", "fault": ""}]})
    };
    let proxy = |name: &str, zone: &str| {
        json!({"node_id": name, "zone": zone, "version_acked": "3.9", "last_nack": "", "connected_s": 60,
            "agent": "penstock-proxy/1"})
    };
    let endpoint = |id: &str, node: &str| json!({"id": id, "model": "m", "node": node, "state": "ready"});
    let status = json!({"version": "1", "leader_id": "a", "term": 3, "store": "etcd",
        "readyz": {"ready": true, "reasons": []}, "held": null});
    let says = |id| MemberSays {
        version: "3.5".into(),
        id,
        leader: 1,
        members: ["x", "y", "z"].map(str::to_owned).to_vec(),
        ..MemberSays::default()
    };
    Facts {
        version: "1".into(),
        planes: vec![Plane { address: "http://a".into(), status: Ok(status) }],
        nodes: Ok(vec![node("n1", "x"), node("n2", "y")]),
        deployments: Ok(vec![
            json!({"model": "m", "replicas": 2, "status": {"ready": 2, "wanted": 2, "waiting": []}}),
        ]),
        endpoints: Ok(vec![endpoint("m-0", "n1"), endpoint("m-1", "n2")]),
        proxies: Ok((vec![proxy("p1", "x"), proxy("p2", "y")], "3.9".into())),
        looked_at: vec![ProxyLook {
            address: "http://p".into(),
            says: Ok((
                json!({"ready": true, "reasons": []}),
                "penstock_proxy_certificate_expiry_timestamp_seconds{listener=\"tls\"} 1e9\n".into(),
            )),
        }],
        etcd: Some((1..4).map(|id| Member { endpoint: format!("e{id}"), says: Ok(says(id)) }).collect()),
        certificates: vec![("store.ca_file (ca.pem)".into(), Ok(1_000_000_000))],
        disks: vec![("/data".into(), 80 << 30, 100 << 30)],
        backups: Some((3_600.0, 899_999_000.0)),
        now_unix_s: 900_000_000,
    }
}

fn worst(facts: &Facts) -> Vec<(Level, String)> {
    let bad = all(facts).into_iter().filter(|finding| finding.level > Level::Ok);
    bad.map(|finding| (finding.level, format!("{}: {}", finding.what, finding.why))).collect()
}

#[test]
fn a_site_where_all_is_well_has_nothing_to_tell() {
    assert_eq!(worst(&fine()), []);
    assert!(all(&fine()).len() >= 13);
}

#[test]
fn each_fault_is_found_once_and_said_in_words() {
    type Break = fn(&mut Facts);
    let cases: [(Break, Level, &str); 27] = [
        (
            |f| f.planes[0].status = Err("cannot reach it".into()),
            Level::Fail,
            "control plane http://a: cannot reach it",
        ),
        (|f| plane(f)["readyz"]["reasons"] = json!(["no quorum"]), Level::Fail, "not ready: no quorum"),
        (|f| plane(f)["version"] = "2".into(), Level::Warn, "release 2, and this program is 1"),
        (|f| plane(f)["held"] = "the store is not followed".into(), Level::Fail, "it changes nothing"),
        (|f| plane(f)["leader_id"] = "".into(), Level::Fail, "leader: control planes name nobody"),
        (|f| member(f).db_bytes = 1_800 << 20, Level::Warn, "etcd e1: release 3.5, 1.7 GiB"),
        (|f| member(f).alarms = vec!["Nospace".into()], Level::Fail, "alarms: Nospace"),
        (|f| member(f).leader = 2, Level::Fail, "do not agree on a leader"),
        (|f| f.nodes = Ok(vec![]), Level::Fail, "no node has ever reported"),
        (|f| node(f)["state"] = "lost".into(), Level::Fail, "node n1: lost, with 1 engines"),
        (
            |f| {
                *node(f) =
                    json!({"node_id": "n1", "state": "lost", "zone": "x", "agent_version": "", "engines": 0})
            },
            Level::Warn,
            "it is spoken of",
        ),
        (|f| node(f)["gpus"][0]["fault"] = "Xid 79".into(), Level::Fail, "GPU g: Xid 79"),
        (|f| node(f)["agent_version"] = "0".into(), Level::Warn, "its agent is release 0"),
        (
            |f| (node(f)["maintenance"], node(f)["reason"]) = (true.into(), "disk".into()),
            Level::Warn,
            "in maintenance: disk",
        ),
        (
            |f| f.nodes.as_mut().unwrap().iter_mut().for_each(|n| n["role"] = "arbitration".into()),
            Level::Fail,
            "2 arbitration nodes",
        ),
        (|f| deployment(f)["status"]["ready"] = 0.into(), Level::Fail, "0 of 2 engines ready"),
        (|f| deployment(f)["status"]["ready"] = 1.into(), Level::Warn, "1 of 2 engines ready"),
        (|f| deployment(f)["status"]["stalled"] = true.into(), Level::Fail, "its rollout is stalled"),
        (|f| deployment(f)["status"]["failed"] = 1.into(), Level::Warn, "1 engines have failed"),
        (
            |f| f.endpoints.as_mut().unwrap()[1]["node"] = "n1".into(),
            Level::Warn,
            "all 2 ready engines are in zone x",
        ),
        (
            |f| proxy(f)["last_nack"] = "a table without a model".into(),
            Level::Fail,
            "it refuses what it is sent",
        ),
        (|f| proxy(f)["version_acked"] = "3.8".into(), Level::Warn, "its tables are of version 3.8"),
        (
            |f| f.proxies.as_mut().unwrap().0.iter_mut().for_each(|p| p["zone"] = "x".into()),
            Level::Fail,
            "all 2 proxies are in zone x",
        ),
        (|f| f.now_unix_s = 1_000_000_000 - 20 * 86_400, Level::Warn, "expires in 20 days"),
        (|f| f.disks[0].1 = 2 << 30, Level::Fail, "/data: 2.0 GiB free"),
        (|f| f.backups = Some((0.0, 0.0)), Level::Warn, "none are made by the clock"),
        (|f| f.backups = Some((3_600.0, 899_900_000.0)), Level::Fail, "the last one is 100000 s old"),
    ];
    for (broken, level, part) in cases {
        let mut facts = fine();
        broken(&mut facts);
        let found = worst(&facts);
        assert!(
            found.iter().any(|(found, text)| *found == level && text.contains(part)),
            "{part}\nin {found:#?}"
        );
    }
}

#[test]
fn members_that_are_down_are_counted_against_the_majority() {
    let mut facts = fine();
    let members = facts.etcd.as_mut().unwrap();
    members[0].says = Err("no answer".into());
    let found = worst(&facts);
    assert!(found.iter().all(|(_, text)| !text.contains("quorum")), "two of three are enough: {found:?}");
    facts.etcd.as_mut().unwrap()[1].says = Err("no answer".into());
    let found = worst(&facts);
    assert!(found.iter().any(|(_, text)| text.contains("1 of 3 members answer, 2 are needed")), "{found:?}");
}

fn plane(facts: &mut Facts) -> &mut Value {
    facts.planes[0].status.as_mut().unwrap()
}

fn member(facts: &mut Facts) -> &mut MemberSays {
    facts.etcd.as_mut().unwrap()[0].says.as_mut().unwrap()
}

fn node(facts: &mut Facts) -> &mut Value {
    &mut facts.nodes.as_mut().unwrap()[0]
}

fn deployment(facts: &mut Facts) -> &mut Value {
    &mut facts.deployments.as_mut().unwrap()[0]
}

fn proxy(facts: &mut Facts) -> &mut Value {
    &mut facts.proxies.as_mut().unwrap().0[0]
}

#[test]
fn foreign_processes_and_the_causes_of_ends_are_told() {
    let mut facts = fine();
    facts.nodes.as_mut().unwrap()[0]["foreign"] =
        json!([{"pid": 7, "kind": "engine_core", "user": "eve", "rss_mib": 9, "port": 0}]);
    let exit = json!({"cause": "gpu_memory", "advice": "use more GPUs"});
    for endpoint in facts.endpoints.as_mut().unwrap() {
        (endpoint["state"], endpoint["last_exit"]) = ("failed".into(), exit.clone());
    }
    facts.deployments.as_mut().unwrap()[0]["status"]["failed"] = 2.into();
    let told: Vec<String> = worst(&facts).into_iter().map(|(_, text)| text).collect();
    for part in [
        "node n1: 1 vLLM processes are not its agent's: engine_core pid 7 of eve",
        "deployment m: 2 engines have failed; gpu_memory: use more GPUs",
    ] {
        assert!(told.iter().any(|text| text == part), "{part} not in {told:?}");
    }
}
