//! One copy of each encoded resource, however many views hold it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use xds::Resource;

/// Resources in use, by version (the hash of their content).
#[derive(Debug, Default)]
pub struct Interner(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    by_version: HashMap<u64, Vec<Weak<Resource>>>,
    sweep_at: usize,
}

impl Interner {
    /// The resource in use that equals `resource`, or this one from now on.
    pub fn intern(&self, resource: Resource) -> Arc<Resource> {
        let mut table = self.0.lock();
        if table.by_version.len() >= table.sweep_at {
            table.by_version.retain(|_, all| {
                all.retain(|r| r.strong_count() > 0);
                !all.is_empty()
            });
            table.sweep_at = (table.by_version.len() * 2).max(4096);
        }
        let same = table.by_version.entry(resource.version()).or_default();
        if let Some(found) = same
            .iter()
            .filter_map(Weak::upgrade)
            .find(|r| **r == resource)
        {
            return found;
        }
        same.retain(|r| r.strong_count() > 0);
        let resource = Arc::new(resource);
        same.push(Arc::downgrade(&resource));
        resource
    }
}
