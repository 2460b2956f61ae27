use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};

use super::*;
use crate::trust::revocation_lists;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed")
}

fn leaf(
    issuer: &Authority,
    uris: &[&str],
    edit: impl FnOnce(&mut CertificateParams),
) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(vec!["a.example".into()]).expect("a good name");
    for uri in uris {
        let uri = (*uri).try_into().expect("ASCII");
        params.subject_alt_names.push(SanType::URI(uri));
    }
    edit(&mut params);
    let key = KeyPair::generate().expect("a key");
    params
        .signed_by(&key, issuer)
        .expect("signed")
        .der()
        .clone()
}

fn trust(issuer: &Authority) -> Arc<Trust> {
    Arc::new(Trust::from_pem(issuer.pem().as_bytes()).expect("a bundle"))
}

fn judge(validation: &Validation, der: &CertificateDer<'_>) -> Result<Standing, String> {
    validation
        .judge(der, &[], Role::Client, None, UnixTime::now())
        .map_err(|refusal| refusal.to_string())
}

const A: &str = "spiffe://one/ns/a/sa/a";

#[test]
fn a_chain_must_lead_to_a_trusted_certificate() {
    let (ca, other) = (authority("root"), authority("root"));
    let validation = Validation {
        trust: Some(trust(&ca)),
        ..Validation::default()
    };
    let good = leaf(&ca, &[A], |_| {});
    assert_eq!(judge(&validation, &good), Ok(Standing::Trusted));
    let stranger = leaf(&other, &[A], |_| {});
    assert!(judge(&validation, &stranger).is_err());
    let anybody = Validation {
        accept_untrusted: true,
        ..validation.clone()
    };
    assert_eq!(judge(&anybody, &stranger), Ok(Standing::Untrusted));
    assert_eq!(
        judge(&Validation::default(), &stranger),
        Ok(Standing::Untrusted)
    );
    // A certificate that is trusted by itself, authority or not.
    assert_eq!(judge(&validation, ca.der()), Ok(Standing::Trusted));
    // A server's certificate is no client's.
    let server = leaf(&ca, &[A], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let said = judge(&validation, &server).expect_err("not for clients");
    assert!(said.contains("extended key usage"), "{said}");
}

#[test]
fn time_counts_unless_it_is_said_not_to() {
    let ca = authority("root");
    let validation = Validation {
        trust: Some(trust(&ca)),
        ..Validation::default()
    };
    let patient = Validation {
        allow_expired: true,
        ..validation.clone()
    };
    let old = leaf(&ca, &[A], |params| {
        params.not_after = date_time_ymd(2020, 1, 1)
    });
    assert!(
        judge(&validation, &old)
            .expect_err("old")
            .contains("has expired")
    );
    assert_eq!(judge(&patient, &old), Ok(Standing::Trusted));
    let early = leaf(&ca, &[A], |params| {
        params.not_before = date_time_ymd(2090, 1, 1)
    });
    assert!(
        judge(&validation, &early)
            .expect_err("early")
            .contains("not valid yet")
    );
    let other = leaf(&authority("root"), &[A], |params| {
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    assert!(
        judge(&patient, &other).is_err(),
        "only the time is forgiven"
    );
}

#[test]
fn pins_and_revocation_lists_are_kept_to() {
    let ca = authority("root");
    let der = leaf(&ca, &[A], |params| {
        params.serial_number = Some(SerialNumber::from(77))
    });
    let certificate = Certificate::read(&der).expect("it is one");
    let pinned = |hashes: Vec<[u8; 32]>, pins: Vec<[u8; 32]>| Validation {
        certificate_hashes: hashes,
        spki_pins: pins,
        ..Validation::default()
    };
    assert!(judge(&pinned(vec![certificate.sha256], vec![]), &der).is_ok());
    assert!(judge(&pinned(vec![[0; 32]], vec![certificate.spki_sha256]), &der).is_ok());
    assert!(judge(&pinned(vec![[0; 32]], vec![]), &der).is_err());

    let list = |serials: &[u64]| {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2090, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from(*serial),
                    revocation_time: date_time_ymd(2024, 1, 1),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let pem = params.signed_by(&ca).expect("signed").pem().expect("PEM");
        Validation {
            trust: Some(trust(&ca)),
            revocation_lists: revocation_lists(pem.as_bytes()).expect("a list").into(),
            ..Validation::default()
        }
    };
    assert!(judge(&list(&[1]), &der).is_ok());
    let said = judge(&list(&[77]), &der).expect_err("revoked");
    assert!(said.contains("is revoked"), "{said}");
}

#[test]
fn a_trust_domain_vouches_for_its_own_alone() {
    let (one, two) = (authority("one"), authority("two"));
    let validation = Validation {
        trust_domains: vec![("one".into(), trust(&one)), ("two".into(), trust(&two))],
        ..Validation::default()
    };
    let of = |issuer: &Authority, uris: &[&str]| judge(&validation, &leaf(issuer, uris, |_| {}));
    assert_eq!(of(&one, &[A]), Ok(Standing::Trusted));
    assert_eq!(of(&two, &["spiffe://two/x"]), Ok(Standing::Trusted));
    // The right authority for the wrong domain.
    assert!(of(&two, &[A]).is_err());
    for uris in [
        &[][..],
        &[A, "spiffe://two/x"],
        &["spiffe://three/x"],
        &["https://one/ns/a"],
        &["spiffe://one"],
        &["spiffe:///x"],
    ] {
        let said = of(&one, uris).expect_err("no identity");
        assert!(said.starts_with("SPIFFE: "), "{uris:?}: {said}");
    }
    // An authority is nobody's client.
    assert!(judge(&validation, one.der()).is_err());
}

#[test]
fn the_issuer_is_the_one_that_signed() {
    // Both authorities have one name: only the signature tells them apart.
    let (ca, other) = (authority("root"), authority("root"));
    let both = format!("{}{}", other.pem(), ca.pem());
    let validation = Validation {
        trust: Some(Arc::new(
            Trust::from_pem(both.as_bytes()).expect("a bundle"),
        )),
        ..Validation::default()
    };
    let of = |chain: &[CertificateDer<'_>]| validation.issuer(chain);
    let known = |der: &CertificateDer<'_>| {
        let read = Certificate::read(der).expect("a certificate");
        Some(Issuer {
            sha256: read.sha256,
            serial: read.serial,
        })
    };
    let good = leaf(&ca, &[A], |_| {});
    assert_eq!(of(std::slice::from_ref(&good)), known(ca.der()));
    // Its time is over, which was another's to judge.
    let old = leaf(&ca, &[A], |params| {
        params.not_after = date_time_ymd(2020, 1, 1)
    });
    assert_eq!(of(&[old]), known(ca.der()));
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let name = rcgen::DnType::CommonName;
    params.distinguished_name.push(name, "between");
    let key = KeyPair::generate().expect("a key");
    let between = CertifiedIssuer::signed_by(params, key, &ca).expect("signed");
    let below = leaf(&between, &[A], |_| {});
    let chain = [below.clone(), between.der().clone()];
    assert_eq!(of(&chain), known(between.der()));
    assert_eq!(of(&[below]), None, "the path is not whole");
    assert_eq!(of(&[ca.der().clone()]), None, "trusted by itself");
    assert_eq!(of(&[]), None);
    assert_eq!(Validation::default().issuer(&[good]), None);
}
