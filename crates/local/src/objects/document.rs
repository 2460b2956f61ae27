//! Reading the user's folder: files, their documents, and where each stands.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::error::{Doing, Error, Result};

/// One object of a file.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) file: PathBuf,
    /// Its first and last line, counted from 1.
    pub(crate) lines: (usize, usize),
    /// The object; for `kind: List` one of its items.
    pub(crate) value: Value,
}

/// A file of the folder.
#[derive(Debug)]
pub(crate) struct SourceFile {
    /// Its path below the folder.
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    pub(crate) documents: Result<Vec<Document>>,
}

/// Reads every YAML and JSON file below a folder (or one file), in order of their names.
pub(crate) fn read_folder(folder: &Path) -> Result<Vec<SourceFile>> {
    let mut paths = Vec::new();
    if folder.is_file() {
        paths.push(folder.to_owned());
    } else {
        collect(folder, &mut paths)?;
    }
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            // Removed while the folder was read: the next change event tells.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e).doing(|| format!("read {}", path.display())),
        };
        let relative = match path.strip_prefix(folder) {
            Ok(p) if !p.as_os_str().is_empty() => p.to_owned(),
            _ => PathBuf::from(path.file_name().unwrap_or_default()),
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let documents = parse(&path, &text);
        files.push(SourceFile {
            path: relative,
            text,
            documents,
        });
    }
    Ok(files)
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let what = || format!("read the folder {}", folder.display());
    for entry in fs::read_dir(folder).doing(what)? {
        let path = entry.doing(what)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            collect(&path, into)?;
        } else if path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            into.push(path);
        }
    }
    Ok(())
}

/// The documents of a file's text.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for (first, last, part) in split(text) {
        let fail = |line: usize, message: String| Error::Document {
            file: file.to_owned(),
            line,
            message,
        };
        if part
            .lines()
            .all(|l| l.trim().is_empty() || l.trim_start().starts_with('#'))
        {
            continue;
        }
        // Empty lines before it make the parser count lines as the file does.
        let padded = format!("{}{part}", "\n".repeat(first - 1));
        let value: Value = serde_saphyr::from_str(&padded).map_err(|e| {
            let line = e.location().map_or(first, |l| l.line() as usize);
            fail(
                line,
                format!(
                    "not YAML: {}",
                    e.to_string().lines().next().unwrap_or_default()
                ),
            )
        })?;
        if value.is_null() {
            continue;
        }
        let items = match (value["kind"].as_str(), value["items"].as_array()) {
            (Some(kind), Some(items)) if kind.ends_with("List") => items.clone(),
            _ => vec![value],
        };
        for value in items {
            for field in ["kind", "apiVersion"] {
                if value[field].as_str().is_none_or(str::is_empty) {
                    return Err(fail(
                        first,
                        format!("`{field}` is missing: every object of the folder needs one"),
                    ));
                }
            }
            let named = value["metadata"]["name"].is_string()
                || value["metadata"]["generateName"].is_string();
            if !named {
                return Err(fail(first, "`metadata.name` is missing".to_owned()));
            }
            documents.push(Document {
                file: file.to_owned(),
                lines: (first, last),
                value,
            });
        }
    }
    Ok(documents)
}

/// The parts between `---` lines, each with its first and last line.
fn split(text: &str) -> Vec<(usize, usize, String)> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut first = 1;
    let mut count = 0;
    for (i, line) in text.lines().enumerate() {
        count = i + 1;
        let rest = line
            .strip_prefix("---")
            .filter(|r| r.is_empty() || r.starts_with([' ', '\t']));
        match rest {
            Some(rest) => {
                parts.push((first, i, std::mem::take(&mut part)));
                first = i + 1;
                part.push_str(rest.trim_start());
            }
            None => part.push_str(line),
        }
        part.push('\n');
    }
    parts.push((first, count, part));
    parts.retain(|(_, _, p)| !p.trim().is_empty());
    parts
}

/// The text with some documents taken out, every other line where it was.
pub(crate) fn without_documents(text: &str, taken: &[(usize, usize)]) -> String {
    let mut out = String::with_capacity(text.len());
    for (i, line) in text.lines().enumerate() {
        let number = i + 1;
        let inside = taken
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&number));
        if !inside {
            out.push_str(line);
        } else if line.starts_with("---") {
            out.push_str("---");
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# a comment\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n---\napiVersion: v1\nkind: Service\n\
                        metadata:\n  name: web\n--- # last\nkind: ServiceAccount\napiVersion: v1\nmetadata: {name: s}\n";

    #[test]
    fn documents_know_their_lines() {
        let docs = parse(Path::new("x.yaml"), TEXT).unwrap();
        let lines: Vec<_> = docs.iter().map(|d| d.lines).collect();
        assert_eq!(lines, [(1, 5), (6, 10), (11, 14)]);
        assert_eq!(docs[2].value["metadata"]["name"], "s");
    }

    #[test]
    fn taking_a_document_out_moves_no_line() {
        let docs = parse(Path::new("x.yaml"), TEXT).unwrap();
        let rest = without_documents(TEXT, &[docs[1].lines]);
        assert_eq!(rest.lines().count(), TEXT.lines().count());
        assert_eq!(rest.lines().nth(11), Some("kind: ServiceAccount"));
        let again = parse(Path::new("x.yaml"), &rest).unwrap();
        assert_eq!(again.len(), 2);
        assert_eq!(again[1].lines.1, 14);
    }

    #[test]
    fn lists_are_opened() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n\
                    - {apiVersion: v1, kind: Pod, metadata: {name: b}}\n";
        assert_eq!(parse(Path::new("x"), text).unwrap().len(), 2);
    }

    #[test]
    fn mistakes_name_file_and_line() {
        let bad = format!("{TEXT}---\nkind: [\n");
        let e = parse(Path::new("dir/x.yaml"), &bad)
            .unwrap_err()
            .to_string();
        assert!(
            e.starts_with("dir/x.yaml:1") && e.contains("not YAML"),
            "{e}"
        );
        let e = parse(
            Path::new("x.yaml"),
            "---\n\nkind: Pod\nmetadata: {name: a}\n",
        )
        .unwrap_err()
        .to_string();
        assert!(
            e.starts_with("x.yaml:1:") && e.contains("`apiVersion` is missing"),
            "{e}"
        );
    }
}
