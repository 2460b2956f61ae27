//! Scoped routes: which route configuration a request is looked up in, by a key made of its headers.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use super::{route::RouteConfiguration, route_match::RequestView};

/// `ScopedRoutes` whose scopes are given in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopedRoutes {
    /// How the key is made.
    pub fragments: Vec<FragmentBuilder>,
    /// The scope of each key.
    pub scopes: BTreeMap<Vec<Box<str>>, Scope>,
}

/// The routes of a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Given in place.
    Inline(Arc<RouteConfiguration>),
    /// Come by name (RDS).
    Named(Arc<str>),
}

/// `HeaderValueExtractor`: one part of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FragmentBuilder {
    /// Lower case.
    pub header: Arc<str>,
    /// Splits the value; empty takes it whole.
    pub separator: Box<str>,
    /// Which element of the value.
    pub part: FragmentPart,
}

/// Which element of a header's value is part of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FragmentPart {
    /// The one with this number.
    Index(usize),
    /// The value behind the key and separator, in the first element that has them.
    Element {
        /// Stands between key and value.
        separator: Box<str>,
        /// Key.
        key: Box<str>,
    },
}

impl ScopedRoutes {
    /// The scope of a request; `None` where no key can be made or none is known.
    pub fn find(&self, request: &(impl RequestView + ?Sized)) -> Option<&Scope> {
        let key: Vec<Box<str>> = self
            .fragments
            .iter()
            .map(|fragment| fragment.value(request))
            .collect::<Option<_>>()?;
        self.scopes.get(&key)
    }
}

impl FragmentBuilder {
    fn value(&self, request: &(impl RequestView + ?Sized)) -> Option<Box<str>> {
        let value: Cow<'_, [u8]> = request.header(&self.header)?;
        let value = std::str::from_utf8(&value).ok()?;
        let mut single = std::iter::once(value);
        let mut split = value.split(&*self.separator);
        let mut elements: &mut dyn Iterator<Item = &str> = match self.separator.is_empty() {
            true => &mut single,
            false => &mut split,
        };
        match &self.part {
            FragmentPart::Index(index) => elements.nth(*index),
            FragmentPart::Element { separator, key } => (&mut elements).find_map(|element| {
                let (name, value) = element.split_once(&**separator)?;
                (name == &**key).then_some(value)
            }),
        }
        .map(Into::into)
    }
}
