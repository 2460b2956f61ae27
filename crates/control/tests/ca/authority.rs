//! The authority: its keys and roots, what it signs, and for how long.

use super::*;

#[test]
fn keys_are_made_once_and_for_nobody_else() {
    let dir = tempfile::tempdir().expect("dir");
    let first = authority(dir.path(), Clock::system()).roots();
    let mode = |name: &str| {
        let meta = fs::metadata(dir.path().join(name)).expect(name);
        meta.permissions().mode() & 0o777
    };
    assert_eq!((mode("state"), mode("state/ca-key.pem")), (0o700, 0o600));
    assert_eq!(authority(dir.path(), Clock::system()).roots(), first);

    let key = dir.path().join("state/ca-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("chmod");
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().join("none"),
    };
    let error = Authority::open(&files, "cluster.local", Clock::system()).expect_err("exposed");
    assert!(error.to_string().contains("make it 0600"), "{error}");
}

#[test]
fn half_a_plugged_authority_is_none() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("ca-cert.pem"), "x").expect("write");
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().to_owned(),
    };
    let error = Authority::open(&files, "cluster.local", Clock::system()).expect_err("half");
    assert!(
        error.to_string().contains("ca-key.pem is missing"),
        "{error}"
    );
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_certificate_is_for_the_caller_and_no_longer_than_asked() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = authority(dir.path(), Clock::system());
    let (csr, _) = request(&[WEB], false);
    let csr = Csr::read(&csr, &web()).expect("a good request");
    let chain = authority
        .sign(&web(), None, &csr, Duration::from_secs(3600))
        .expect("signed");
    assert_eq!(chain.len(), 2);
    assert_eq!(*chain[1], *authority.roots());
    let der = CertificateDer::from_pem_slice(chain[0].as_bytes()).expect("pem");
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).expect("x509");
    let names = leaf.subject_alternative_name().expect("san").expect("san");
    assert_eq!(
        format!("{:?}", names.value.general_names),
        format!("[URI({WEB:?})]")
    );
    assert!(
        names.critical,
        "without a subject the name must be understood"
    );
    assert!(!leaf.is_ca());
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 3600 + 120);
    let error = authority.sign(&web(), None, &csr, Duration::from_secs(91 * 24 * 3600));
    assert!(error.is_err());
}

#[test]
fn requests_for_more_than_the_caller_is_are_refused() {
    let refused = |csr: &str| Csr::read(csr, &web()).expect_err("refused").to_string();
    let (other, _) = request(&["spiffe://cluster.local/ns/shop/sa/admin"], false);
    assert!(refused(&other).contains("sa/admin"), "{}", refused(&other));
    let (two, _) = request(&[WEB, "spiffe://cluster.local/ns/shop/sa/admin"], false);
    assert!(refused(&two).contains("sa/admin"));
    let (ca, _) = request(&[WEB], true);
    assert!(refused(&ca).contains("CA certificate"), "{}", refused(&ca));
    let large = format!("{}{}", request(&[], false).0, " ".repeat(10 << 20));
    assert!(refused(&large).contains("at most"));
    assert!(
        refused("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
            .contains("PKCS#10")
    );
    // A key that the sender does not hold: the signature does not fit.
    let (good, _) = request(&[WEB], false);
    let at = good.len() - 60;
    let flipped = if &good[at..=at] == "A" { "B" } else { "A" };
    let forged = format!("{}{flipped}{}", &good[..at], &good[at + 1..]);
    assert!(Csr::read(&forged, &web()).is_err());
}

/// An RSA key of 1024 bits, with the signature that belongs to it.
const WEAK: &str = "\
-----BEGIN CERTIFICATE REQUEST-----
MIIBSzCBtQIBADAMMQowCAYDVQQKDAF4MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCB
iQKBgQDufsNSCv6SiNB2QZICzjlpH0aHnh1wGfm1nW8MT9OJvnkxUrtps4Uh9m1A
t06odmXVM4XL+pswF9v/OaVWHd8YKI5IR5IyVUGK4hipiNECkxPhei2GvnUkZnzU
Rv2NThYGlSl1w+8QFNFSof5AgLVFzlsAiCnqSAmKjDsaGiuGywIDAQABoAAwDQYJ
KoZIhvcNAQELBQADgYEADcHiTia//OGMjErNSIwhEjYBJ0Je4SnLMCb7T6ELMRjW
IiCy8JTG8Iqm2QSaHQooN/9vSbnPbQCrBHbRo0Ll3zq+rjCbWcJ7+wvTrvDXyUPM
E4FsEpNt983wdwj7laWhXooReWcLSuThGT1SFkzjg/nGxVl3VOTaYaUWYO6PI1I=
-----END CERTIFICATE REQUEST-----
";

#[test]
fn every_kind_of_key_is_signed_but_weak_ones() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = authority(dir.path(), Clock::system());
    for kind in [
        KeyKind::EcdsaP256,
        KeyKind::EcdsaP384,
        KeyKind::Rsa2048,
        KeyKind::Ed25519,
    ] {
        let made = KeyRequest::new(kind, WEB).expect("a request");
        let csr = Csr::read(&made.csr, &web()).expect("a good key");
        let chain = authority.sign(&web(), None, &csr, Duration::ZERO);
        let chain = chain.expect("signed");
        // They belong together: a proxy can use it.
        tls::identity::Identity::from_pem(chain[0].as_bytes(), made.key.as_bytes())
            .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
    }
    let why = Csr::read(WEAK, &web()).expect_err("too short").to_string();
    assert!(why.contains("an RSA key of 1024 bits"), "{why}");
}

