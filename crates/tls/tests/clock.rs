//! Certificates are judged by the clock that both sides are given: stepped by an hour, it refuses what it took before.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use base::clock::Clock;
use outrigger_tls::{
    client::{ClientOptions, client, server_name},
    identity::Identity,
    parameters::Parameters,
    server::{Server, ServerOptions},
    trust::Trust,
    verify::Validation,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConnection, server::Acceptor};

const HOUR: Duration = Duration::from_secs(3600);

/// An authority for ever, and one who is good for half an hour around now.
fn made(now: SystemTime) -> (Identity, Arc<Validation>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let root = CertifiedIssuer::self_signed(params, key).expect("a root");
    let mut params = CertificateParams::new(vec!["peer".into()]).expect("a name");
    params.not_before = (now - HOUR / 4).into();
    params.not_after = (now + HOUR / 4).into();
    let key = KeyPair::generate().expect("a key");
    let leaf = params.signed_by(&key, &root).expect("signed").pem();
    let identity = Identity::from_pem(leaf.as_bytes(), key.serialize_pem().as_bytes());
    let trust = Trust::from_pem(root.pem().as_bytes()).expect("a bundle");
    let validation = Validation {
        trust: Some(Arc::new(trust)),
        ..Validation::default()
    };
    (identity.expect("they match"), Arc::new(validation))
}

/// A handshake in memory; what the client and what the server say to it.
fn shake(client_clock: &Clock, server_clock: &Clock) -> (Result<(), String>, Result<(), String>) {
    let (identity, validation) = made(SystemTime::now());
    let options = ServerOptions {
        parameters: Parameters::default(),
        alpn: Vec::new(),
        require_client_certificate: true,
        tickets: None,
        session_cache: false,
        prefer_client_ciphers: false,
        clock: server_clock.clone(),
    };
    let server = Server::new(&options, std::slice::from_ref(&identity), Some(&validation));
    let server = server.expect("a server");
    let options = ClientOptions {
        parameters: Parameters::default(),
        alpn: Vec::new(),
        session_names: 0,
        clock: client_clock.clone(),
    };
    let config = client(&options, Some(&identity), Some(&validation)).expect("a client");
    let name = server_name("peer").expect("a name");
    let mut here = ClientConnection::new(config, name).expect("begun");
    let mut wire = Vec::new();
    here.write_tls(&mut wire).expect("in memory");
    let mut acceptor = Acceptor::default();
    acceptor.read_tls(&mut &wire[..]).expect("in memory");
    let accepted = acceptor.accept().ok().flatten().expect("a whole hello");
    let (_, config) = server.choose(&accepted.client_hello());
    let mut there = accepted.into_connection(config).expect("begun");
    let (mut client_says, mut server_says) = (Ok(()), Ok(()));
    for _ in 0..4 {
        let mut wire = Vec::new();
        while there.wants_write() {
            there.write_tls(&mut wire).expect("in memory");
        }
        here.read_tls(&mut &wire[..]).expect("in memory");
        if let Err(e) = here.process_new_packets() {
            client_says = client_says.and(Err(e.to_string()));
        }
        let mut wire = Vec::new();
        while here.wants_write() {
            here.write_tls(&mut wire).expect("in memory");
        }
        there.read_tls(&mut &wire[..]).expect("in memory");
        if let Err(e) = there.process_new_packets() {
            server_says = server_says.and(Err(e.to_string()));
        }
    }
    (client_says, server_says)
}

#[test]
fn both_sides_judge_by_the_clock_that_they_were_given() {
    let now = SystemTime::now();
    let good = Clock::manual(now);
    assert_eq!(shake(&good, &good), (Ok(()), Ok(())));
    for (clock, word) in [
        (Clock::manual(now + HOUR), "expired"),
        (Clock::manual(now - HOUR), "not valid yet"),
    ] {
        let (client_says, _) = shake(&clock, &good);
        let why = client_says.expect_err("the server's certificate is not good now");
        assert!(why.to_lowercase().contains(word), "{word}: {why}");
        let (_, server_says) = shake(&good, &clock);
        let why = server_says.expect_err("the client's certificate is not good now");
        assert!(why.to_lowercase().contains(word), "{word}: {why}");
    }
}
