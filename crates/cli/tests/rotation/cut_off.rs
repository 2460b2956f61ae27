//! A root that is replaced while half of the fleet cannot reach the control plane.
//!
//! Certificates live 45 s in this mesh, and a new root is given out for 20 s before it signs: for those who are cut off
//! that is too early.

use std::time::{Duration, Instant};

use super::{
    PATIENCE, figure, hello,
    mesh::{Mesh, eventually},
    roots, says_that_it_expired,
};

/// A pod whose packets to the control plane are lost, until dropped.
struct CutOff<'a>(&'a Mesh, &'static str);

impl<'a> CutOff<'a> {
    fn new(mesh: &'a Mesh, pod: &'static str) -> Self {
        let cut = Self(mesh, pod);
        cut.rule("-I");
        cut
    }

    fn rule(&self, what: &str) {
        let rule = format!("iptables -w {what} OUTPUT -p tcp --dport 15012 -j DROP && echo done");
        let said = self.0.inside("shop", self.1, &rule);
        assert_eq!(said.trim(), "done", "{}: {rule}", self.1);
    }
}

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.rule("-D");
        }
    }
}

/// `near` comes back while its certificate is good and notices nothing; `far` stays away longer, is refused meanwhile,
/// and then comes right by itself. The others go on, and who waits for whom is said.
pub(super) fn half_of_the_fleet(mesh: &Mesh) {
    let left = |pod: &str| {
        let name = "istio_agent_cert_expiry_seconds{resource_name=\"default\"}";
        figure(mesh, pod, name)
    };
    let said = |what: &str| {
        let log = mesh.log("istio-system", "istiod", "discovery");
        log.lines().any(|line| line.contains(what))
    };
    let good = || assert_eq!(hello(mesh, "near"), Some(()), "nobody notices");
    let far_ends = eventually("both have just come", PATIENCE, || {
        let asked = Instant::now();
        let far = left("far");
        (far > 37.0 && left("near") > 37.0).then(|| asked + Duration::from_secs_f64(far))
    });
    let (near, far) = (CutOff::new(mesh, "near"), CutOff::new(mesh, "far"));
    std::fs::write(mesh.state().join("authority/rotate"), "").expect("ask for another root");
    eventually("both roots are given out", PATIENCE, || {
        (roots(mesh).len() == 2).then_some(())
    });
    // The overlap passes, and two are not there.
    eventually("it is said that the root waits", PATIENCE, || {
        good();
        assert_eq!(hello(mesh, "far"), Some(()), "its certificate is good");
        said("does not sign yet").then_some(())
    });
    assert!(!said("signs from now on"));
    assert!(
        Instant::now() < far_ends,
        "the machine is too slow for this test"
    );

    drop(near);
    let before = left("near");
    eventually("near has come", PATIENCE, || {
        good();
        (left("near") > before).then_some(())
    });
    assert!(
        !said("signs from now on") || Instant::now() >= far_ends,
        "far has a certificate, and not the new root"
    );

    eventually("far is refused", PATIENCE, || {
        good();
        let refused = hello(mesh, "far").is_none();
        // Seconds are what certificates are good to.
        let soon = Instant::now() + Duration::from_secs(1) >= far_ends;
        assert!(!refused || soon, "its certificate is good for a while");
        refused.then_some(())
    });
    says_that_it_expired(mesh, "far");
    eventually("nobody is waited for any more", PATIENCE, || {
        good();
        said("signs from now on").then_some(())
    });
    drop(far);
    eventually("far comes right by itself", PATIENCE, || {
        good();
        hello(mesh, "far")
    });
}
