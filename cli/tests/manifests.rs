//! The JSON schema of manifests and the program that reads them agree, and the examples pass both.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Map, Value, json};

const SCHEMA: &str = include_str!("../../docs/manifest.schema.json");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Whether the schema takes a document, and why not.
fn by_schema(document: &Value) -> Result<(), String> {
    let mut schemas = boon::Schemas::new();
    let mut compiler = boon::Compiler::new();
    compiler.add_resource("urn:penstock:manifest:v1", serde_json::from_str(SCHEMA).unwrap()).unwrap();
    let compiled = compiler.compile("urn:penstock:manifest:v1", &mut schemas).unwrap();
    schemas.validate(document, compiled).map_err(|error| error.to_string())
}

/// What the program's own check says, without any control plane: a bad document is 2, a good one finds nobody (3).
fn by_program(documents: &[Value]) -> Output {
    let mut command: Command = support::penstock();
    command.args(["diff", "-f", "-", "--controlplane", "http://127.0.0.1:9"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let text: String = documents.iter().map(|document| format!("---\n{document}\n")).collect();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn resolved<'a>(schema: &'a Value, part: &'a Value) -> &'a Value {
    let part = match part.get("$ref").and_then(Value::as_str) {
        Some(reference) => schema.pointer(reference.trim_start_matches('#')).unwrap(),
        None => part,
    };
    // "or null" of something.
    match part.get("oneOf").and_then(Value::as_array) {
        Some(either) => {
            resolved(schema, either.iter().find(|one| one.get("type") != Some(&json!("null"))).unwrap())
        }
        None => part,
    }
}

/// A value that the schema takes, as small as can be, and one that it does not.
fn samples(schema: &Value, part: &Value) -> (Value, Value) {
    let part = resolved(schema, part);
    if let Some(values) = part.get("enum").and_then(Value::as_array) {
        return (values[0].clone(), json!("something-else"));
    }
    if let Some(example) = part.pointer("/examples/0") {
        return (example.clone(), json!(7));
    }
    match part["type"].as_str().unwrap() {
        "integer" => (part["maximum"].clone(), json!(part["maximum"].as_u64().unwrap() + 1)),
        "number" => (part["maximum"].clone(), json!(part["maximum"].as_f64().unwrap() + 1.0)),
        "boolean" => (json!(true), json!("yes")),
        "string" => (json!("abc"), json!(7)),
        "array" => {
            let one = samples(schema, &part["items"]).0;
            (json!([one]), json!({}))
        }
        "object" => {
            let mut least = Map::new();
            for field in part.get("required").and_then(Value::as_array).into_iter().flatten() {
                let field = field.as_str().unwrap();
                least.insert(field.into(), samples(schema, &part["properties"][field]).0);
            }
            (Value::Object(least), json!([]))
        }
        other => panic!("no sample of {other}"),
    }
}

/// Every path in a part of the schema, with the part.
fn fields<'a>(schema: &'a Value, part: &'a Value, path: &[String], out: &mut Vec<(Vec<String>, &'a Value)>) {
    let part = resolved(schema, part);
    for (name, field) in part.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let inner = [path, std::slice::from_ref(name)].concat();
        out.push((inner.clone(), field));
        fields(schema, field, &inner, out);
    }
    if part.get("type") == Some(&json!("array")) {
        fields(schema, &part["items"], &[path, &["0".to_owned()]].concat(), out);
    }
}

/// The smallest document of a kind with `value` at a path in its spec.
fn document(schema: &Value, kind: &str, path: &[String], value: Value) -> Value {
    let spec = &schema["$defs"][format!("{kind}Spec")];
    let mut document = json!({"kind": kind, "name": "n", "spec": samples(schema, spec).0});
    let (mut at, mut part) = (&mut document["spec"], spec);
    for key in path {
        part = resolved(schema, part);
        if let Ok(index) = key.parse::<usize>() {
            part = &part["items"];
            if at.as_array().is_none_or(Vec::is_empty) {
                *at = json!([samples(schema, part).0]);
            }
            at = &mut at[index];
        } else {
            part = &part["properties"][key];
            if at.get(key).is_none() {
                at[key] = samples(schema, part).0;
            }
            at = &mut at[key];
        }
    }
    *at = value;
    document
}

/// What fields need of each other; a schema of single fields cannot say it.
fn company(document: &mut Value) {
    let spec = &mut document["spec"];
    if spec.pointer("/resources/share_gpu") == Some(&json!(true)) {
        spec["resources"]["gpu_memory_bytes"] = json!(1);
    }
    if spec.pointer("/max_lora_rank").or(spec.pointer("/max_loras")).is_some() {
        spec["lora"] = json!([{"name": "abc", "path": "abc"}]);
    }
    if spec.pointer("/autoscaling/idle_to_zero_s").is_some_and(|s| s != &json!(0)) {
        spec["autoscaling"]["min"] = json!(0);
    }
    if spec.pointer("/autoscaling/min").is_some_and(|min| min.as_u64().is_some_and(|min| min > 0)) {
        spec["autoscaling"]["max"] = json!(1_000_000);
    }
}

