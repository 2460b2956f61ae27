//! ReferenceGrants: which references across namespaces are allowed.

use std::collections::BTreeSet;

use config::Kind;

use super::Inputs;

/// Who (kind, namespace) may refer to what (group, kind, namespace, name or all).
type Entry = (Kind, String, String, String, String, Option<String>);

/// All grants.
#[derive(Debug, Default)]
pub(super) struct Grants(BTreeSet<Entry>);

impl Grants {
    pub(super) fn new(inputs: &Inputs<'_>) -> Self {
        let mut out = BTreeSet::new();
        let counted = inputs
            .snapshot
            .reference_grants
            .iter()
            .filter(|o| (inputs.takes)(&o.meta.namespace));
        for grant in counted {
            for from in &grant.spec.from {
                // Other kinds may be somebody else's.
                let Some(kind) = Kind::find(&from.group, &from.kind) else {
                    continue;
                };
                for to in &grant.spec.to {
                    out.insert((
                        kind,
                        from.namespace.clone(),
                        to.group.clone(),
                        to.kind.clone(),
                        grant.meta.namespace.clone(),
                        to.name.clone(),
                    ));
                }
            }
        }
        Grants(out)
    }

    /// Whether an object of `from` (kind, namespace) may refer to `to` (group, kind, namespace, name).
    pub(super) fn allow(&self, from: (Kind, &str), to: (&str, &str, &str, &str)) -> bool {
        let (group, kind, namespace, name) = to;
        from.1 == namespace
            || [None, Some(name.to_owned())].into_iter().any(|name| {
                self.0.contains(&(
                    from.0,
                    from.1.to_owned(),
                    group.to_owned(),
                    kind.to_owned(),
                    namespace.to_owned(),
                    name,
                ))
            })
    }
}
