//! From the user's text to what runs.

use std::path::Path;

use super::*;
use crate::objects::document::parse;

fn files(texts: &[(&str, &str)]) -> Vec<SourceFile> {
    texts
        .iter()
        .map(|(path, text)| SourceFile {
            path: path.into(),
            text: (*text).to_owned(),
            documents: parse(Path::new(path), text),
        })
        .collect()
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: a}\nspec:\n  selector: {app: web}\n  ports: [{port: 80}]\n\
    ---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: a}\nspec:\n  template:\n    metadata: {labels: {app: web}}\n\
    \x20   spec: {containers: [{name: web, image: outrigger.local/echo}]}\n\
    ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: a}\nspec: {hosts: [web]}\n";

fn builder() -> Builder {
    Builder::new(Folders {
        config: "/state/config".into(),
        authority: "/state/authority".into(),
        token_keys: "/state/token-keys".into(),
    })
}

#[test]
fn objects_are_completed_and_istio_files_keep_their_lines() {
    let world = builder().build(&files(&[("web.yaml", WEB)]), &World::default());
    assert_eq!(world.problems, Vec::<String>::new());
    let rest = &world.files[Path::new("web.yaml")];
    assert_eq!(rest.lines().nth(16), Some("kind: VirtualService"), "{rest}");
    assert!(!rest.contains("Deployment"));
    assert!(world.objects[Path::new("service.a.web.yaml")]["spec"]["clusterIP"].is_string());
    let names: Vec<_> = world
        .pods
        .keys()
        .map(|k| format!("{}/{}", k.0, k.1))
        .collect();
    assert_eq!(names, ["a/web", "istio-system/istiod"]);
    let mesh = text(&world.objects[Path::new("istio.yaml")], &["data", "mesh"]);
    assert!(mesh.contains("enableAutoMtls: true"), "{mesh}");
}

#[test]
fn an_edit_keeps_addresses_and_restarts_only_what_changed() {
    let mut b = builder();
    let first = b.build(&files(&[("web.yaml", WEB)]), &World::default());
    let edited = WEB.replace(
        "image: outrigger.local/echo",
        "image: outrigger.local/echo:2",
    );
    let second = b.build(&files(&[("web.yaml", &edited)]), &first);
    let pod = |w: &World, ns: &str, name: &str| w.pods[&(ns.to_owned(), name.to_owned())].clone();
    assert_eq!(
        pod(&first, "a", "web").address,
        pod(&second, "a", "web").address
    );
    assert_ne!(
        pod(&first, "a", "web").fingerprint,
        pod(&second, "a", "web").fingerprint
    );
    assert_eq!(
        pod(&first, "istio-system", "istiod").index,
        pod(&second, "istio-system", "istiod").index
    );
    assert_eq!(
        first.objects[Path::new("service.a.web.yaml")]["spec"]["clusterIP"],
        second.objects[Path::new("service.a.web.yaml")]["spec"]["clusterIP"],
    );
}

#[test]
fn a_bad_file_keeps_its_last_good_content_and_is_reported() {
    let mut b = builder();
    let first = b.build(&files(&[("web.yaml", WEB)]), &World::default());
    let broken = format!("{WEB}---\nkind: [\n");
    let second = b.build(&files(&[("web.yaml", &broken)]), &first);
    assert!(second.pods.contains_key(&("a".into(), "web".into())));
    assert!(
        second.problems[0].starts_with("web.yaml:"),
        "{:?}",
        second.problems
    );
    // The control plane sees the file as it is and says the same.
    assert_eq!(second.files[Path::new("web.yaml")], broken);
}

#[test]
fn a_second_object_of_the_same_name_is_reported_with_both_places() {
    let world = builder().build(
        &files(&[("a.yaml", WEB), ("b.yaml", WEB)]),
        &World::default(),
    );
    assert_eq!(world.problems.len(), 3);
    assert!(
        world.problems[0].contains("b.yaml:1") && world.problems[0].contains("a.yaml:1"),
        "{:?}",
        world.problems
    );
}

#[test]
fn hosts_of_service_entries_resolve() {
    let text = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: a}\nspec:\n  hosts: [api.example.com, '*.wild.example.com']\n\
        \x20 ports: [{number: 80, name: http, protocol: HTTP}]\n  resolution: DNS\n  endpoints: [{address: web.a.svc.cluster.local}]\n";
    let world = builder().build(&files(&[("e.yaml", text)]), &World::default());
    assert_eq!(
        world.entry_names["api.example.com"],
        Answer::Alias("web.a.svc.cluster.local".into())
    );
    assert!(world.entry_names.contains_key("*.wild.example.com"));
}