#[test]
fn the_schema_and_the_program_take_and_refuse_the_same() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for kind in ["Deployment", "Route", "NodePolicy"] {
        let spec = &schema["$defs"][format!("{kind}Spec")];
        let mut all = Vec::new();
        fields(&schema, spec, &[], &mut all);
        assert!(all.len() >= 4, "{kind}: {all:?}");
        for (path, part) in all {
            let (fits, does_not) = samples(&schema, part);
            let mut taken = document(&schema, kind, &path, fits);
            company(&mut taken);
            good.push(taken);
            bad.push((document(&schema, kind, &path, does_not), path.join(".")));
            // Beside it a field that nobody knows.
            let outer = &path[..path.len() - 1];
            let mut stranger = document(&schema, kind, &path, samples(&schema, part).0);
            let pointer: String = outer.iter().map(|key| format!("/{key}")).collect();
            stranger["spec"].pointer_mut(&pointer).unwrap()["zzzzzzzz"] = json!(1);
            bad.push((stranger, "zzzzzzzz".into()));
        }
    }
    for (n, document) in good.iter_mut().enumerate() {
        document["name"] = json!(format!("n{n}"));
        by_schema(document).unwrap_or_else(|error| panic!("{document}\n{error}"));
    }
    // All at once: the program tells every document that it refuses.
    let taken = by_program(&good);
    assert_eq!(taken.status.code(), Some(3), "{}", told(&taken));
    for (document, field) in &bad {
        assert!(by_schema(document).is_err(), "the schema takes {document}");
        assert!(!field.is_empty());
    }
    let documents: Vec<Value> = bad.iter().map(|(document, _)| document.clone()).collect();
    let refused = by_program(&documents);
    assert_eq!(refused.status.code(), Some(2));
    let told = told(&refused);
    for (n, (document, _)) in bad.iter().enumerate() {
        assert!(told.contains(&format!("(document {})", n + 1)), "the program takes {document}");
    }
}

#[test]
fn what_a_document_is_must_be_said_in_both() {
    for document in [
        json!({}),
        json!({"kind": "Deployment"}),
        json!({"kind": "Deploymnet", "name": "m"}),
        json!({"kind": "Deployment", "name": ""}),
        json!({"kind": "Deployment", "name": "a b"}),
        json!({"kind": "NodePolicy", "name": "a/b"}),
        json!({"kind": "Route", "name": "m"}),
        json!({"kind": "Deployment", "name": "m", "replicas": 1}),
        json!({"apiVersion": "v1", "kind": "Deployment", "name": "m"}),
    ] {
        assert!(by_schema(&document).is_err(), "{document}");
        let refused = by_program(std::slice::from_ref(&document));
        assert_eq!(refused.status.code(), Some(2), "{document}: {}", told(&refused));
    }
    for document in [
        json!({"kind": "Deployment", "name": "Qwen/Qwen2.5-7B"}),
        json!({"apiVersion": "penstock/v1", "kind": "NodePolicy", "name": "n.1", "spec": null}),
    ] {
        by_schema(&document).unwrap();
        assert_eq!(by_program(&[document]).status.code(), Some(3));
    }
}

#[test]
fn the_examples_pass_and_the_schema_is_what_the_command_prints() {
    let examples = root().join("deploy/examples");
    let files: Vec<PathBuf> =
        std::fs::read_dir(&examples).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(files.len() >= 2);
    let run = |args: &[&str]| support::penstock().args(args).output().unwrap();
    let folder = examples.to_str().unwrap();
    let output = run(&["diff", "-f", folder, "--controlplane", "http://127.0.0.1:9"]);
    assert_eq!(output.status.code(), Some(3), "{}", told(&output));
    assert_eq!(String::from_utf8(run(&["schema"]).stdout).unwrap(), SCHEMA);
    let toml: Value = toml::from_str(&std::fs::read_to_string(examples.join("fleet.toml")).unwrap()).unwrap();
    for document in toml["manifest"].as_array().unwrap() {
        by_schema(document).unwrap();
    }
    // YAML through the program: what it understood of the file is what the schema sees.
    let yaml = run(&["diff", "-f", &format!("{folder}/fleet.yaml"), "--controlplane", "http://127.0.0.1:9"]);
    assert_eq!(yaml.status.code(), Some(3), "{}", told(&yaml));
}