#[test]
fn an_expired_authority_signs_nothing_and_says_so() {
    let dir = tempfile::tempdir().expect("dir");
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone());
    let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
    clock.set(start + Duration::from_secs(3651 * 24 * 3600));
    let error = authority
        .sign(&web(), None, &csr, Duration::ZERO)
        .expect_err("expired");
    assert!(error.to_string().contains("not valid now"), "{error}");
}

/// What a root is called by.
fn issuer_of(pem: &str) -> Vec<u8> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("pem");
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).expect("x509");
    // Roots of one trust domain have one name: their keys tell them apart.
    let id = leaf
        .iter_extensions()
        .find_map(|e| match e.parsed_extension() {
            x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => {
                id.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        });
    id.expect("an authority key identifier")
}

fn count(roots: &str) -> usize {
    roots.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn one_root_follows_another_and_both_are_trusted_while_either_is_needed() {
    let dir = tempfile::tempdir().expect("dir");
    let state = dir.path().join("state");
    let hour = Duration::from_secs(3600);
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let open = || authority(dir.path(), clock.clone()).with_overlap(hour);
    let csr = Csr::read(&request(&[WEB], false).0, &web()).expect("csr");
    let sign = |authority: &Authority| {
        let chain = authority
            .sign(&web(), None, &csr, 2 * hour)
            .expect("signed");
        assert_eq!(
            *chain[1],
            *authority.roots(),
            "the answer has the roots of the moment"
        );
        issuer_of(&chain[0])
    };
    let first = open();
    let (old, signed_by_old) = (first.roots(), sign(&first));
    first.turn().expect("nothing to do");
    assert_eq!(first.roots(), old);

    // Introduced: given out, and not signed with; also for a control plane that starts anew.
    fs::write(state.join("rotate"), "").expect("wish");
    first.turn().expect("introduced");
    assert!(!state.join("rotate").exists());
    for authority in [&first, &open()] {
        authority.turn().expect("waits");
        assert_eq!(count(&authority.roots()), 2);
        assert!(authority.roots().contains(&*old));
        assert_eq!(sign(authority), signed_by_old);
    }
    let given_out = fs::read_to_string(state.join("root-cert.pem")).expect("roots");
    assert_eq!(given_out, *first.roots());

    // A clock that is set back delays it, and one that is set forth does not skip a step.
    clock.set(start - hour);
    first.turn().expect("waits");
    assert_eq!(sign(&first), signed_by_old);
    clock.set(start + hour);
    first.turn().expect("switched");
    let second = open();
    for authority in [&first, &second] {
        assert_ne!(sign(authority), signed_by_old);
        assert_eq!(count(&authority.roots()), 2);
    }
    assert!(
        !state.join("ca-key.pem").exists(),
        "the key that signs no more"
    );
    let mode = |name: &str| {
        let meta = fs::metadata(state.join(name)).expect(name);
        meta.permissions().mode() & 0o777
    };
    assert_eq!(
        (mode("ca-2-key.pem"), mode("authority.json")),
        (0o600, 0o600)
    );

    // Dropped when the last certificate of the old one has ended.
    clock.set(start + 3 * hour - Duration::from_secs(2));
    second.turn().expect("waits");
    assert_eq!(count(&second.roots()), 2);
    clock.set(start + 3 * hour);
    second.turn().expect("dropped");
    assert_eq!(count(&second.roots()), 1);
    assert!(!second.roots().contains(&*old));
    assert_eq!(open().roots(), second.roots());
}

#[test]
fn a_new_root_does_not_sign_before_everybody_has_it() {
    let dir = tempfile::tempdir().expect("dir");
    let seconds = Duration::from_secs;
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone()).with_overlap(seconds(60));
    let csr = Csr::read(&request(&[WEB], false).0, &web()).expect("csr");
    let sign = |address: u8| {
        let from = Some([10, 0, 0, address].into());
        let chain = authority.sign(&web(), from, &csr, seconds(3600));
        issuer_of(&chain.expect("signed")[0])
    };
    let old = sign(1);
    assert_eq!(sign(2), old);
    fs::write(dir.path().join("state/rotate"), "").expect("wish");
    authority.turn().expect("introduced");
    // The overlap is over, and the second pod with this identity has not come back for its next certificate.
    assert_eq!(sign(1), old);
    clock.set(start + seconds(1800));
    authority.turn().expect("waits");
    assert_eq!(sign(1), old);
    assert_eq!(sign(2), old);
    authority.turn().expect("switched");
    assert_ne!(sign(1), old);
}

