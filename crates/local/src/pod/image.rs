//! Images stand for programs here: which one an image name means, and as which user it runs.

use std::collections::BTreeMap;

/// What an image brings along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    /// What runs where the container has no `command`; its `args` follow.
    pub(crate) entrypoint: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Whether it is of our making, and therefore brings its user along; any other runs as [`APP_USER`] too.
    pub(crate) uid: u32,
}

/// Images by the last part of their name without a tag, as given with `--image NAME=COMMAND`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Images {
    given: BTreeMap<String, Vec<String>>,
}

impl Images {
    /// Reads `NAME=COMMAND ARGUMENT …`; the name may hold a registry, which is not looked at.
    pub(crate) fn add(&mut self, text: &str) -> Result<(), String> {
        let (name, command) = text
            .split_once('=')
            .filter(|(n, c)| !n.is_empty() && !c.trim().is_empty())
            .ok_or_else(|| {
                format!("--image {text:?}: write NAME=COMMAND, as in --image web=/usr/bin/python3")
            })?;
        self.given.insert(
            base_name(name).to_owned(),
            command.split_whitespace().map(str::to_owned).collect(),
        );
        Ok(())
    }

    /// `None` where the name means nothing: the container needs a `command` then.
    pub(crate) fn find(&self, image: &str) -> Option<Image> {
        let name = base_name(image);
        if let Some(command) = self.given.get(name) {
            return Some(Image {
                entrypoint: command.clone(),
                env: Vec::new(),
                uid: APP_USER,
            });
        }
        built_in(name)
    }
}

fn built_in(name: &str) -> Option<Image> {
    let image = |entrypoint: &[&str], env: &[(&str, &str)], uid| Image {
        entrypoint: entrypoint.iter().map(|s| (*s).to_owned()).collect(),
        env: env
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        uid,
    };
    if matches!(
        name,
        "proxyv2" | "proxyv2-distroless" | "proxyv2-debug" | "proxy" | "outrigger-proxy" | "auto"
    ) {
        return Some(image(&[PILOT_AGENT], &[], PROXY_USER));
    }
    match name {
        "control" | "pilot" | "pilot-distroless" => {
            return Some(image(&[OUTRIGGER, "control"], &[], PROXY_USER));
        }
        "outrigger" => return Some(image(&[OUTRIGGER], &[], APP_USER)),
        "echo" => return Some(image(&[OUTRIGGER, "echo"], &[], APP_USER)),
        _ => {}
    }
    let service = name
        .strip_prefix("examples-")
        .unwrap_or(name)
        .strip_prefix("bookinfo-")?;
    let (service, version) = match service.rsplit_once("-v") {
        Some((service, version)) => (service, format!("v{version}")),
        None => (service, "v1".to_owned()),
    };
    let env: &[(&str, &str)] = match (service, version.as_str()) {
        ("productpage" | "details" | "ratings", _) => &[],
        // The environment that the original's images are built with.
        ("reviews", "v1") => &[("ENABLE_RATINGS", "false")],
        ("reviews", "v2") => &[("ENABLE_RATINGS", "true"), ("STAR_COLOR", "black")],
        ("reviews", "v3") => &[("ENABLE_RATINGS", "true"), ("STAR_COLOR", "red")],
        _ => return None,
    };
    let mut image = image(&[OUTRIGGER, "bookinfo", service], env, APP_USER);
    image.env.push(("SERVICE_VERSION".to_owned(), version));
    Some(image)
}

/// The last part of an image name, without tag and digest.
fn base_name(image: &str) -> &str {
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split(['@', ':']).next().unwrap_or(last)
}

/// Where a pod finds this program, and the name under which it is the agent.
pub(crate) const OUTRIGGER: &str = "/usr/local/bin/outrigger";
const PILOT_AGENT: &str = "/usr/local/bin/pilot-agent";
/// Whom interception lets pass.
pub(crate) const PROXY_USER: u32 = 1337;
/// Whoever is nobody in particular.
pub(crate) const APP_USER: u32 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_programs_wherever_they_come_from() {
        let images = Images::default();
        let find = |name: &str| images.find(name).unwrap();
        assert_eq!(find("docker.io/istio/proxyv2:1.30.0").uid, 1337);
        assert_eq!(find("auto").entrypoint, [PILOT_AGENT]);
        let v3 = find("docker.io/istio/examples-bookinfo-reviews-v3:1.20.3");
        assert_eq!(v3.entrypoint, [OUTRIGGER, "bookinfo", "reviews"]);
        assert!(
            v3.env
                .contains(&("STAR_COLOR".to_owned(), "red".to_owned()))
        );
        assert_eq!(
            find("registry:5000/bookinfo-ratings-v2@sha256:00").env,
            [("SERVICE_VERSION".to_owned(), "v2".to_owned())]
        );
        assert_eq!(images.find("nginx"), None);
        assert_eq!(images.find("bookinfo-reviews-v9"), None);
    }

    #[test]
    fn users_can_name_their_own() {
        let mut images = Images::default();
        images
            .add("shop/web=/usr/bin/python3 -m http.server")
            .unwrap();
        assert_eq!(
            images.find("example.com/shop/web:2").unwrap().entrypoint,
            ["/usr/bin/python3", "-m", "http.server"]
        );
        assert!(images.add("web").unwrap_err().contains("NAME=COMMAND"));
    }
}
