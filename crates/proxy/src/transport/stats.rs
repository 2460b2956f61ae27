//! What handshakes count (`listener.ADDRESS.ssl.`, `cluster.NAME.ssl.`), with Envoy's names.

use stats::Scope;
use tls::session::{FailureKind, Session};

use super::HandshakeError;

stats::group! {
    /// Counts of handshakes.
    pub(crate) struct SslStats {
        counter connection_error,
        counter fail_verify_cert_hash,
        counter fail_verify_error,
        counter fail_verify_no_cert,
        counter fail_verify_san,
        counter handshake,
        counter no_certificate,
        counter session_reused,
    }
}

impl SslStats {
    /// Below a listener's or a cluster's scope.
    pub(super) fn below(scope: &Scope) -> Self {
        Self::new(scope.scope("ssl."))
    }

    pub(super) fn established(&self, session: &Session) {
        self.handshake().inc();
        if session.resumed {
            self.session_reused().inc();
        }
        if session.peer.is_none() {
            self.no_certificate().inc();
        }
        // By name, since there are few of each and a handshake is dear.
        let count = |kind: &str, name: &str| {
            if !name.is_empty() {
                self.scope().counter(&format!("{kind}.{name}")).inc();
            }
        };
        count("ciphers", session.cipher);
        count("versions", session.version);
        count("curves", session.group.unwrap_or_default());
    }

    pub(super) fn failed(&self, error: &HandshakeError) {
        let HandshakeError::Failed(failure) = error else {
            return;
        };
        match failure.kind {
            FailureKind::NoCertificate => self.fail_verify_no_cert().inc(),
            FailureKind::Chain => self.fail_verify_error().inc(),
            FailureKind::Name => self.fail_verify_san().inc(),
            FailureKind::Pin => self.fail_verify_cert_hash().inc(),
            FailureKind::Protocol => self.connection_error().inc(),
            FailureKind::Closed => {}
        }
    }
}