#[test]
fn a_root_is_replaced_before_it_ends() {
    let dir = tempfile::tempdir().expect("dir");
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone());
    let day = Duration::from_secs(24 * 3600);
    clock.set(start + 2900 * day);
    authority.turn().expect("nothing to do");
    assert_eq!(count(&authority.roots()), 1);
    clock.set(start + 2925 * day);
    authority.turn().expect("introduced");
    assert_eq!(count(&authority.roots()), 2);
}

#[test]
fn a_root_that_replicas_share_is_replaced_by_none_of_them() {
    let dir = tempfile::tempdir().expect("dir");
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone()).with_replicas(true);
    let before = authority.roots();
    let wish = dir.path().join("state/rotate");
    fs::write(&wish, "").expect("a wish");
    authority.turn().expect("told what to do");
    assert!(!wish.exists());
    let day = Duration::from_secs(24 * 3600);
    clock.set(start + 3649 * day);
    authority.turn().expect("told again");
    assert_eq!(authority.roots(), before);
    assert!(!dir.path().join("state/ca-2-key.pem").exists());
}

#[test]
fn a_plugged_authority_is_read_anew_where_its_old_root_is_still_trusted() {
    let dir = tempfile::tempdir().expect("dir");
    let make = || {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (
            params.self_signed(&key).expect("root").pem(),
            key.serialize_pem(),
        )
    };
    let put = |(root, key): &(String, String), roots: &str| {
        fs::write(dir.path().join("ca-key.pem"), key).expect("write");
        fs::write(dir.path().join("ca-cert.pem"), root).expect("write");
        fs::write(dir.path().join("cert-chain.pem"), "").expect("write");
        fs::write(dir.path().join("root-cert.pem"), roots).expect("write");
    };
    let (one, two) = (make(), make());
    put(&one, &one.0);
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().to_owned(),
    };
    let authority = Authority::open(&files, "cluster.local", Clock::system()).expect("plugged");
    let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
    let signed = || {
        let chain = authority
            .sign(&web(), None, &csr, Duration::ZERO)
            .expect("signed");
        issuer_of(&chain[0])
    };
    let first = signed();
    put(&two, &two.0);
    authority.turn().expect("refused with a word in the log");
    assert_eq!(*authority.roots(), *one.0);
    assert_eq!(signed(), first);
    put(&two, &format!("{}{}", one.0, two.0));
    authority.turn().expect("read");
    assert_eq!(count(&authority.roots()), 2);
    assert_ne!(signed(), first);
}

/// A key as `openssl ecparam -genkey` writes it, made for this test.
const SEC1: &str = "\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIBeGAUixNgtVK0/lsXV0fLyqdbVL+/zFZOy2himsVaQIoAoGCCqGSM49
AwEHoUQDQgAEEhle/SwoglLYo2VlF1glFKMjdAOXgV/pmjadAsKsiezSpmZJ1Z8f
gy7/L6a7VPxeYFJNjK5lSeUUn+djnYye1g==
-----END EC PRIVATE KEY-----
";

#[test]
fn a_plugged_key_may_be_written_in_each_of_its_forms() {
    let rsa = KeyRequest::new(KeyKind::Rsa2048, WEB).expect("a key").key;
    let pkcs8 = PrivateKeyDer::from_pem_slice(rsa.as_bytes()).expect("pem");
    // In PKCS#8 an RSA key is the last thing, and as it stands in PKCS#1: a sequence of more than 255 bytes.
    let der = pkcs8.secret_der();
    let begins = |at: &usize| der[*at..].starts_with(&[0x30, 0x82]) && *at > 0;
    let at = (0..der.len()).find(begins).expect("a key");
    let pkcs1 = pem("RSA PRIVATE KEY", &der[at..]);
    for text in [&*rsa, &*pkcs1, SEC1] {
        let dir = tempfile::tempdir().expect("dir");
        let key = KeyPair::from_pem(text).expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("root").pem();
        for (name, text) in [
            ("ca-key.pem", text),
            ("ca-cert.pem", &*root),
            ("cert-chain.pem", ""),
            ("root-cert.pem", &*root),
        ] {
            fs::write(dir.path().join(name), text).expect("write");
        }
        let files = Files {
            state: dir.path().join("state"),
            plugged: dir.path().to_owned(),
        };
        let authority = Authority::open(&files, "cluster.local", Clock::system());
        let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
        let chain = authority
            .unwrap_or_else(|e| panic!("{}: {e}", text.lines().next().unwrap_or_default()))
            .sign(&web(), None, &csr, Duration::ZERO)
            .expect("signed");
        let trust = tls::trust::Trust::from_pem(root.as_bytes()).expect("roots");
        let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).expect("pem");
        let validation = tls::verify::Validation {
            trust: Some(Arc::new(trust)),
            ..Default::default()
        };
        let now = rustls_pki_types::UnixTime::now();
        let judged = validation.judge(&leaf, &[], tls::verify::Role::Client, None, now);
        assert!(judged.is_ok(), "{:?}", judged.err());
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = (0..text.len())
        .step_by(64)
        .map(|at| &text[at..text.len().min(at + 64)])
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}
