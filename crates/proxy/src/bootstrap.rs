//! Reads the bootstrap from files and text: YAML or JSON, merged, with all its mistakes at once.

mod old;

use std::{
    io,
    path::{Path, PathBuf},
};

use prost::{Message, Name};
use proto::{envoy::config::bootstrap::v3::Bootstrap as BootstrapMessage, json::JsonError};
use serde_json::Value;

use crate::plan::{Bootstrap, PlanError, PlanErrors};

/// What the command line says about the bootstrap.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config-path`.
    pub path: Option<PathBuf>,
    /// `--config-yaml`, merged over the file.
    pub yaml: Option<String>,
    /// `--service-node`, where the bootstrap has no `node.id`.
    pub service_node: String,
    /// `--service-cluster`, where the bootstrap has no `node.cluster`.
    pub service_cluster: String,
    /// `--service-zone`, where the bootstrap has no `node.locality.zone`.
    pub service_zone: String,
    /// `--allow-unknown-static-fields`: unknown fields are warnings.
    pub allow_unknown_fields: bool,
}

/// Why there is no bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// Nothing was given.
    #[error("no configuration: give a file with -c, or text with --config-yaml")]
    Missing,
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not YAML or JSON.
    #[error("{origin}: {message}")]
    Syntax {
        /// File name, or `--config-yaml`.
        origin: String,
        /// With line and column.
        message: String,
    },
    /// Its content is wrong.
    #[error("{}", .errors.0.iter().map(|e| format!("{origin}: {e}")).collect::<Vec<_>>().join("\n"))]
    Content {
        /// File name, or `--config-yaml`.
        origin: String,
        /// All mistakes.
        errors: PlanErrors,
    },
}

/// A bootstrap and what was tolerated in it.
#[derive(Debug)]
pub struct Loaded {
    /// The plan.
    pub bootstrap: Bootstrap,
    /// Unknown fields that were left out, one line each.
    pub warnings: Vec<String>,
}

/// Reads, merges and plans.
pub fn load(sources: &Sources) -> Result<Loaded, BootstrapError> {
    let mut texts = Vec::new();
    if let Some(path) = &sources.path {
        let text = std::fs::read_to_string(path).map_err(|source| BootstrapError::File {
            path: path.clone(),
            source,
        })?;
        texts.push((origin_of(path), text));
    }
    if let Some(text) = &sources.yaml {
        texts.push(("--config-yaml".to_owned(), text.clone()));
    }
    let origin = texts.first().ok_or(BootstrapError::Missing)?.0.clone();
    let mut encoded = Vec::new();
    let mut errors = Vec::new();
    let mut warnings = Vec::new();
    for (origin, text) in &texts {
        // Straight to the wire; what is wrong in any way is read again, for all its mistakes at once.
        let full_name = BootstrapMessage::full_name();
        if let Ok(message) = proto::json::text_to_encoded(&full_name, text, NODES) {
            encoded.extend(message);
            continue;
        }
        let read =
            read(text, sources.allow_unknown_fields).map_err(|message| BootstrapError::Syntax {
                origin: origin.clone(),
                message,
            })?;
        // Concatenated encodings are the merge that protobuf defines: the later value of a field counts, lists grow.
        encoded.extend(read.message.encode_to_vec());
        errors.extend(read.errors);
        warnings.extend(read.warnings.iter().map(|w| format!("{origin}: {w}")));
    }
    let mut message = BootstrapMessage::decode(encoded.as_slice())
        .expect("encodings of two messages of one type, one after the other, are one");
    drop((encoded, texts));
    #[expect(deprecated, reason = "it is taken, with a warning")]
    let text_log = message
        .admin
        .as_mut()
        .map(|admin| std::mem::take(&mut admin.access_log_path));
    if let Some(path) = text_log
        && !matches!(path.as_str(), "" | "/dev/null")
    {
        // Legal still, and without effect: kept out of the message on purpose.
        warnings.push(format!(
            "{origin}: admin.access_log_path ({path}) has no effect; write access_log"
        ));
    }
    let node = message.node.get_or_insert_default();
    for (field, given) in [
        (&mut node.id, &sources.service_node),
        (&mut node.cluster, &sources.service_cluster),
    ] {
        if field.is_empty() {
            field.clone_from(given);
        }
    }
    if !sources.service_zone.is_empty() {
        let locality = node.locality.get_or_insert_default();
        if locality.zone.is_empty() {
            locality.zone.clone_from(&sources.service_zone);
        }
    }
    let planned = Bootstrap::try_from(&message);
    let more = planned
        .as_ref()
        .err()
        .map(|e| e.0.clone())
        .unwrap_or_default();
    // A value that was taken out as wrong leaves a hole that the plan complains about again.
    let hole = |e: &PlanError| snake_case(e.path.strip_suffix(".@type").unwrap_or(&e.path));
    let holes: Vec<String> = errors.iter().map(hole).collect();
    errors.extend(more.into_iter().filter(|e| !holes.contains(&e.path)));
    match planned {
        Ok(bootstrap) if errors.is_empty() => Ok(Loaded {
            bootstrap,
            warnings,
        }),
        _ => Err(BootstrapError::Content {
            origin,
            errors: PlanErrors(errors),
        }),
    }
}

