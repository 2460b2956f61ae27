//! `connection():ssl()`: what the downstream handshake came to. A certificate that is not there has empty texts.

use std::sync::Arc;

use mlua::{Error, Lua, UserData, UserDataMethods, Value as LuaValue};
use tls::{
    certificate::{Certificate, url_encoded_pem},
    session::{Session, cipher_number},
};

use super::view::{Token, with};

/// The downstream connection's TLS.
#[derive(Debug, Clone, Copy)]
pub(super) struct SslConnection(pub(super) Token);

impl SslConnection {
    fn session(self, lua: &Lua) -> mlua::Result<Arc<Session>> {
        with(lua, self.0, |view| {
            view.about
                .tls
                .clone()
                .ok_or_else(|| Error::runtime("the connection has no TLS"))
        })
    }

    fn text(
        self,
        lua: &Lua,
        peer: bool,
        text: impl FnOnce(&Certificate) -> String,
    ) -> mlua::Result<String> {
        let session = self.session(lua)?;
        let certificate = if peer { &session.peer } else { &session.local };
        Ok(certificate.as_deref().map_or_else(String::new, text))
    }

    fn list(
        self,
        lua: &Lua,
        peer: bool,
        list: impl FnOnce(&Certificate) -> &[Box<str>],
    ) -> mlua::Result<Vec<String>> {
        let session = self.session(lua)?;
        let certificate = if peer { &session.peer } else { &session.local };
        let list = certificate.as_deref().map(list).unwrap_or_default();
        Ok(list.iter().map(|text| text.to_string()).collect())
    }

    fn time(self, lua: &Lua, time: impl FnOnce(&Certificate) -> i64) -> mlua::Result<f64> {
        let session = self.session(lua)?;
        Ok(session
            .peer
            .as_deref()
            .map_or(0.0, |peer| time(peer) as f64))
    }
}

impl UserData for SslConnection {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("peerCertificatePresented", |lua, this, ()| {
            Ok(this.session(lua)?.peer.is_some())
        });
        methods.add_method("peerCertificateValidated", |lua, this, ()| {
            Ok(this.session(lua)?.peer_trusted)
        });
        methods.add_method("uriSanLocalCertificate", |lua, this, ()| {
            this.list(lua, false, |c| &c.uris)
        });
        methods.add_method("uriSanPeerCertificate", |lua, this, ()| {
            this.list(lua, true, |c| &c.uris)
        });
        methods.add_method("dnsSansLocalCertificate", |lua, this, ()| {
            this.list(lua, false, |c| &c.dns)
        });
        methods.add_method("dnsSansPeerCertificate", |lua, this, ()| {
            this.list(lua, true, |c| &c.dns)
        });
        methods.add_method("sha256PeerCertificateDigest", |lua, this, ()| {
            this.text(lua, true, Certificate::fingerprint)
        });
        methods.add_method("serialNumberPeerCertificate", |lua, this, ()| {
            this.text(lua, true, |c| c.serial.to_string())
        });
        methods.add_method("issuerPeerCertificate", |lua, this, ()| {
            this.text(lua, true, |c| c.issuer.to_string())
        });
        methods.add_method("subjectPeerCertificate", |lua, this, ()| {
            this.text(lua, true, |c| c.subject.to_string())
        });
        methods.add_method("subjectLocalCertificate", |lua, this, ()| {
            this.text(lua, false, |c| c.subject.to_string())
        });
        methods.add_method("parsedSubjectPeerCertificate", |lua, this, ()| {
            Ok(this.session(lua)?.peer.clone().map(ParsedName))
        });
        methods.add_method("urlEncodedPemEncodedPeerCertificate", |lua, this, ()| {
            this.text(lua, true, Certificate::url_encoded_pem)
        });
        methods.add_method(
            "urlEncodedPemEncodedPeerCertificateChain",
            |lua, this, ()| {
                let session = this.session(lua)?;
                let chain = session.peer_chain.iter();
                Ok(chain.map(|der| url_encoded_pem(der)).collect::<String>())
            },
        );
        methods.add_method("validFromPeerCertificate", |lua, this, ()| {
            this.time(lua, |c| c.not_before)
        });
        methods.add_method("expirationPeerCertificate", |lua, this, ()| {
            this.time(lua, |c| c.not_after)
        });
        // Sessions of TLS 1.3 have no identifier that says anything; those of 1.2 are not kept.
        methods.add_method("sessionId", |lua, this, ()| {
            this.session(lua).map(|_| String::new())
        });
        methods.add_method("ciphersuiteId", |lua, this, ()| {
            let session = this.session(lua)?;
            let number = cipher_number(session.cipher).unwrap_or(0xffff);
            Ok(format!("0x{number:04x}"))
        });
        methods.add_method("ciphersuiteString", |lua, this, ()| {
            Ok(this.session(lua)?.cipher)
        });
        methods.add_method("tlsVersion", |lua, this, ()| Ok(this.session(lua)?.version));
        for name in ["oidsPeerCertificate", "oidsLocalCertificate"] {
            methods.add_method(name, move |_, _, ()| {
                Err::<LuaValue, _>(Error::runtime(format!("{name}() is not implemented")))
            });
        }
    }
}

/// `parsedSubjectPeerCertificate()`.
#[derive(Debug)]
struct ParsedName(Arc<Certificate>);

impl UserData for ParsedName {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("commonName", |_, this, ()| {
            Ok(this.0.subject_part("CN").unwrap_or_default())
        });
        methods.add_method("organizationName", |_, this, ()| {
            Ok(Vec::from_iter(this.0.subject_part("O")))
        });
    }
}
