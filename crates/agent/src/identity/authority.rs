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
/// What a try gets at least.
const SHORTEST_PATIENCE: Duration = Duration::from_secs(2);

/// How long to wait for an answer while the certificate is good for another `left`: one try that hangs must not use
/// up all the time in which another could succeed.
pub(super) fn patience(left: Duration) -> Duration {
    match left.is_zero() {
        true => PATIENCE,
        false => (left / 3).clamp(SHORTEST_PATIENCE, PATIENCE),
    }
}

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
    patience: Duration,
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
    let answer = tokio::time::timeout(patience, answer)
        .await
        .map_err(|_| of(format!("no answer in {patience:.1?}")))?
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_that_hangs_leaves_time_for_another() {
        let seconds = Duration::from_secs;
        // Half of a life of ten seconds, of a minute, of a day; and where there is nothing to lose.
        assert_eq!(patience(seconds(5)), seconds(2));
        assert_eq!(patience(seconds(12)), seconds(4));
        assert_eq!(patience(seconds(43_200)), PATIENCE);
        assert_eq!(patience(Duration::ZERO), PATIENCE);
    }
}
