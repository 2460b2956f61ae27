#[path = "../../../testkit/src/conformance.rs"]
mod finder;

use std::{fs, path::Path};

use serde_json::Value;

use crate::{Severity, Snapshot, yaml};

/// Verdicts in which we differ from Istio's validation, each with its reason.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "filter-bad-cel",
        "expressions of access log filters are not parsed yet",
    ),
    ("apply-to-none", "EnvoyFilter is checked when it is applied"),
];

#[test]
fn verdicts_are_istios() {
    let Some(path) = finder::conformance("validation/cases.yaml") else {
        return;
    };
    let text = fs::read_to_string(path).unwrap();
    let (mut wrong, mut cases) = (Vec::new(), 0);
    for case in yaml::documents(&text) {
        let case = case.unwrap().value;
        let object = case["object"].to_string();
        let name = case["object"]["metadata"]["name"]
            .as_str()
            .unwrap()
            .to_owned();
        // What the API server's schema refuses never reaches validation: either verdict refuses the object.
        let accepted = case["validate"]["accepted"] == Value::Bool(true)
            && case["schema"]["accepted"] == Value::Bool(true);
        let (_, problems) = Snapshot::from_texts([(Path::new("case"), object.as_str())]);
        let errors: Vec<String> = problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .map(ToString::to_string)
            .collect();
        cases += 1;
        let known = DIFFERENT.iter().any(|(n, _)| *n == name);
        if errors.is_empty() != accepted && !known {
            wrong.push(format!(
                "{name}: accepted by Istio: {accepted}; we say {errors:?}; Istio: {}",
                case["validate"]
            ));
        }
        if errors.is_empty() == accepted && known {
            wrong.push(format!("{name}: agrees by now; take it off the list"));
        }
        for p in problems.iter().filter(|p| p.severity == Severity::Error) {
            assert!(!p.field.is_empty(), "{p}");
        }
    }
    assert!(cases > 100, "{cases}");
    assert!(
        wrong.is_empty(),
        "{} of {cases}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
