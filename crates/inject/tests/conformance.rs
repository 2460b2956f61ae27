//! What our kube-inject makes of a pod, against what the real one makes of it. Compared as data.

#[path = "../../testkit/src/conformance.rs"]
mod finder;

use std::fs;

use inject::{Settings, Values, workload};
use outrigger_inject as inject;
use serde_json::Value;

fn documents(text: &str) -> Vec<Value> {
    config::yaml::documents(text)
        .into_iter()
        .map(|d| {
            d.unwrap_or_else(|e| panic!("line {}: {}", e.line, e.message))
                .value
        })
        .filter(|v| !v.is_null())
        .collect()
}

fn settings(folder: &std::path::Path) -> Settings {
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).unwrap();
        documents(&text).remove(0)
    };
    let mesh = config::mesh::merge(&read("mesh.yaml")).unwrap().config;
    Settings::new(Values::new(&read("values.json")).unwrap(), mesh)
}

/// Without empty fields, which do not matter.
fn clean(value: &Value) -> Value {
    match value {
        Value::Object(object) => object
            .iter()
            .map(|(k, v)| (k.clone(), clean(v)))
            .filter(|(_, v)| !empty(v))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(clean).collect(),
        other => other.clone(),
    }
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(o) => o.is_empty(),
        Value::Array(a) => a.is_empty(),
        _ => false,
    }
}

fn differences(path: &str, expected: &Value, found: &Value, out: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(e), Value::Object(f)) => {
            for key in e.keys().chain(f.keys().filter(|k| !e.contains_key(*k))) {
                let (e, f) = (
                    e.get(key).unwrap_or(&Value::Null),
                    f.get(key).unwrap_or(&Value::Null),
                );
                differences(&format!("{path}.{key}"), e, f, out);
            }
        }
        (Value::Array(e), Value::Array(f)) if e.len() == f.len() => {
            for (i, (e, f)) in e.iter().zip(f).enumerate() {
                differences(&format!("{path}[{i}]"), e, f, out);
            }
        }
        _ if expected == found => {}
        _ => out.push(format!(
            "{path}:\n  expected {expected}\n  found    {found}"
        )),
    }
}

#[test]
fn every_case_is_equal_as_data() {
    let Some(folder) = finder::conformance("kube-inject") else {
        return;
    };
    let settings = settings(&folder);
    let mut problems = Vec::new();
    let mut cases = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let case = entry.unwrap().path();
        let Ok(input) = fs::read_to_string(case.join("input.yaml")) else {
            continue;
        };
        cases += 1;
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let expected = fs::read_to_string(case.join("output.yaml")).unwrap();
        let mut warnings = Vec::new();
        let found: Vec<Value> = documents(&input)
            .iter()
            .map(|object| {
                let injected = workload::object(object, &settings, &mut warnings);
                injected
                    .unwrap_or_else(|e| panic!("{name}: {e}"))
                    .unwrap_or(object.clone())
            })
            .collect();
        let printed: String = found
            .iter()
            .map(|o| format!("{}---\n", inject::yaml::print(o)))
            .collect();
        assert_eq!(
            documents(&printed),
            found,
            "{name}: YAML does not read back"
        );
        let (expected, found) = (Value::from(documents(&expected)), Value::from(found));
        let before = problems.len();
        differences(&name, &clean(&expected), &clean(&found), &mut problems);
        // What is injected stays as it is when it is injected again.
        if problems.len() == before {
            for object in found.as_array().unwrap() {
                let again = workload::object(object, &settings, &mut Vec::new())
                    .unwrap()
                    .unwrap();
                differences(&format!("{name}, again"), object, &again, &mut problems);
            }
        }
        let told: String = match warnings.is_empty() {
            true => String::new(),
            false => format!("\n{}\n", warnings.join("\n")),
        };
        let stderr = fs::read_to_string(case.join("stderr.txt")).unwrap_or_default();
        if !stderr.starts_with("Error:") && told != stderr {
            problems.push(format!(
                "{name}: stderr:\n  expected {stderr:?}\n  found    {told:?}"
            ));
        }
    }
    assert!(cases > 0);
    assert!(
        problems.is_empty(),
        "{} differences:\n{}",
        problems.len(),
        problems.join("\n")
    );
    println!("{cases} cases");
}