fn origin_of(path: &Path) -> String {
    path.display().to_string()
}

/// Room for a static configuration of a million clusters.
const NODES: usize = 50_000_000;

struct Read {
    message: BootstrapMessage,
    errors: Vec<PlanError>,
    warnings: Vec<String>,
}

/// Reads one text, going on after each mistake without the value that is wrong.
fn read(text: &str, allow_unknown_fields: bool) -> Result<Read, String> {
    let mut value = proto::json::yaml_of_size(text, NODES).map_err(|e| e.to_string())?;
    if value.is_null() {
        value = Value::Object(serde_json::Map::new());
    }
    let mut errors = old::modernize(&mut value);
    let mut warnings = Vec::new();
    // Each turn takes one value out, so this ends.
    loop {
        match proto::json::from_envoy_value::<BootstrapMessage>(&value) {
            Ok(message) => {
                return Ok(Read {
                    message,
                    errors,
                    warnings,
                });
            }
            Err(JsonError::Syntax(message)) => return Err(message),
            Err(JsonError::Field { path, message }) => {
                // An extension of unknown type goes as a whole.
                let hole = path.strip_suffix(".@type").unwrap_or(&path);
                let taken_out = !hole.is_empty() && take_out(&mut value, hole);
                if allow_unknown_fields && message.starts_with("unknown field") {
                    warnings.push(format!("{path}: {message}"));
                } else {
                    errors.push(PlanError {
                        path: path.clone(),
                        message,
                    });
                }
                if !taken_out {
                    return Ok(Read {
                        message: BootstrapMessage::default(),
                        errors,
                        warnings,
                    });
                }
            }
        }
    }
}

/// Removes the value at a path as [`JsonError`] writes it.
fn take_out(root: &mut Value, path: &str) -> bool {
    let segments = segments(path);
    let Some((last, way)) = segments.split_last() else {
        return false;
    };
    let mut value = root;
    for segment in way {
        let next = match segment {
            Segment::Index(index) => value.get_mut(*index),
            Segment::Name(name) => value.get_mut(name.as_str()),
        };
        let Some(next) = next else { return false };
        value = next;
    }
    match (last, value) {
        (Segment::Name(name), Value::Object(members)) => members.remove(name).is_some(),
        // The others keep their numbers.
        (Segment::Index(index), Value::Array(list)) => match list.get_mut(*index) {
            Some(element) if *element != Value::Object(Default::default()) => {
                *element = Value::Object(Default::default());
                true
            }
            _ => false,
        },
        _ => false,
    }
}

enum Segment {
    Name(String),
    Index(usize),
}

/// `a.b[3].c["key"]` in parts.
fn segments(path: &str) -> Vec<Segment> {
    let mut list = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix("[\"") {
            let end = inner.find("\"]").unwrap_or(inner.len());
            list.push(Segment::Name(inner[..end].to_owned()));
            rest = inner.get(end + 2..).unwrap_or_default();
        } else if let Some(inner) = rest.strip_prefix('[') {
            let end = inner.find(']').unwrap_or(inner.len());
            list.push(Segment::Index(inner[..end].parse().unwrap_or(usize::MAX)));
            rest = inner.get(end + 1..).unwrap_or_default();
        } else {
            let name = rest.strip_prefix('.').unwrap_or(rest);
            let end = name.find(['.', '[']).unwrap_or(name.len());
            list.push(Segment::Name(name[..end].to_owned()));
            rest = &name[end..];
        }
    }
    list
}

/// Names of plan errors are those of the API; a JSON text may write them in lowerCamelCase.
fn snake_case(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests;
