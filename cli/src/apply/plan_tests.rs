use super::*;
use crate::manifest::{Document, check};

fn document(kind: &str, name: &str, spec: Value) -> Document {
    let at = Place { file: "f".into(), document: 1, line: 1 };
    Document { at, value: json!({"kind": kind, "name": name, "spec": spec}), lines: BTreeMap::new() }
}

fn wanted(documents: &[(&str, &str, Value)]) -> Vec<Wanted> {
    let documents: Vec<Document> = documents.iter().map(|(k, n, s)| document(k, n, s.clone())).collect();
    check(&documents).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// What the API would show after applying these.
fn live(documents: &[(&str, &str, Value)]) -> Live {
    let mut live = Live::new();
    for one in wanted(documents) {
        let Manifest { kind, name, .. } = one.manifest;
        let mut shown = one.body.clone();
        match kind {
            Kind::NodePolicy => shown = json!({"node_id": name, "policy": shown}),
            _ => shown["revision"] = 7.into(),
        }
        live.insert((kind, name), shown);
    }
    live
}

fn done(documents: &[(&str, &str, Value)], live: &Live, prunes: &[&str]) -> Vec<(String, Action)> {
    let prunes: Vec<Prune> = prunes.iter().map(|text| prune(text).unwrap()).collect();
    let steps = plan(&wanted(documents), live, &prunes).unwrap_or_else(|problems| panic!("{problems:?}"));
    steps.into_iter().map(|step| (format!("{}/{}", step.kind.as_str(), step.name), step.action)).collect()
}

#[test]
fn what_was_applied_is_unchanged_and_a_change_names_its_fields() {
    let spec = json!({"replicas": 2, "engine": "sim", "rollout": {"max_surge": 2}});
    let fleet = [
        ("Route", "chat", json!({"targets": [{"model": "m"}]})),
        ("Deployment", "m", spec),
        ("NodePolicy", "n", json!({"cordoned": true})),
    ];
    let steps = done(&fleet, &live(&fleet), &[]);
    let names: Vec<&str> = steps.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["NodePolicy/n", "Deployment/m", "Route/chat"]);
    assert!(steps.iter().all(|(_, action)| *action == Action::Unchanged), "{steps:?}");
    let other =
        wanted(&[("Deployment", "m", json!({"replicas": 2, "engine": "sim", "rollout": {"max_surge": 3}}))]);
    let step = plan(&other, &live(&fleet), &[]).unwrap().remove(0);
    assert_eq!((step.action, step.revision), (Action::Change, Some(7)));
    assert_eq!(step.differences.len(), 1);
    assert_eq!(step.differences[0].field, "rollout.max_surge");
}

#[test]
fn replicas_and_pause_stay_where_a_manifest_does_not_speak_of_them() {
    let now =
        live(&[("Deployment", "m", json!({"replicas": 9, "engine": "sim", "rollout": {"paused": true}}))]);
    let step = |spec: Value| plan(&wanted(&[("Deployment", "m", spec)]), &now, &[]).unwrap().remove(0);
    assert_eq!(step(json!({"engine": "sim"})).action, Action::Unchanged);
    let changed = step(json!({"engine": "sim", "args": ["--x"], "rollout": {"max_surge": 2}}));
    assert_eq!(changed.body["replicas"], 9);
    assert_eq!(changed.body["rollout"], json!({"max_surge": 2, "paused": true}));
    let fields: Vec<_> = changed.differences.iter().map(|d| d.field.as_str()).collect();
    assert_eq!(fields, ["args", "rollout.max_surge"]);
    let said = step(json!({"engine": "sim", "replicas": 1, "rollout": {"paused": false}}));
    assert_eq!(said.differences.len(), 2);
    let new = plan(&wanted(&[("Deployment", "new", json!({}))]), &now, &[]).unwrap().remove(0);
    assert_eq!((new.action, new.revision, new.body), (Action::Create, None, json!({})));
}

#[test]
fn routes_are_checked_against_the_site_as_it_will_be_and_come_in_order() {
    let fleet = [
        ("Route", "first", json!({"targets": [{"model": "m"}], "fallbacks": ["second", "old"]})),
        ("Route", "second", json!({"targets": [{"model": "sql"}]})),
        ("Deployment", "m", json!({"lora": [{"name": "sql", "path": "/l"}]})),
    ];
    let now = live(&[("Deployment", "old", json!({}))]);
    let names: Vec<String> = done(&fleet, &now, &[]).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["Deployment/m", "Route/second", "Route/first"]);
    let steps = plan(&wanted(&fleet), &now, &[]).unwrap();
    assert!(steps[1].needs_others && steps[2].needs_others);
    let problems = plan(&wanted(&fleet), &Live::new(), &[]).unwrap_err();
    let told = problems[0].to_string();
    assert!(told.contains("spec.fallbacks[1]") && told.contains("no deployment, adapter or route"), "{told}");
    let circle = [
        ("Deployment", "m", json!({})),
        ("Route", "a", json!({"targets": [{"model": "m"}], "fallbacks": ["b"]})),
        ("Route", "b", json!({"targets": [{"model": "m"}], "fallbacks": ["a"]})),
    ];
    let told = format!("{:?}", plan(&wanted(&circle), &Live::new(), &[]).unwrap_err());
    assert!(told.contains("close a circle"), "{told}");
}

#[test]
fn pruning_takes_what_is_named_and_never_all_of_a_kind() {
    let fleet = [
        ("Deployment", "a-1", json!({})),
        ("Deployment", "a-2", json!({})),
        ("Deployment", "b-1", json!({})),
        ("Route", "r", json!({"targets": [{"model": "a-2"}]})),
        ("NodePolicy", "n", json!({"cordoned": true})),
    ];
    let now = live(&fleet);
    let keep = [("Deployment", "a-1", json!({})), ("Route", "s", json!({"targets": [{"model": "a-1"}]}))];
    assert_eq!(done(&keep, &now, &[]).len(), 2, "nothing goes unless it is asked for");
    let gone = done(&keep, &now, &["deployments:a-*", "routes"]);
    assert_eq!(
        gone[2..],
        [("Route/r".to_owned(), Action::Delete), ("Deployment/a-2".to_owned(), Action::Delete)]
    );
    let all = plan(&wanted(&keep), &now, &[prune("NodePolicies").unwrap()]).unwrap_err();
    assert!(all[0].message.contains("all of them would be deleted"), "{all:?}");
    let needed = [("Deployment", "b-1", json!({})), ("Route", "r", json!({"targets": [{"model": "a-2"}]}))];
    let told = plan(&wanted(&needed), &now, &[prune("deployments").unwrap()]).unwrap_err()[0].to_string();
    assert!(told.contains("neither a deployment nor an adapter"), "{told}");
    for text in ["", "pods", "deployments:"] {
        prune(text).unwrap_err();
    }
}

#[test]
fn patterns_match_as_people_expect() {
    for (pattern, name, expected) in [
        ("*", "anything", true),
        ("a*", "abc", true),
        ("*c", "abc", true),
        ("a*c", "ac", true),
        ("a*a", "a", false),
        ("a*b*c", "a-b-c", true),
        ("a*b*c", "a-c-b", false),
        ("abc", "abc", true),
        ("abc", "abcd", false),
        ("**", "", true),
    ] {
        assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
    }
}
