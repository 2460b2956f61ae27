//! Scoped routes that are given in place.

use std::{collections::BTreeMap, sync::Arc};

use proto::envoy::{
    config::route::v3 as route,
    extensions::filters::network::http_connection_manager::v3::{
        self as pb,
        scoped_routes::{ConfigSpecifier, scope_key_builder::fragment_builder as nested},
    },
};

use super::{common::header_name, route::route_configuration};
use crate::plan::{
    error::{At, Step},
    scoped_route::{FragmentBuilder, FragmentPart, Scope, ScopedRoutes},
};

/// `ScopedRoutes`, without the source that its named routes come from.
pub(super) fn scoped_routes(at: At<'_>, m: &pb::ScopedRoutes) -> Step<ScopedRoutes> {
    at.text("name", &m.name)?;
    let fragments = at.required("scope_key_builder", &m.scope_key_builder, |at, m| {
        if m.fragments.is_empty() {
            at.field("fragments").error("needs at least one fragment");
        }
        Ok(at.each("fragments", &m.fragments, |at, m| match &m.r#type {
            Some(nested::Type::HeaderValueExtractor(m)) => {
                fragment(at.field("header_value_extractor"), m)
            }
            None => Err(at.error("needs header_value_extractor")),
        }))
    })?;
    let list = match &m.config_specifier {
        Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) => list,
        Some(ConfigSpecifier::ScopedRds(_)) => {
            return Err(at
                .field("scoped_rds")
                .not_implemented("is not implemented; write scoped_route_configurations_list"));
        }
        None => return Err(at.error("needs scoped_route_configurations_list")),
    };
    let at = at.field("scoped_route_configurations_list");
    let mut scopes = BTreeMap::new();
    at.each(
        "scoped_route_configurations",
        &list.scoped_route_configurations,
        |at, m| {
            let (key, scope) = scope(at, m)?;
            if key.len() != fragments.len() {
                return Err(at.field("key").error(format!(
                    "has {} fragments; scope_key_builder makes {}",
                    key.len(),
                    fragments.len()
                )));
            }
            if scopes.insert(key, scope).is_some() {
                return Err(at.field("key").error("is the key of another scope already"));
            }
            Ok(())
        },
    );
    Ok(ScopedRoutes { fragments, scopes })
}

fn fragment(at: At<'_>, m: &nested::HeaderValueExtractor) -> Step<FragmentBuilder> {
    use nested::header_value_extractor::ExtractType as E;
    let part = match &m.extract_type {
        Some(E::Index(index)) => {
            if *index > 0 && m.element_separator.is_empty() {
                at.field("index")
                    .error("must be 0 where there is no element_separator");
            }
            FragmentPart::Index(*index as usize)
        }
        Some(E::Element(m)) => {
            let at = at.field("element");
            FragmentPart::Element {
                separator: (*at.text("separator", &m.separator)?).into(),
                key: (*at.text("key", &m.key)?).into(),
            }
        }
        None => return Err(at.error("needs one of index, element")),
    };
    Ok(FragmentBuilder {
        header: header_name(&at, "name", &m.name)?,
        separator: m.element_separator.as_str().into(),
        part,
    })
}

fn scope(at: At<'_>, m: &route::ScopedRouteConfiguration) -> Step<(Vec<Box<str>>, Scope)> {
    use route::scoped_route_configuration::key::fragment::Type as F;
    let route::ScopedRouteConfiguration {
        on_demand,
        name,
        route_configuration_name,
        route_configuration: inline,
        key,
    } = m;
    crate::plan::error::unsupported!(at, on_demand);
    at.text("name", name)?;
    let key = at.required("key", key, |at, m| {
        Ok(at.each("fragments", &m.fragments, |at, m| match &m.r#type {
            Some(F::StringKey(key)) => Ok(Box::from(key.as_str())),
            None => Err(at.error("needs string_key")),
        }))
    })?;
    let scope = match (inline, route_configuration_name.as_str()) {
        (Some(m), "") => Scope::Inline(Arc::new(route_configuration(
            at.field("route_configuration"),
            m,
        )?)),
        (None, "") => {
            return Err(at.error("needs one of route_configuration_name, route_configuration"));
        }
        (None, name) => Scope::Named(name.into()),
        (Some(_), _) => {
            return Err(
                at.error("only one of route_configuration_name, route_configuration can be given")
            );
        }
    };
    Ok((key, scope))
}
