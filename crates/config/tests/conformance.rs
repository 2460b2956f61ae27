//! Every object that a real istiod was given is accepted.

#[path = "../../testkit/src/conformance.rs"]
mod finder;

use std::{fs, path::Path};

use outrigger_config::{Kind, Severity, Snapshot};

#[test]
fn real_inputs_are_accepted() {
    let Some(dir) = finder::conformance("") else {
        return;
    };
    let base = dir.join("istiod-xds/mesh.yaml");
    let base_text = fs::read_to_string(&base).unwrap();
    let mut scenarios = 0;
    for entry in fs::read_dir(dir.join("istiod-xds")).unwrap() {
        let input = entry.unwrap().path().join("input.yaml");
        let Ok(text) = fs::read_to_string(&input) else {
            continue;
        };
        let texts: [(&Path, &str); 2] = [(&base, &base_text), (&input, &text)];
        let (snapshot, problems) = Snapshot::from_texts(texts);
        // Warnings are Istio's too.
        let errors = problems.iter().filter(|p| p.severity == Severity::Error);
        let shown: Vec<String> = errors.map(ToString::to_string).collect();
        assert!(shown.is_empty(), "{shown:#?}");
        for kind in [
            Kind::Namespace,
            Kind::Node,
            Kind::Service,
            Kind::Pod,
            Kind::EndpointSlice,
        ] {
            assert!(snapshot.count(kind) > 0, "{}: no {kind}", input.display());
        }
        scenarios += 1;
    }
    assert!(scenarios > 10, "only {scenarios} scenarios");
}
