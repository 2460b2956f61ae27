//! A certificate of the mesh's authority: `istio.v1.auth.IstioCertificateService/CreateCertificate`.

use std::time::Duration;

use base::spiffe::Identity;
use proto::istio::v1::auth::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use tls::request::KeyRequest;
use tonic::Request;

use super::Options;
use crate::control_plane::ControlPlane;

/// An authority signs in milliseconds; one that needs longer is asked again later.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the authority gave for a key of ours.
pub(super) struct Signed {
    /// Leaf and what leads to the root, PEM.
    pub(super) chain: String,
    /// PKCS#8, PEM.
    pub(super) key: String,
    /// The roots that peers are trusted by, PEM.
    pub(super) roots: String,
}

/// Makes a key and has it certified.
pub(super) async fn sign(
    control_plane: &ControlPlane,
    identity: &Identity,
    options: &Options,
) -> Result<Signed, String> {
    let KeyRequest { csr, key } =
        KeyRequest::new(options.key, &identity.to_string()).map_err(|e| e.to_string())?;
    let mut request = Request::new(IstioCertificateRequest {
        csr,
        validity_duration: i64::try_from(options.lifetime.as_secs()).unwrap_or(i64::MAX),
        ..IstioCertificateRequest::default()
    });
    *request.metadata_mut() = control_plane.metadata()?;
    let answer = async {
        let channel = control_plane.connect().await?;
        let mut client = IstioCertificateServiceClient::new(channel);
        let answer = client.create_certificate(request).await;
        answer.map_err(|s| format!("{:?}: {}", s.code(), s.message()))
    };
    let of = |why: String| format!("authority {}: {why}", control_plane.address());
    let answer = tokio::time::timeout(PATIENCE, answer)
        .await
        .map_err(|_| of(format!("no answer in {PATIENCE:?}")))?
        .map_err(of)?;
    // The last is the roots, several where they are being replaced.
    let mut chain = answer.into_inner().cert_chain;
    let roots = chain.pop().unwrap_or_default();
    if chain.is_empty() {
        return Err(of("an answer without a certificate or without roots".into()));
    }
    for part in &mut chain {
        if !part.ends_with('\n') {
            part.push('\n');
        }
    }
    Ok(Signed {
        chain: chain.concat(),
        key,
        roots,
    })
}
