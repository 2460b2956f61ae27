//! Header operations.

use std::sync::Arc;

use proto::envoy::{
    config::{common::mutation_rules::v3 as rules, core::v3 as core},
    extensions::http::early_header_mutation::header_mutation::v3 as early,
};

use super::common::{enumeration, header_name, string_matcher, typed_config};
use crate::plan::{
    error::{At, Step},
    format::Template,
    header::{AppendAction, HeaderAdd, HeaderMutation, HeaderMutations, Joined},
    route::HeaderOperations,
};

/// The four lists of header operations that routes, virtual hosts and configurations have.
pub(super) fn operations(
    at: &At<'_>,
    request_add: &[core::HeaderValueOption],
    request_remove: &[String],
    response_add: &[core::HeaderValueOption],
    response_remove: &[String],
) -> HeaderOperations {
    let remove = |field: &str, names: &[String]| {
        at.each(field, names, |at, name| {
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                return Err(at.error(format!("`{name}` cannot be removed")));
            }
            Ok(Arc::from(name.to_ascii_lowercase()))
        })
    };
    HeaderOperations {
        request: HeaderMutations {
            add: at.each("request_headers_to_add", request_add, header_add),
            remove: remove("request_headers_to_remove", request_remove),
        },
        response: HeaderMutations {
            add: at.each("response_headers_to_add", response_add, header_add),
            remove: remove("response_headers_to_remove", response_remove),
        },
    }
}

/// `HeaderMutation`s of a list field.
pub(super) fn header_mutations(
    at: &At<'_>,
    field: &str,
    list: &[rules::HeaderMutation],
) -> Vec<HeaderMutation> {
    use rules::header_mutation::Action as A;
    at.each(field, list, |at, m| match &m.action {
        Some(A::Remove(name)) => {
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                return Err(at
                    .field("remove")
                    .error(format!("`{name}` cannot be removed")));
            }
            Ok(HeaderMutation::Remove(header_name(&at, "remove", name)?))
        }
        Some(A::Append(m)) => header_add(at.field("append"), m).map(HeaderMutation::Append),
        Some(A::RemoveOnMatch(m)) => at
            .field("remove_on_match")
            .required("key_matcher", &m.key_matcher, string_matcher)
            .map(HeaderMutation::RemoveOnMatch),
        None => Err(at.error("needs one of remove, append, remove_on_match")),
    })
}

/// One of `early_header_mutation_extensions`.
pub(super) fn early_header_mutations(
    at: At<'_>,
    m: &core::TypedExtensionConfig,
) -> Step<Vec<HeaderMutation>> {
    let found = typed_config(&at, &m.typed_config, "early header mutation")?;
    let at = at.field("typed_config");
    if found.name != "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    {
        return Err(found.unknown(&at, "early header mutation"));
    }
    let m: early::HeaderMutation = found.decode(&at)?;
    if m.mutations.is_empty() {
        return Err(at.field("mutations").error("needs at least one mutation"));
    }
    Ok(header_mutations(&at, "mutations", &m.mutations))
}

/// `HeaderValueOption`s of a list field.
pub(super) fn header_adds(
    at: &At<'_>,
    field: &str,
    list: &[core::HeaderValueOption],
) -> Vec<HeaderAdd> {
    at.each(field, list, header_add)
}

pub(super) fn header_add(at: At<'_>, m: &core::HeaderValueOption) -> Step<HeaderAdd> {
    use core::header_value_option::HeaderAppendAction as A;
    let core::HeaderValueOption {
        header,
        append,
        append_action,
        keep_empty_value,
    } = m;
    let action = enumeration(&at, "append_action", *append_action)?;
    if append.is_some() && action != A::AppendIfExistsOrAdd {
        at.field("append")
            .error("cannot be given together with append_action");
    }
    let action = match action {
        // The deprecated switch says the same where the action says nothing.
        A::AppendIfExistsOrAdd if *append == Some(false) => AppendAction::OverwriteIfExistsOrAdd,
        A::AppendIfExistsOrAdd => AppendAction::AppendIfExistsOrAdd,
        A::AddIfAbsent => AppendAction::AddIfAbsent,
        A::OverwriteIfExistsOrAdd => AppendAction::OverwriteIfExistsOrAdd,
        A::OverwriteIfExists => AppendAction::OverwriteIfExists,
    };
    at.required("header", header, |at, m| {
        let name = header_name(&at, "key", &m.key)?;
        if name.starts_with(':') || &*name == "host" {
            let message = format!("`{name}` cannot be changed here; use a host or path rewrite");
            return Err(at.field("key").error(message));
        }
        let raw;
        let text = match m.raw_value.is_empty() {
            true => m.value.as_str(),
            false => {
                raw = String::from_utf8(m.raw_value.clone())
                    .map_err(|_| at.field("raw_value").error("must be UTF-8"))?;
                &raw
            }
        };
        let value = Template::parse(text).map_err(|why| at.field("value").error(why))?;
        Ok(HeaderAdd {
            joined: Joined::of(&name),
            name,
            value,
            action,
            keep_empty_value: *keep_empty_value,
        })
    })
}
