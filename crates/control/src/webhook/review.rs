//! AdmissionReview: the envelope of a question and of its answer.

use serde_json::{Map, Value, json};

/// A question of the API server.
#[derive(Debug)]
pub(super) struct Review {
    api_version: String,
    uid: String,
    /// Where the object is to live; its own text may leave that out.
    pub(super) namespace: String,
    /// The object, if there is one (a deletion has none).
    pub(super) object: Option<Value>,
}

/// Our answer.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It may pass, as it is or changed by a patch (RFC 6902).
    Allowed {
        patch: Vec<Value>,
        warnings: Vec<String>,
    },
    /// It may not, and why.
    Denied(String),
}

impl Verdict {
    pub(super) fn allowed() -> Self {
        Verdict::Allowed {
            patch: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl Review {
    /// Reads the envelope.
    ///
    /// # Errors
    /// The answer to give instead.
    pub(super) fn read(body: &[u8]) -> Result<Self, Value> {
        let refuse = |why: String| {
            let review = Review {
                api_version: "admission.k8s.io/v1".to_owned(),
                uid: String::new(),
                namespace: String::new(),
                object: None,
            };
            review.answer(Verdict::Denied(why))
        };
        let mut value: Value = serde_json::from_slice(body)
            .map_err(|e| refuse(format!("could not decode the request body: {e}")))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let api_version = text(&value["apiVersion"]);
        let known = ["admission.k8s.io/v1", "admission.k8s.io/v1beta1"];
        if !known.contains(&api_version.as_str()) || value["kind"] != "AdmissionReview" {
            return Err(refuse(format!(
                "not an AdmissionReview of {}: apiVersion {api_version:?}, kind {}",
                known.join(" or "),
                value["kind"]
            )));
        }
        let mut request = value["request"].take();
        if !request.is_object() {
            return Err(refuse("the AdmissionReview has no request".to_owned()));
        }
        Ok(Review {
            api_version,
            uid: text(&request["uid"]),
            namespace: text(&request["namespace"]),
            object: Some(request["object"].take()).filter(Value::is_object),
        })
    }

    /// The envelope of an answer.
    pub(super) fn answer(&self, verdict: Verdict) -> Value {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let mut response = Map::new();
        response.insert("uid".into(), self.uid.as_str().into());
        match verdict {
            Verdict::Denied(why) => {
                response.insert("allowed".into(), false.into());
                response.insert("status".into(), json!({"message": why, "code": 400}));
            }
            Verdict::Allowed { patch, warnings } => {
                response.insert("allowed".into(), true.into());
                if !patch.is_empty() {
                    let text = Value::Array(patch).to_string();
                    response.insert("patch".into(), BASE64_STANDARD.encode(text).into());
                    response.insert("patchType".into(), "JSONPatch".into());
                }
                if !warnings.is_empty() {
                    response.insert("warnings".into(), warnings.into());
                }
            }
        }
        json!({"apiVersion": self.api_version, "kind": "AdmissionReview", "response": response})
    }
}
