//! Plans that are made when somebody asks for them.

use std::{fmt, ops::Deref, sync::OnceLock};

use bytes::Bytes;

use super::{read, route::VirtualHost};

/// A virtual host, planned once to find what is wrong with it and, where there are many, again at its first request:
/// between the two it is its encoding, a tenth of its plan.
#[derive(Clone)]
pub struct LazyVirtualHost {
    /// Empty where the plan was kept.
    encoded: Bytes,
    /// `max_direct_response_body_size_bytes` of its route configuration.
    body_limit: u32,
    plan: OnceLock<Box<VirtualHost>>,
}

impl LazyVirtualHost {
    /// What has this encoding, and was planned without an error.
    pub(crate) fn later(encoded: Bytes, body_limit: usize) -> Self {
        Self {
            encoded,
            body_limit: u32::try_from(body_limit).unwrap_or(u32::MAX),
            plan: OnceLock::new(),
        }
    }
}

impl From<VirtualHost> for LazyVirtualHost {
    fn from(plan: VirtualHost) -> Self {
        Self {
            encoded: Bytes::new(),
            body_limit: 0,
            plan: OnceLock::from(Box::new(plan)),
        }
    }
}

impl Deref for LazyVirtualHost {
    type Target = VirtualHost;

    fn deref(&self) -> &VirtualHost {
        self.plan
            .get_or_init(|| Box::new(read::virtual_host(&self.encoded, self.body_limit as usize)))
    }
}

/// The same encoding is the same plan; else the plans are compared.
impl PartialEq for LazyVirtualHost {
    fn eq(&self, other: &Self) -> bool {
        let same = !self.encoded.is_empty()
            && (&self.encoded, self.body_limit) == (&other.encoded, other.body_limit);
        same || **self == **other
    }
}

impl Eq for LazyVirtualHost {}

impl fmt::Debug for LazyVirtualHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
