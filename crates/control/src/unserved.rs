//! Objects that are read and not acted upon: each is a problem that the log, `/debug/problems` and `proxy-status` show.

use config::{Kind, Object, ObjectKey, Problem, Severity, Snapshot};

/// One problem for each object of a kind that translation does not know.
pub(crate) fn problems(snapshot: &Snapshot) -> Vec<Problem> {
    let mut out = Vec::new();
    let s = snapshot;
    all(&mut out, Kind::WasmPlugin, s.wasm_plugins.iter());
    all(
        &mut out,
        Kind::TrafficExtension,
        s.traffic_extensions.iter(),
    );
    out
}

fn all<'a, T: 'a>(
    out: &mut Vec<Problem>,
    kind: Kind,
    objects: impl Iterator<Item = &'a std::sync::Arc<Object<T>>>,
) {
    out.extend(objects.map(|o| Problem {
        severity: Severity::Warning,
        file: o.source.file.clone(),
        line: o.source.line,
        object: Some(ObjectKey::new(kind, &*o.meta.namespace, &*o.meta.name)),
        field: String::new(),
        message: format!("{kind} has no effect; this version does not translate it yet, so remove it or run istiod for it"),
    }));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_object_without_effect_is_a_warning_with_its_place() {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n\
            apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\n\
            metadata: {name: p, namespace: a}\nspec: {url: \"oci://example/p\"}\n";
        let (snapshot, _) = Snapshot::from_texts([(Path::new("p.yaml"), text)]);
        let found = problems(&snapshot);
        assert_eq!(found.len(), 1);
        let shown = found[0].to_string();
        assert!(found[0].severity == Severity::Warning, "{shown}");
        assert!(shown.starts_with("p.yaml:5: WasmPlugin a/p:"), "{shown}");
        assert!(shown.contains("has no effect"), "{shown}");
    }
}
